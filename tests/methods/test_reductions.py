"""Whole-tensor reductions: exact selection, inner products, and what is kept of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from evomerge.methods import TensorCache
from evomerge.methods.operands import Operands
from evomerge.methods.reductions import gram, list_magnitudes, order_statistics, select, select_near
from tests.methods import oracle
from tests.methods.oracle import merge


def skewed(n: int, dtype: torch.dtype) -> Operands:
    base, experts = oracle.checkpoints(n, experts=2, dtype=dtype)
    return Operands(base, experts)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 7, 300_000])
def test_every_way_of_selection_finds_the_same_element(dtype: torch.dtype, n: int) -> None:
    operands = skewed(n, dtype)
    deltas = (operands.inputs[1].double() - operands.base.double()).abs()  # type: ignore[union-attr]
    ordered = np.sort(deltas.numpy())[::-1]
    for rank in sorted({1, 2, n // 100, n // 5, n // 2, n - 1, n} & set(range(1, n + 1))):
        expected = ordered[rank - 1].astype(np.float64 if dtype == torch.float64 else np.float32)
        assert select(operands, 1, rank) == expected
        assert order_statistics(operands, [(1, rank)]) == [expected]
        assert select_near(operands, [(1, rank)])[0] in (expected, None)
        listed = list_magnitudes(operands, 1)
        assert listed is None or listed.largest(rank) == expected


def test_the_sample_is_right_about_ordinary_tensors() -> None:
    operands = skewed(300_000, torch.bfloat16)
    assert None not in select_near(operands, [(0, rank) for rank in (3000, 60_000, 150_000, 299_000)])


def test_a_tensor_that_the_sample_misjudges_is_selected_from_all_the_same() -> None:
    n = 1 << 18
    delta = torch.zeros(n // 4096, 4096)
    delta[:, 1024:] = torch.arange(1.0, 3072 * 64 + 1).reshape(64, 3072)
    operands = Operands(torch.zeros(n), [delta.reshape(-1)])
    assert select_near(operands, [(0, 1000)]) == [None]
    assert order_statistics(operands, [(0, 1000)]) == [3072 * 64 - 999]


def test_bfloat16_deltas_are_listed_and_float32_ones_are_not() -> None:
    assert list_magnitudes(skewed(600_000, torch.bfloat16), 0) is not None
    assert list_magnitudes(skewed(600_000, torch.float32), 0) is None


def test_equal_magnitudes_are_selected() -> None:
    operands = Operands(torch.zeros(100_000), [torch.full((100_000,), -2.5)])
    assert order_statistics(operands, [(0, 1), (0, 70_000)]) == [2.5, 2.5]


@pytest.mark.parametrize("n", [1, 5, 32_768, 150_001])
def test_inner_products_agree_with_numpy(n: int) -> None:
    base, experts = oracle.checkpoints(n)
    origin, a, b, c = oracle.doubles(base, *experts)
    for basis, vectors in {
        "inputs": [a, b, c],
        "deltas": [a - origin, b - origin, c - origin],
        "steps": [a, b - a, c - a],
    }.items():
        expected = np.stack(vectors) @ np.stack(vectors).T
        np.testing.assert_allclose(gram(Operands(base, experts), basis), expected, rtol=1e-10, atol=1e-10)  # type: ignore[arg-type]


def test_inner_products_have_the_bits_of_their_definition() -> None:
    x, y = (torch.randn(150_001, generator=torch.Generator().manual_seed(i)) for i in range(2))
    lanes = np.zeros(1 << 13)
    products = x.double().numpy() * y.double().numpy()
    for start in range(0, products.size, lanes.size):
        part = products[start : start + lanes.size]
        lanes[: part.size] += part
    while lanes.size > 1:
        lanes = lanes[: lanes.size // 2] + lanes[lanes.size // 2 :]
    assert gram(Operands(None, [x, y]), "inputs")[0, 1] == lanes[0]


def test_a_reduction_is_computed_once_for_all_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr("evomerge.methods.kernels.gram", lambda *a: calls.append(a) or gram(*a))
    _, experts = oracle.checkpoints(1000, experts=2)
    cache = TensorCache()
    for t in (0.1, 0.2, 0.3):
        merge("slerp", None, experts, t=t, cache=cache, key="one")
    merge("slerp", None, experts, t=0.1, cache=cache, key="two")
    assert len(calls) == 2


def test_the_cache_stays_within_its_limit_and_keeps_what_came_first() -> None:
    cache = TensorCache(limit=1000)
    first = cache.get("first", lambda: np.zeros(100))
    assert not cache.full
    cache.get("second", lambda: np.zeros(100))
    assert (cache.nbytes, cache.full, "second" in cache) == (800, True, False)
    assert cache.get("first", lambda: np.ones(100)) is first


def test_a_full_cache_changes_no_bits() -> None:
    base, experts = oracle.checkpoints(50_000, experts=2)
    cache = TensorCache(limit=0)
    for density in (0.1, 0.35):
        assert torch.equal(
            merge("ties", base, experts, density=density, cache=cache, key="k"),
            merge("ties", base, experts, density=density),
        )
