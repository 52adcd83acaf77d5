"""What the methods of angles and norms share: vectors of a tensor, their inner products, their coefficients."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from evomerge.errors import CandidateFailed
from evomerge.methods.operands import Operands
from evomerge.methods.vectors import Layout, lengths, shares, vector_grams


@pytest.mark.parametrize(
    ("shape", "axis", "expected"),
    [
        ((4, 6), "none", Layout("none", 1, 24)),
        ((4, 6), "out", Layout("out", 4, 6)),
        ((4, 6), "in", Layout("in", 4, 6)),
        ((2, 3, 5), "out", Layout("out", 6, 5)),
        ((2, 3, 5), "in", Layout("in", 2, 15)),
        ((7,), "out", Layout("none", 1, 7)),
        ((), "in", Layout("none", 1, 1)),
    ],
)
def test_a_tensor_is_cut_along_its_last_or_its_first_dimension(shape, axis, expected) -> None:
    assert Layout.of(shape, axis) == expected


@pytest.mark.parametrize("shape", [(5, 9), (600, 700), (3, 200_000), (1, 1), (40_000, 7)])
@pytest.mark.parametrize("axis", ["out", "in"])
def test_inner_products_of_rows_and_columns(shape: tuple[int, int], axis: str) -> None:
    generator = torch.Generator().manual_seed(0)
    base, x, y = (torch.randn(shape, generator=generator) for _ in range(3))
    layout = Layout.of(shape, axis)
    inputs = vector_grams(Operands(None, [x, y]), "inputs", layout)
    deltas = vector_grams(Operands(base, [x, y]), "deltas", layout)
    dim = 1 if axis == "out" else 0
    assert inputs.shape == (layout.vectors, 2, 2)
    a, b, o = x.double().numpy(), y.double().numpy(), base.double().numpy()
    np.testing.assert_allclose(inputs[:, 0, 0], (a * a).sum(dim), rtol=1e-12)
    np.testing.assert_allclose(inputs[:, 0, 1], (a * b).sum(dim), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(deltas[:, 1, 0], ((a - o) * (b - o)).sum(dim), rtol=1e-9, atol=1e-9)
    assert (inputs[:, 0, 1] == inputs[:, 1, 0]).all()


@pytest.mark.parametrize("axis", ["out", "in"])
def test_every_element_gets_the_value_of_its_vector(axis: str) -> None:
    layout = Layout.of((5, 7), axis)
    values = torch.arange(layout.vectors, dtype=torch.float64)
    expected = (values[:, None] if axis == "out" else values).expand(5, 7).reshape(-1)
    for start in range(35):
        for stop in range(start + 1, 36):
            out = torch.empty(stop - start)
            assert torch.equal(layout.spread(values, start, out).double(), expected[start:stop])


def test_a_vector_far_shorter_than_the_longest_has_no_direction() -> None:
    products = np.zeros((1, 3, 3))
    products[0, np.arange(3), np.arange(3)] = [4.0, 4e-18, 0.0]
    norms, inverse = lengths(products)
    np.testing.assert_allclose(norms, [[2.0, 2e-9, 0.0]])
    np.testing.assert_array_equal(inverse, [[0.5, 0.0, 0.0]])


def test_shares_add_up_to_one() -> None:
    np.testing.assert_allclose(shares("m", (1.0, 3.0, -2.0)), [0.5, 1.5, -1.0])
    with pytest.raises(CandidateFailed, match="m: the weights 1, -1 add up to 0 and cannot be normalized"):
        shares("m", (1.0, -1.0))
