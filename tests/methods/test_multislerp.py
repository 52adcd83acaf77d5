"""multislerp: the mean direction at the mean norm."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from evomerge.errors import CandidateFailed
from tests.methods import oracle
from tests.methods.oracle import merge


def experts(count: int = 3, n: int = 500) -> tuple[torch.Tensor, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(n, dtype=torch.float64, generator=generator)
    return base, [
        base + (0.2 + k) * torch.randn(n, dtype=torch.float64, generator=generator) for k in range(count)
    ]


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.2, 0.5, 0.9), (1.2, -0.3, 0.4)])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("with_base", [True, False])
def test_is_normalised_linear_interpolation(
    weights: tuple[float, ...], normalize: bool, with_base: bool
) -> None:
    base, inputs = experts()
    origin = base.numpy() if with_base else np.zeros(500)
    vectors = [x - origin for x in oracle.doubles(*inputs)]
    merged = merge(
        "multislerp", base if with_base else None, inputs, weight=weights, normalize_weights=normalize
    )
    expected = origin + oracle.multislerp(vectors, weights, normalize)
    np.testing.assert_allclose(merged.numpy(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("with_base", [True, False])
def test_mergekit_gives_the_same(count: int, normalize: bool, with_base: bool) -> None:
    peer = pytest.importorskip("mergekit.merge_methods.api").merge_tensors
    base, inputs = experts(count)
    weights = [0.4, 0.8, 0.3][:count] if count > 1 else [1.0]
    theirs = peer(
        [base, *inputs] if with_base else inputs,
        "multislerp",
        parameters={"weight": weights, "normalize_weights": normalize},
        base_index=0 if with_base else None,
    )
    ours = merge(
        "multislerp",
        base if with_base else None,
        inputs,
        weight=tuple(weights),
        normalize_weights=normalize,
        dialect="mergekit",
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("with_base", [True, False])
def test_equal_experts_give_that_expert(with_base: bool) -> None:
    base, (x,) = oracle.checkpoints(3000, experts=1)
    merged = merge("multislerp", base if with_base else None, [x] * 3, weight=(0.2, 0.7, 0.4))
    assert torch.equal(merged.bfloat16(), x)


def test_one_expert_is_copied_bit_for_bit() -> None:
    base, (x,) = oracle.checkpoints(3000, experts=1, dtype=torch.float32)
    assert torch.equal(merge("multislerp", base, [x], weight=0.3), x)


@pytest.mark.parametrize("count", [2, 4])
def test_where_directions_cancel_out_the_weighted_sum_is_taken(count: int) -> None:
    _, (x, y) = experts(2)
    inputs = [x, -0.7 * x, y, -3 * y][:count]
    merged = merge("multislerp", None, inputs, weight=1.0)
    torch.testing.assert_close(merged, sum(inputs) / count, rtol=1e-12, atol=1e-14)


def test_what_no_expert_changed_stays_the_base_bit_for_bit() -> None:
    base, _ = oracle.checkpoints(300)
    merged = merge("multislerp", base, [base, base, base], weight=(0.2, 0.5, 0.3))
    assert torch.equal(merged.bfloat16(), base)


def test_an_unchanged_expert_has_a_norm_and_no_direction() -> None:
    base, (x,) = experts(1)
    merged = merge("multislerp", base, [x, base], weight=1.0)
    torch.testing.assert_close(merged, base + (x - base) / 2, rtol=1e-12, atol=1e-14)


def test_the_order_of_the_experts_does_not_matter() -> None:
    base, inputs = experts()
    one = merge("multislerp", base, inputs, weight=(0.2, 0.3, 0.5))
    other = merge("multislerp", base, inputs[::-1], weight=(0.5, 0.3, 0.2))
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_weights_that_add_up_to_nothing_fail_the_candidate() -> None:
    _, inputs = experts()
    with pytest.raises(CandidateFailed, match="multislerp: the weights 1, 1, -2 add up to 0"):
        merge("multislerp", None, inputs, weight=(1.0, 1.0, -2.0))


def test_a_non_finite_input_gives_a_non_finite_result() -> None:
    _, inputs = experts(2)
    inputs[0][0] = float("nan")
    assert torch.isnan(merge("multislerp", None, inputs, weight=1.0)).all()
