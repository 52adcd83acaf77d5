"""breadcrumbs and breadcrumbs_ties: neither the smallest entries nor the outliers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.methods import oracle
from tests.methods.oracle import merge

UP_TO_TEN = torch.arange(1.0, 11.0)


@pytest.mark.parametrize("dialect", ["paper", "mergekit"])
@pytest.mark.parametrize(
    ("density", "gamma", "kept"),
    [
        (0.5, 0.2, range(4, 9)),
        (0.5, 0.0, range(6, 11)),
        (0.5, 0.6, range(1, 6)),
        (0.5, 0.01, range(6, 11)),
        (1.0, 0.2, range(1, 11)),
        (0.0, 0.2, ()),
        (0.05, 0.0, ()),
    ],
)
def test_which_of_ten_entries_are_kept(dialect: str, density: float, gamma: float, kept: range) -> None:
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    delta = UP_TO_TEN[order] * torch.tensor([1.0, -1.0]).repeat(5)
    merged = merge(
        "breadcrumbs", torch.zeros(10), [delta], weight=1.0, density=density, gamma=gamma, dialect=dialect
    )
    assert sorted(merged[merged != 0].abs().tolist()) == [float(x) for x in kept]


def test_paper_ranks_within_rows_and_mergekit_within_the_tensor() -> None:
    delta = torch.stack([UP_TO_TEN, 100 * UP_TO_TEN])
    values = {"weight": 1.0, "density": 0.5, "gamma": 0.2}
    by_row = merge("breadcrumbs", torch.zeros(2, 10), [delta], **values)
    assert by_row[0].nonzero().flatten().tolist() == [3, 4, 5, 6, 7]
    assert torch.equal(by_row[1], 100 * by_row[0])
    whole = merge("breadcrumbs", torch.zeros(2, 10), [delta], dialect="mergekit", **values)
    assert whole[0].nonzero().flatten().tolist() == [6, 7, 8, 9]
    assert whole[1].nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 5]


def test_entries_equal_to_a_bound_are_all_kept() -> None:
    delta = torch.tensor([1.0, 2.0, 2.0, -2.0, 3.0, 4.0, 4.0, 5.0])
    for dialect in ("paper", "mergekit"):
        merged = merge(
            "breadcrumbs", torch.zeros(8), [delta], weight=1.0, density=0.5, gamma=0.25, dialect=dialect
        )
        assert merged.tolist() == [0, 2, 2, -2, 3, 4, 4, 0]


@pytest.mark.parametrize("dialect", ["paper", "mergekit"])
@pytest.mark.parametrize("density", [0.2, 0.85])
def test_agrees_with_the_formula(dialect: str, density: float) -> None:
    base, experts = (x for x in oracle.checkpoints(6000, dtype=torch.float64))
    shaped = [x.reshape(40, 150) for x in (base, *experts)]
    weights, densities, gammas = (0.5, -0.3, 0.8), (density, 0.4, 1.0), (0.1, 0.03, 0.2)
    values = {"weight": weights, "density": densities, "gamma": gammas, "lambda_": 0.7}
    merged = merge("breadcrumbs", shaped[0], shaped[1:], dialect=dialect, **values)
    elected = merge("breadcrumbs_ties", shaped[0], shaped[1:], dialect=dialect, **values)
    sparse = []
    for x, d, g in zip(shaped[1:], densities, gammas, strict=True):
        delta = (x - shaped[0]).numpy()
        rows = delta if dialect == "paper" else delta.reshape(1, -1)
        sparse.append(np.concatenate([oracle.crumbs(row, d, g) for row in rows]))
    expected = base.numpy() + 0.7 * sum(w * s for w, s in zip(weights, sparse, strict=True))
    np.testing.assert_allclose(merged.numpy().reshape(-1), expected, rtol=1e-11, atol=1e-15)
    rule = ("sum", "mean", "majority") if dialect == "paper" else ("sum", "sum", "positive")
    expected = base.numpy() + 0.7 * oracle.disjoint_merge(sparse, weights, *rule)
    np.testing.assert_allclose(elected.numpy().reshape(-1), expected, rtol=1e-11, atol=1e-15)


def test_rescale_restores_the_sum_of_magnitudes() -> None:
    base, (expert,) = oracle.checkpoints(3000, experts=1, dtype=torch.float64)
    values = {"weight": 1.0, "density": 0.3, "rescale": True}
    merged = merge("breadcrumbs", base, [expert], dialect="mergekit", **values)
    assert (merged - base).count_nonzero() == 900
    assert (merged - base).abs().sum().item() == pytest.approx((expert - base).abs().sum().item(), rel=1e-12)


@pytest.mark.parametrize("dialect", ["paper", "mergekit"])
def test_experts_without_a_change_give_the_base(dialect: str) -> None:
    base, _ = oracle.checkpoints(60)
    shaped = base.reshape(6, 10)
    for method in ("breadcrumbs", "breadcrumbs_ties"):
        merged = merge(method, shaped, [shaped.clone()] * 2, weight=0.5, dialect=dialect)
        assert torch.equal(merged.bfloat16(), shaped)
