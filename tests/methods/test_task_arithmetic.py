"""task_arithmetic: the base plus weighted task vectors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.methods import oracle
from tests.methods.oracle import merge


def test_golden_value_of_conflicting_task_vectors() -> None:
    experts = [torch.tensor(delta, dtype=torch.float64) for delta in oracle.CONFLICT]
    merged = merge("task_arithmetic", torch.zeros(4), experts, weight=0.3)
    assert merged.tolist() == pytest.approx([0, 0, 0, -0.03], abs=1e-12)


def test_an_analogy_is_a_sum_of_signed_task_vectors() -> None:
    c, b, a = (torch.tensor(v) for v in ([1.0, 0.0, 1.0], [0.0, 2.0, 0.0], [0.0, 0.0, 1.0]))
    merged = merge("task_arithmetic", torch.zeros(3), [c, b, a], weight=(1.0, 1.0, -1.0))
    assert merged.tolist() == [1, 2, 0]


@pytest.mark.parametrize(("weights", "scale"), [((0.4, 0.4, 0.4), 1.0), ((-0.2, 1.2, 0.3), 0.7)])
def test_adds_the_weighted_task_vectors(weights: tuple[float, ...], scale: float) -> None:
    base, experts = oracle.checkpoints(5000, dtype=torch.float64)
    merged = merge("task_arithmetic", base, experts, weight=weights, lambda_=scale)
    origin, *others = oracle.doubles(base, *experts)
    expected = origin + scale * sum(w * (x - origin) for w, x in zip(weights, others, strict=True))
    np.testing.assert_allclose(merged.numpy(), expected, rtol=1e-11, atol=1e-16)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("values", [{"weight": (0.5, 0.5), "lambda_": 0.0}, {"weight": (0.0, 0.0)}])
def test_nothing_added_leaves_the_base_bit_for_bit(dtype: torch.dtype, values: dict[str, object]) -> None:
    base, experts = oracle.checkpoints(1000, experts=2, dtype=dtype)
    base[0] = -0.0
    merged = merge("task_arithmetic", base, experts, **values).to(dtype)
    assert torch.equal(merged, base)
    assert torch.signbit(merged[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("weights", "scale"), [((1.0,), 1.0), ((0.0, 1.0), 1.0), ((0.5,), 2.0)])
def test_one_task_vector_in_full_gives_the_expert_bit_for_bit(
    dtype: torch.dtype, weights: tuple[float, ...], scale: float
) -> None:
    base, experts = oracle.checkpoints(1000, experts=len(weights), dtype=dtype)
    assert torch.equal(
        merge("task_arithmetic", base, experts, weight=weights, lambda_=scale).to(dtype), experts[-1]
    )


def test_bfloat16_deltas_are_exact_in_float32() -> None:
    base, (expert,) = oracle.checkpoints(20_000, experts=1)
    merged = merge("task_arithmetic", base, [expert, base.clone()], weight=(1.0, 0.5))
    assert torch.equal(merged.bfloat16(), expert)


def test_identical_experts_with_weights_of_sum_one_give_that_expert() -> None:
    base, (expert,) = oracle.checkpoints(5000, experts=1)
    merged = merge("task_arithmetic", base, [expert] * 4, weight=0.25)
    assert torch.equal(merged.bfloat16(), expert)


def test_the_order_of_the_experts_does_not_matter() -> None:
    base, experts = oracle.checkpoints(5000)
    one = merge("task_arithmetic", base, experts, weight=(0.2, 0.3, 0.5))
    other = merge("task_arithmetic", base, experts[::-1], weight=(0.5, 0.3, 0.2))
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)
