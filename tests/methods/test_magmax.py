"""magmax: the change of largest magnitude."""

from __future__ import annotations

import math

import numpy as np
import torch

from tests.methods import oracle
from tests.methods.oracle import merge


def test_takes_the_change_of_largest_magnitude_and_of_equal_ones_the_first() -> None:
    experts = [torch.tensor(delta, dtype=torch.float64) for delta in oracle.CONFLICT]
    merged = merge("magmax", torch.zeros(4), experts, lambda_=1.0)
    assert merged.tolist() == [1, -2, -4, 0.5]


def test_agrees_with_the_formula() -> None:
    base, experts = oracle.checkpoints(5000, dtype=torch.float64)
    origin, *others = oracle.doubles(base, *experts)
    q = np.stack([w * (x - origin) for w, x in zip((1.0, -2.0, 0.5), others, strict=True)])
    largest = np.take_along_axis(q, np.abs(q).argmax(axis=0)[None], axis=0)[0]
    merged = merge("magmax", base, experts, weight=(1.0, -2.0, 0.5), lambda_=0.3)
    np.testing.assert_allclose(merged.numpy(), origin + 0.3 * largest, rtol=1e-11, atol=1e-15)


def test_is_ties_without_a_trim_that_elects_and_merges_by_magnitude() -> None:
    base, experts = oracle.checkpoints(5000)
    ties = merge("ties", base, experts, density=1.0, elect="max", merge_="max")
    assert torch.equal(merge("magmax", base, experts, lambda_=1.0), ties)


def test_one_expert_in_full_is_that_expert() -> None:
    base, (expert,) = oracle.checkpoints(500, experts=1)
    assert torch.equal(merge("magmax", base, [expert], lambda_=1.0).bfloat16(), expert)
    assert torch.equal(merge("magmax", base, [expert], lambda_=0.0).bfloat16(), base)


def test_a_non_finite_expert_does_not_pass_unnoticed() -> None:
    experts = [torch.tensor([math.nan]), torch.tensor([2.0]), torch.tensor([3.0])]
    for _ in experts:
        experts = [*experts[1:], experts[0]]
        assert merge("magmax", torch.zeros(1), experts).isnan().all()
