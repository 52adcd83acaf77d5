"""nuslerp: interpolation between two models or their task vectors, whole, by row or by column."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from evomerge.errors import CandidateFailed
from tests.methods import oracle
from tests.methods.oracle import merge


def slerp(t: float) -> Any:
    def formula(vectors: list[np.ndarray]) -> np.ndarray:
        a, b = vectors
        angle = np.arccos(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
        return np.sin((1 - t) * angle) / np.sin(angle) * a + np.sin(t * angle) / np.sin(angle) * b

    return formula


def pair(*shape: int, spread: float = 0.5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(shape, dtype=torch.float64, generator=generator)
    x, y = (base + spread * torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(2))
    return base, x, y


@pytest.mark.parametrize("axis", ["none", "out", "in"])
@pytest.mark.parametrize("shape", [(30, 40), (3, 4, 5), (50,)])
@pytest.mark.parametrize("chunk", [1 << 18, 17])
def test_follows_the_formula(axis: str, shape: tuple[int, ...], chunk: int) -> None:
    base, x, y = pair(*shape)
    weights = (0.3, 0.9)
    plain = merge("nuslerp", None, [x, y], weight=weights, axis=axis, chunk=chunk)
    expected = oracle.along([x.numpy(), y.numpy()], axis, slerp(0.75))
    np.testing.assert_allclose(plain.numpy(), expected, rtol=1e-10, atol=1e-12)
    of_deltas = merge("nuslerp", base, [x, y], weight=weights, axis=axis, chunk=chunk)
    expected = oracle.along([(x - base).numpy(), (y - base).numpy()], axis, slerp(0.75))
    np.testing.assert_allclose(of_deltas.numpy(), base.numpy() + expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("flatten", "row_wise"), [(True, False), (False, False), (False, True)])
@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("shape", [(30, 40), (3, 4, 5)])
def test_mergekit_gives_the_same(
    flatten: bool, row_wise: bool, with_base: bool, shape: tuple[int, ...]
) -> None:
    peer = pytest.importorskip("mergekit.merge_methods.api").merge_tensors
    base, x, y = pair(*shape)
    switches = {"nuslerp_flatten": flatten, "nuslerp_row_wise": row_wise}
    theirs = peer(
        [base, x, y] if with_base else [x, y],
        "nuslerp",
        parameters={"weight": [0.4, 0.8], **switches},
        base_index=0 if with_base else None,
    )
    ours = merge(
        "nuslerp",
        base if with_base else None,
        [x, y],
        weight=(0.4, 0.8),
        dialect="mergekit",
        **switches,
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_row_wise_means_columns() -> None:
    _, x, y = pair(6, 5)
    theirs = {"nuslerp_flatten": False, "nuslerp_row_wise": True, "dialect": "mergekit"}
    ours = merge("nuslerp", None, [x, y], weight=1.0, axis="in")
    assert torch.equal(merge("nuslerp", None, [x, y], weight=1.0, **theirs), ours)


@pytest.mark.parametrize("axis", ["none", "out", "in"])
def test_the_ends_are_the_inputs(axis: str) -> None:
    _, x, y = pair(20, 30)
    assert torch.equal(merge("nuslerp", None, [x, y], weight=(1.0, 0.0), axis=axis), x)
    assert torch.equal(merge("nuslerp", None, [x, y], weight=(0.0, 2.0), axis=axis), y)


@pytest.mark.parametrize("axis", ["none", "out", "in"])
@pytest.mark.parametrize("with_base", [True, False])
def test_two_equal_experts_give_that_expert(axis: str, with_base: bool) -> None:
    base, (x,) = oracle.checkpoints(600, experts=1)
    base, x = base.reshape(20, 30), x.reshape(20, 30)
    origin = base if with_base else None
    merged = merge("nuslerp", origin, [x, x], weight=(0.37, 0.63), axis=axis)
    assert torch.equal(merged.bfloat16(), x)


@pytest.mark.parametrize("axis", ["none", "out", "in"])
def test_where_vectors_are_opposite_interpolation_is_linear(axis: str) -> None:
    _, x, _ = pair(20, 30)
    merged = merge("nuslerp", None, [x, -0.7 * x], weight=(0.25, 0.75), axis=axis)
    torch.testing.assert_close(merged, (0.25 - 0.75 * 0.7) * x, rtol=1e-12, atol=0)


def test_a_row_that_one_expert_left_alone_counts_as_orthogonal() -> None:
    base, x, y = pair(3, 8)
    x[1] = base[1]
    y[2], x[2] = base[2], base[2]
    merged = merge("nuslerp", base, [x, y], weight=1.0, axis="out")
    torch.testing.assert_close(merged[1], base[1] + 0.5**0.5 * (y[1] - base[1]))
    assert torch.equal(merged[2], base[2])


def test_negative_weights_extrapolate() -> None:
    _, x, y = pair(400)
    merged = merge("nuslerp", None, [x, y], weight=(1.5, -0.5))
    np.testing.assert_allclose(merged.numpy(), slerp(-0.5)([x.numpy(), y.numpy()]), rtol=1e-10)


def test_weights_that_add_up_to_nothing() -> None:
    _, x, y = pair(40)
    with pytest.raises(CandidateFailed, match=r"nuslerp: the weights 0\.5, -0\.5 add up to 0"):
        merge("nuslerp", None, [x, y], weight=(0.5, -0.5))
    half = merge("nuslerp", None, [x, y], weight=1.0, dialect="mergekit")
    assert torch.equal(merge("nuslerp", None, [x, y], weight=(0.5, -0.5), dialect="mergekit"), half)


def test_a_row_that_is_not_finite_stays_so() -> None:
    _, x, y = pair(3, 8)
    x[1, 2] = float("nan")
    merged = merge("nuslerp", None, [x, y], weight=1.0, axis="out")
    assert torch.isfinite(merged[[0, 2]]).all()
    assert torch.isnan(merged[1]).all()
    assert torch.isnan(merge("nuslerp", None, [x, y], weight=1.0)).all()


def test_a_layer_that_is_kept_transposed_is_cut_by_what_its_dimensions_mean() -> None:
    _, x, y = pair(6, 5)
    straight = merge("nuslerp", None, [x, y], weight=(0.3, 0.7), axis="out")
    turned = [x.T.contiguous(), y.T.contiguous()]
    merged = merge("nuslerp", None, turned, weight=(0.3, 0.7), axis="out", transposed=True)
    torch.testing.assert_close(merged.T, straight, rtol=1e-12, atol=0)


def test_mergekits_axes_are_those_of_the_file() -> None:
    _, x, y = pair(6, 5)
    values = {"weight": (0.3, 0.7), "nuslerp_flatten": False, "dialect": "mergekit"}
    as_stored = merge("nuslerp", None, [x, y], **values)
    assert torch.equal(merge("nuslerp", None, [x, y], transposed=True, **values), as_stored)
