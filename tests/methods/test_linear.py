"""linear: the weighted average."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from evomerge.errors import CandidateFailed
from tests.methods import oracle
from tests.methods.oracle import merge


@pytest.mark.parametrize("weights", [(0.2, 0.3, 0.5), (1.0, 1.0, 1.0), (-0.2, 0.7, 1.1)])
@pytest.mark.parametrize("normalize", [True, False])
def test_is_the_weighted_average(weights: tuple[float, ...], normalize: bool) -> None:
    _, inputs = oracle.checkpoints(5000, dtype=torch.float64)
    merged = merge("linear", None, inputs, weight=weights, normalize=normalize)
    assert merged.dtype == torch.float64
    np.testing.assert_allclose(
        merged.numpy(), oracle.linear(inputs, weights, normalize), rtol=1e-11, atol=1e-17
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chosen", [0, 1, 2])
def test_a_weight_of_one_alone_copies_the_input_bit_for_bit(dtype: torch.dtype, chosen: int) -> None:
    _, inputs = oracle.checkpoints(1000, dtype=dtype)
    for k, tensor in enumerate(inputs):
        tensor[0] = -0.0 if k == chosen else 1.0
    weights = tuple(float(k == chosen) for k in range(3))
    merged = merge("linear", None, inputs, weight=weights).to(dtype)
    assert torch.equal(merged, inputs[chosen])
    assert torch.signbit(merged[0])


@pytest.mark.parametrize("weights", [(0.3, 0.3, 0.4), (1.0, 2.0, 4.0)])
def test_equal_inputs_give_that_input(weights: tuple[float, ...]) -> None:
    base, _ = oracle.checkpoints(5000)
    assert torch.equal(merge("linear", None, [base] * 3, weight=weights).bfloat16(), base)


def test_two_halves_are_exact_in_float32() -> None:
    _, (x, y) = oracle.checkpoints(5000, experts=2)
    merged = merge("linear", None, [x, y], weight=(1.0, 1.0))
    assert torch.equal(merged.double(), (x.double() + y.double()) / 2)


@pytest.mark.parametrize("weights", [(1.0, -1.0), (0.0, 0.0), (0.1, 0.2 - 0.3)])
def test_weights_that_add_up_to_nothing_fail_the_candidate(weights: tuple[float, ...]) -> None:
    x = torch.ones(3)
    with pytest.raises(CandidateFailed, match=r"the weights .* add up to 0 and cannot be normalized"):
        merge("linear", None, [x, x], weight=weights)


def test_all_weights_zero_without_normalize_is_zero() -> None:
    x = torch.ones(3)
    assert merge("linear", None, [x, x], weight=(0.0, 0.0), normalize=False).tolist() == [0, 0, 0]


def test_the_order_of_the_inputs_does_not_matter() -> None:
    _, inputs = oracle.checkpoints(5000)
    one = merge("linear", None, inputs, weight=(0.2, 0.3, 0.5))
    other = merge("linear", None, inputs[::-1], weight=(0.5, 0.3, 0.2))
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)
