"""model_stock: from the base towards the average, as far as the task vectors agree."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.methods import oracle
from tests.methods.oracle import merge

ZERO = torch.zeros(2, dtype=torch.float64)


def at(degrees: float) -> torch.Tensor:
    angle = np.radians(degrees)
    return torch.tensor([np.cos(angle), np.sin(angle)])


def related(*shape: int, count: int = 3) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Experts whose task vectors have a part in common."""
    generator = torch.Generator().manual_seed(0)
    base, common = (torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(2))
    return base, [
        base + 0.3 * common + 0.4 * torch.randn(shape, dtype=torch.float64, generator=generator)
        for _ in range(count)
    ]


def test_golden_values() -> None:
    merged = merge("model_stock", ZERO, [at(0), at(60)])
    assert merged.tolist() == pytest.approx([0.5, 0.288675], abs=1e-6)
    unclamped = merge("model_stock", ZERO, [at(0), at(120)], clamp=False)
    assert unclamped.tolist() == pytest.approx([-0.5, -0.866025], abs=1e-6)


def test_task_vectors_that_oppose_each_other_leave_the_base() -> None:
    base, _ = related(2)
    for degrees in (120, 180):
        merged = merge("model_stock", base, [base + at(0), base + at(degrees)])
        assert torch.equal(merged, base)


@pytest.mark.parametrize("filter_wise", [False, True])
@pytest.mark.parametrize("shape", [(30, 40), (3, 4, 50), (60,)])
@pytest.mark.parametrize("count", [2, 4])
def test_follows_the_formula(filter_wise: bool, shape: tuple[int, ...], count: int) -> None:
    base, experts = related(*shape, count=count)
    merged = merge("model_stock", base, experts, filter_wise=filter_wise, chunk=97)
    expected = oracle.along(
        [base.numpy(), *(x.numpy() for x in experts)],
        "out" if filter_wise else "none",
        lambda vectors: oracle.model_stock(vectors[0], vectors[1:]),
    )
    np.testing.assert_allclose(merged.numpy(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("filter_wise", [False, True])
@pytest.mark.parametrize("shape", [(30, 40), (60,)])
def test_mergekit_gives_the_same_where_task_vectors_agree(filter_wise: bool, shape: tuple[int, ...]) -> None:
    peer = pytest.importorskip("mergekit.merge_methods.api").merge_tensors
    base, experts = related(*shape)
    theirs = peer([base, *experts], "model_stock", parameters={"filter_wise": filter_wise}, base_index=0)
    ours = merge("model_stock", base, experts, filter_wise=filter_wise, dialect="mergekit")
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_unclamped_mergekit_gives_the_same_where_they_do_not() -> None:
    peer = pytest.importorskip("mergekit.merge_methods.api").merge_tensors
    base, _ = related(2)
    experts = [base + at(0), base + at(100)]
    theirs = peer([base, *experts], "model_stock", base_index=0)
    torch.testing.assert_close(merge("model_stock", base, experts, clamp=False), theirs)
    assert torch.equal(merge("model_stock", base, experts, dialect="mergekit"), base)


def test_experts_that_balance_each_other_leave_the_base_even_unclamped() -> None:
    base, _ = related(2)
    merged = merge("model_stock", base, [base + at(d) for d in (0, 120, 240)], clamp=False)
    torch.testing.assert_close(merged, base)


@pytest.mark.parametrize("filter_wise", [False, True])
def test_equal_experts_give_that_expert(filter_wise: bool) -> None:
    base, (x,) = oracle.checkpoints(600, experts=1)
    base, x = base.reshape(20, 30), x.reshape(20, 30)
    assert torch.equal(merge("model_stock", base, [x] * 3, filter_wise=filter_wise).bfloat16(), x)


def test_an_unchanged_expert_agrees_with_none() -> None:
    base, (x, y) = related(50, count=2)
    assert torch.equal(merge("model_stock", base, [x, base]), base)
    merged = merge("model_stock", base, [x, y, base])
    cosine = torch.nn.functional.cosine_similarity(x - base, y - base, dim=0) / 3
    t = 3 * cosine / (1 + 2 * cosine)
    torch.testing.assert_close(merged, base + t * ((x + y + base) / 3 - base))


def test_tiny_task_vectors_have_angles_too() -> None:
    base, experts = related(50)
    small = [base + 1e-6 * (x - base) for x in experts]
    merged = merge("model_stock", base, small)
    expected = 1e-6 * (merge("model_stock", base, experts) - base)
    torch.testing.assert_close(merged - base, expected, rtol=1e-6, atol=1e-14)


def test_one_expert_is_not_enough() -> None:
    base, (x,) = related(5, count=1)
    with pytest.raises(ValueError, match="model_stock takes at least 2 inputs, here are 1"):
        merge("model_stock", base, [x])


def test_a_non_finite_input_gives_a_non_finite_result() -> None:
    base, experts = related(4, 3, count=2)
    experts[0][1, 1] = float("nan")
    assert torch.isnan(merge("model_stock", base, experts)).all()
    merged = merge("model_stock", base, experts, filter_wise=True)
    assert torch.isnan(merged[1]).all()
    assert torch.isfinite(merged[[0, 2, 3]]).all()
