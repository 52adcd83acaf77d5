"""ram and ramplus_tl: shared changes averaged, unique ones kept."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.methods import oracle
from tests.methods.oracle import merge


def test_golden_values() -> None:
    experts = [torch.tensor([1.0, 2.0, 0.0]), torch.tensor([3.0, 0.0, 0.0])]
    assert merge("ram", torch.zeros(3), experts).tolist() == [2, 2, 0]
    assert merge("ramplus_tl", torch.zeros(3), experts).tolist() == pytest.approx([2, 2.04, 0])


def test_changes_up_to_epsilon_do_not_count() -> None:
    experts = [torch.tensor([1.0, 0.25, 4.0]), torch.tensor([0.25, -0.25, 2.0])]
    assert merge("ram", torch.zeros(3), experts, epsilon=0.25).tolist() == [1, 0, 3]


def test_agrees_with_the_formula() -> None:
    base, experts = oracle.checkpoints(5000, dtype=torch.float64)
    origin, *others = oracle.doubles(base, *experts)
    tau = np.stack([x - origin for x in others])
    changed = np.abs(tau) > 2e-3
    tau = tau * changed
    number = changed.sum(axis=0)
    mean = tau.sum(axis=0) / np.maximum(number, 1)
    merged = merge("ram", base, experts, epsilon=2e-3)
    np.testing.assert_allclose(merged.numpy(), origin + mean, rtol=1e-11, atol=1e-15)
    ratio = [(c & (number > 1)).sum() / (c & (number == 1)).sum() for c in changed]
    factors = 1 + 0.3 * np.clip(ratio, 0, 0.7)
    expected = np.where(number == 1, (factors[:, None] * tau).sum(axis=0), mean)
    merged = merge("ramplus_tl", base, experts, epsilon=2e-3, r=0.3, alpha=0.7)
    np.testing.assert_allclose(merged.numpy(), origin + expected, rtol=1e-11, atol=1e-15)
