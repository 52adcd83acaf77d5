"""sce: select by variance, weigh by energy, erase the minority."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.methods import oracle
from tests.methods.oracle import merge

ZERO = torch.zeros(4, dtype=torch.float64)


def deltas(*rows: list[float]) -> list[torch.Tensor]:
    return [torch.tensor(row, dtype=torch.float64) for row in rows]


@pytest.mark.parametrize("dialect", ["paper", "mergekit"])
def test_golden_value_of_the_whole_selection(dialect: str) -> None:
    experts = deltas([1, 2, -1, 0], [1, -1, -3, 0])
    merged = merge("sce", ZERO, experts, select_topk=1.0, dialect=dialect)
    assert merged.tolist() == pytest.approx([1, 2, -39 / 17, 0], abs=1e-12)


def test_golden_values_of_half_the_selection() -> None:
    experts = deltas([1, 2, -1, 0.5], [1, -1, -3, 0.5])
    merged = merge("sce", ZERO, experts, select_topk=0.5, dialect="mergekit")
    assert merged.tolist() == pytest.approx([0, 2, 0, 0], abs=1e-12)
    merged = merge("sce", ZERO, experts, select_topk=0.5)
    assert merged.tolist() == pytest.approx([1, 2, -1.4, 0.5], abs=1e-12)


@pytest.mark.parametrize("dialect", ["paper", "mergekit"])
@pytest.mark.parametrize("topk", [0.03, 0.5, 1.0])
def test_agrees_with_the_formula(dialect: str, topk: float) -> None:
    base, experts = oracle.checkpoints(20_000, dtype=torch.float64)
    experts[1] = base + 3 * (experts[1] - base)
    origin, *others = oracle.doubles(base, *experts)
    merged = merge("sce", base, experts, select_topk=topk, dialect=dialect)
    expected = origin + oracle.sce([x - origin for x in others], topk, dialect == "mergekit")
    np.testing.assert_allclose(merged.numpy(), expected, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_the_weights_do_not_depend_on_the_scale_of_the_changes(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    changes = [s * torch.randn(500, generator=generator) for s in (1, 2, 3)]
    one = merge("sce", torch.zeros(500), changes, select_topk=0.3)
    other = merge("sce", torch.zeros(500), [scale * c for c in changes], select_topk=0.3)
    torch.testing.assert_close(other / scale, one, rtol=1e-5, atol=0)


def test_identical_experts_give_that_expert() -> None:
    base, (expert,) = oracle.checkpoints(500, experts=1)
    for dialect in ("paper", "mergekit"):
        merged = merge("sce", base, [expert] * 3, select_topk=1.0, dialect=dialect)
        assert torch.equal(merged.bfloat16(), expert)


def test_nothing_selected() -> None:
    base, experts = oracle.checkpoints(50)
    merged = merge("sce", base, experts, select_topk=0.0, dialect="mergekit")
    assert torch.equal(merged.bfloat16(), base)
    origin, *others = oracle.doubles(base, *experts)
    equal = origin + oracle.sce([x - origin for x in others], 0.0, False)
    merged = merge("sce", base, experts, select_topk=0.0)
    np.testing.assert_allclose(merged.double().numpy(), equal, rtol=1e-6, atol=1e-8)


def test_all_elements_of_equal_variance_are_selected() -> None:
    experts = deltas([1, 2, 4, 8], [3, 4, 6, 8])
    merged = merge("sce", ZERO, experts, select_topk=0.4, dialect="mergekit")
    assert (merged != 0).tolist() == [True, True, True, False]
