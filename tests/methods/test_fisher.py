"""fisher: every weight counts as much as the data says that it matters to its model."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from evomerge.errors import CandidateFailed
from evomerge.methods import Statistic
from tests.methods import oracle
from tests.methods.oracle import merge


def information(n: int, count: int = 3, seed: int = 4) -> list[torch.Tensor]:
    """Fisher information that spans twenty orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    return [10 ** (20 * torch.rand(n, generator=generator) - 20) for _ in range(count)]


def expected(
    inputs: list[torch.Tensor],
    fishers: list[torch.Tensor],
    weights: tuple[float, ...],
    floor: float,
    normalize: bool,
) -> np.ndarray:
    f = np.stack(oracle.doubles(*fishers))
    squares = (f**2).mean(axis=1, keepdims=True)
    f = f / np.sqrt(squares if normalize else squares.mean(axis=0))
    f = np.array(weights)[:, None] * np.maximum(f, floor)
    return (f * np.stack(oracle.doubles(*inputs))).sum(axis=0) / f.sum(axis=0)


def test_the_golden_value() -> None:
    one, three = torch.tensor([1.0]), torch.tensor([3.0])
    assert merge("fisher", None, [one, three], statistics=[one, three], normalize=False).item() == 2.5


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.2, 0.0, 3.0)])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("floor", [0.0, 1e-6, 0.5])
def test_is_the_weighted_mean(weights: tuple[float, ...], normalize: bool, floor: float) -> None:
    _, inputs = oracle.checkpoints(5000, dtype=torch.float64)
    fishers = information(5000)
    merged = merge(
        "fisher", None, inputs, statistics=fishers, weight=weights, floor=floor, normalize=normalize
    )
    np.testing.assert_allclose(
        merged.numpy(), expected(inputs, fishers, weights, floor, normalize), rtol=1e-6, atol=1e-12
    )


def test_equal_information_is_the_average() -> None:
    _, inputs = oracle.checkpoints(5000, dtype=torch.float32)
    merged = merge("fisher", None, inputs, statistics=information(5000, 1) * 3)
    np.testing.assert_allclose(merged.numpy(), oracle.linear(inputs, (1, 1, 1), True), rtol=1e-5, atol=1e-8)


def test_information_of_one_model_alone_is_that_model() -> None:
    _, inputs = oracle.checkpoints(5000, dtype=torch.float32)
    fishers = [torch.full((5000,), f) for f in (1e-12, 1.0, 1e-12)]
    merged = merge("fisher", None, inputs, statistics=fishers, normalize=False, floor=0.0)
    torch.testing.assert_close(merged, inputs[1], rtol=1e-6, atol=1e-9)


def test_is_the_minimiser_of_quadratic_losses() -> None:
    _, inputs = oracle.checkpoints(50, dtype=torch.float64)
    fishers = [f.double() + 0.1 for f in information(50)]
    merged = merge("fisher", None, inputs, statistics=fishers, normalize=False).requires_grad_()
    loss = sum((0.5 * f * (merged - x) ** 2).sum() for f, x in zip(fishers, inputs, strict=True))
    (gradient,) = torch.autograd.grad(loss, merged)
    assert gradient.abs().max() < 1e-8


@pytest.mark.parametrize("normalize", [True, False])
def test_weights_without_information_are_averaged(normalize: bool) -> None:
    _, inputs = oracle.checkpoints(100, experts=2, dtype=torch.float32)
    fishers = information(100, 2)
    for fisher in fishers:
        fisher[:50] = 0
    merged = merge(
        "fisher", None, inputs, statistics=fishers, weight=(1.0, 3.0), floor=0.0, normalize=normalize
    )
    mean = oracle.linear([x[:50] for x in inputs], (1.0, 3.0), True)
    np.testing.assert_allclose(merged[:50].numpy(), mean, rtol=1e-5, atol=1e-8)
    assert torch.isfinite(merged).all()


def test_a_model_without_any_information_counts_with_the_floor() -> None:
    x, y = torch.zeros(3), torch.ones(3)
    merged = merge("fisher", None, [x, y], statistics=[torch.zeros(3), torch.ones(3)], floor=1e-2)
    np.testing.assert_allclose(merged.numpy(), 1 / 1.01, rtol=1e-6)


def test_the_unit_is_that_of_the_whole_model() -> None:
    x, y = torch.zeros(2), torch.ones(2)
    fishers = [Statistic(torch.full((2,), 3.0), unit=2.0), Statistic(torch.full((2,), 5.0), unit=1.0)]
    merged = merge("fisher", None, [x, y], statistics=fishers)
    np.testing.assert_allclose(merged.numpy(), 5 / (1.5 + 5), rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_inputs_give_that_input_bit_for_bit(dtype: torch.dtype) -> None:
    base, _ = oracle.checkpoints(5000, dtype=dtype)
    assert torch.equal(merge("fisher", None, [base] * 3, statistics=information(5000)).to(dtype), base)


def test_the_order_of_the_inputs_does_not_matter() -> None:
    _, inputs = oracle.checkpoints(5000)
    fishers = information(5000)
    one = merge("fisher", None, inputs, statistics=fishers)
    other = merge("fisher", None, inputs[::-1], statistics=fishers[::-1])
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)


def test_a_common_factor_of_the_information_changes_nothing() -> None:
    _, inputs = oracle.checkpoints(5000)
    fishers = information(5000)
    one = merge("fisher", None, inputs, statistics=fishers)
    other = merge("fisher", None, inputs, statistics=[2.0**-40 * f for f in fishers])
    torch.testing.assert_close(one, other, rtol=1e-6, atol=0)


def test_what_does_not_fit_is_refused() -> None:
    x = torch.ones(3)
    with pytest.raises(ValueError, match="needs the diagonal Fisher information"):
        merge("fisher", None, [x, x])
    with pytest.raises(ValueError, match="1 statistics for 2 inputs"):
        merge("fisher", None, [x, x], statistics=[x])
    with pytest.raises(ValueError, match="information of 2 weights for 3"):
        merge("fisher", None, [x, x], statistics=[x[:2], x[:2]])
    with pytest.raises(ValueError, match="lies outside"):
        merge("fisher", None, [x, x], statistics=[x, x], weight=-0.1)
    with pytest.raises(CandidateFailed, match="all weights are 0"):
        merge("fisher", None, [x, x], statistics=[x, x], weight=0.0)


def test_a_damaged_information_reaches_no_other_weight() -> None:
    x, y = torch.zeros(3), torch.ones(3)
    damaged = Statistic(torch.tensor([1.0, math.nan, 1.0]), unit=1.0)
    merged = merge("fisher", None, [x, y], statistics=[damaged, torch.ones(3)])
    assert torch.isfinite(merged).tolist() == [True, False, True]
