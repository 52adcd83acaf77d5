"""Exact order statistics of streamed values."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.methods.norms import totals
from evomerge.methods.selection import ascending


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_agrees_with_a_sort(dtype: torch.dtype) -> None:
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(0), dtype=dtype).abs()
    values[::7] = values[3]
    places = [0, 1, 2500, 5000, 9998, 9999]
    found = ascending(lambda: values.split(999), places)
    assert found == values.sort().values[places].tolist()


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.sampled_from([0.0, 1e-45, 1e-38, 0.5, 1.0, 1.0000001, 3e38, float("inf")]), min_size=1, max_size=9
    )
)
def test_agrees_with_a_sort_at_the_edges_of_the_format(numbers: list[float]) -> None:
    values = torch.tensor(numbers)
    found = ascending(lambda: values.split(2), range(len(numbers)))
    assert found == sorted(values.tolist())


@pytest.mark.parametrize("n", [1, 1000, (1 << 15) + 1, 300_000])
def test_totals_are_exact_to_float64_and_free_of_chunking(n: int) -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.rand(n, generator=generator) for _ in range(2))
    whole = totals([[one, other]], 2)
    assert whole == pytest.approx([float(np.sum(x.double().numpy())) for x in (one, other)], rel=1e-13)
    for size in (1 << 15, 3 << 15):
        assert totals(zip(one.split(size), other.split(size), strict=True), 2) == whole
