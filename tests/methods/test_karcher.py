"""karcher: the Riemannian mean on the sphere."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from evomerge.errors import CandidateFailed
from tests.methods import oracle
from tests.methods.oracle import merge


def experts(count: int = 3, spread: float = 0.7, n: int = 400) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(n, dtype=torch.float64, generator=generator)
    return [
        (1 + k / 3) * (common + spread * torch.randn(n, dtype=torch.float64, generator=generator))
        for k in range(count)
    ]


def test_golden_value() -> None:
    merged = merge("karcher", None, list(torch.eye(3, dtype=torch.float64)))
    assert merged.tolist() == pytest.approx([1 / math.sqrt(3)] * 3)


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.2, 0.9, 0.4)])
@pytest.mark.parametrize("spread", [0.05, 0.7, 5.0])
def test_follows_the_vector_iteration(weights: tuple[float, ...], spread: float) -> None:
    inputs = experts(spread=spread)
    merged = merge("karcher", None, inputs, weight=weights, max_iter=60, tol=1e-12)
    expected = oracle.karcher(oracle.doubles(*inputs), weights, 60)
    np.testing.assert_allclose(merged.numpy(), expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("spread", [0.05, 0.7])
@pytest.mark.parametrize("with_base", [True, False])
def test_mergekit_gives_the_same(count: int, spread: float, with_base: bool) -> None:
    peer = pytest.importorskip("mergekit.merge_methods.api").merge_tensors
    base, *inputs = experts(count + 1, spread)
    theirs = peer([base, *inputs] if with_base else inputs, "karcher", base_index=0 if with_base else None)
    ours = merge("karcher", base if with_base else None, inputs, dialect="mergekit")
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_the_pulls_balance_at_the_mean() -> None:
    inputs = oracle.doubles(*experts())
    weights = np.array([0.2, 0.9, 0.4])
    merged = merge("karcher", None, experts(), weight=tuple(weights), max_iter=100, tol=1e-12).numpy()
    u = merged / np.linalg.norm(merged)
    units = [x / np.linalg.norm(x) for x in inputs]
    pull = np.zeros_like(u)
    for w, v in zip(weights, units, strict=True):
        pull += w * np.arccos(v @ u) * (v - (v @ u) * u) / np.sqrt(1 - (v @ u) ** 2)
    assert np.linalg.norm(pull) < 1e-9
    norms = [np.linalg.norm(x) for x in inputs]
    assert np.linalg.norm(merged) == pytest.approx(weights @ norms / weights.sum())


def test_of_two_it_has_the_direction_of_slerp_half_way() -> None:
    x, y = experts(2)
    y *= torch.linalg.vector_norm(x) / torch.linalg.vector_norm(y)
    merged = merge("karcher", None, [x, y])
    torch.testing.assert_close(merged, merge("slerp", None, [x, y], t=0.5), rtol=1e-9, atol=1e-12)


def test_is_equivariant_under_rotation() -> None:
    inputs = experts(n=20)
    generator = torch.Generator().manual_seed(1)
    q, _ = torch.linalg.qr(torch.randn(20, 20, dtype=torch.float64, generator=generator))
    rotated = merge("karcher", None, [q @ x for x in inputs])
    torch.testing.assert_close(rotated, q @ merge("karcher", None, inputs), rtol=1e-9, atol=1e-12)


def test_equal_inputs_give_that_input() -> None:
    _, (x,) = oracle.checkpoints(3000, experts=1)
    assert torch.equal(merge("karcher", None, [x] * 3, weight=(0.2, 0.7, 0.4)).bfloat16(), x)


def test_opposite_inputs_are_averaged() -> None:
    x, _ = experts(2)
    torch.testing.assert_close(merge("karcher", None, [x, -0.5 * x]), 0.25 * x, rtol=1e-12, atol=0)


def test_an_input_opposite_to_the_mean_does_not_pull() -> None:
    x, _ = experts(2)
    merged = merge("karcher", None, [x, -x], weight=(0.8, 0.2))
    torch.testing.assert_close(merged, x, rtol=1e-12, atol=0)


def test_a_zero_tensor_has_a_norm_and_no_direction() -> None:
    x, _ = experts(2)
    merged = merge("karcher", None, [x, torch.zeros_like(x)])
    torch.testing.assert_close(merged, x / 2, rtol=1e-12, atol=0)
    zero = torch.zeros(5)
    assert torch.equal(merge("karcher", None, [zero, zero]), zero)


def test_no_iteration_is_normalised_linear_interpolation() -> None:
    inputs = experts()
    torch.testing.assert_close(
        merge("karcher", None, inputs, max_iter=0), merge("multislerp", None, inputs, weight=1.0)
    )


def test_weights_that_add_up_to_nothing_fail_the_candidate() -> None:
    with pytest.raises(CandidateFailed, match="karcher: the weights 1, -1 add up to 0"):
        merge("karcher", None, experts(2), weight=(1.0, -1.0))


def test_steps_are_counted_in_whole_numbers() -> None:
    with pytest.raises(ValueError, match=r"karcher: max_iter: 2\.5 is not a whole number"):
        merge("karcher", None, experts(2), max_iter=2.5)


def test_a_non_finite_input_gives_a_non_finite_result() -> None:
    x, y = experts(2)
    x[0] = float("nan")
    assert torch.isnan(merge("karcher", None, [x, y])).all()
