"""ties: trim, elect, disjoint mean."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.methods import TensorCache
from tests.methods import oracle
from tests.methods.oracle import merge

ZERO = torch.zeros(4, dtype=torch.float64)
EXPERTS = [torch.tensor(delta, dtype=torch.float64) for delta in oracle.CONFLICT]


def test_golden_value_with_the_authors_rule_for_equal_masses() -> None:
    merged = merge("ties", ZERO, EXPERTS, density=1.0)
    assert merged.tolist() == pytest.approx([-1, -2, -4, -0.3], abs=1e-12)


@pytest.mark.parametrize(
    ("merge_", "expected"),
    [("mean", [-1, -2, -4, -0.3]), ("sum", [-1, -2, -4, -0.6]), ("max", [-1, -2, -4, -0.5])],
)
def test_golden_values_of_the_disjoint_merges(merge_: str, expected: list[float]) -> None:
    merged = oracle.merge("ties", ZERO, EXPERTS, density=1.0, merge_=merge_)
    assert merged.tolist() == pytest.approx(expected, abs=1e-12)


def test_golden_value_of_the_election_by_largest_magnitude() -> None:
    merged = merge("ties", ZERO, EXPERTS, density=1.0, elect="max")
    assert merged.tolist() == pytest.approx([1, -2, -4, 0.5], abs=1e-12)


def test_golden_values_of_the_mergekit_dialect() -> None:
    merged = merge("ties", ZERO, EXPERTS, weight=1.0, dialect="mergekit")
    assert merged.tolist() == pytest.approx([1, 2, 2, -0.3], abs=1e-12)
    merged = merge("ties", ZERO, EXPERTS, weight=(1.0, 2.0, 1.0), dialect="mergekit")
    assert merged.tolist() == pytest.approx([-1, 2, 5 / 3, -0.55 / 1.5], abs=1e-12)


def test_an_election_by_count_goes_by_the_number_of_signs() -> None:
    experts = [torch.tensor(v) for v in ([9.0, -1.0, 2.0], [-1.0, -1.0, -3.0], [-1.0, 5.0, -1.0])]
    assert merge("ties", torch.zeros(3), experts, density=1.0, elect="count").tolist() == [-1, -1, -2]
    assert merge("ties", torch.zeros(3), experts, density=1.0).tolist() == [9, 5, -2]


def test_the_mirror_image_has_a_positive_majority() -> None:
    merged = merge("ties", ZERO, [-x for x in EXPERTS], density=1.0)
    assert merged.tolist() == pytest.approx([1, 2, 4, 0.3], abs=1e-12)


def test_without_a_majority_equal_masses_leave_the_base() -> None:
    base = torch.full((4,), 7.0)
    experts = [base + torch.tensor(v) for v in ([1.0, -2.0, 3.0, -5.0], [-1.0, 2.0, 0.0, 0.0])]
    assert merge("ties", base, experts, density=1.0).tolist() == [7, 7, 10, 2]


def test_the_majority_is_that_of_the_whole_tensor_not_of_a_chunk() -> None:
    x, y = torch.full((3000,), -1.0), torch.zeros(3000)
    x[0], y[0] = 5.0, -5.0
    x[1:1000] = 2.0
    merged = merge("ties", torch.zeros(3000), [x, y], density=1.0, chunk=1000)
    assert merged[0] == -5


@pytest.mark.parametrize(
    ("n", "density", "survivors"), [(5, 0.2, 1), (20, 0.2, 4), (1000, 0.2, 200), (100, 0.29, 29)]
)
def test_trim_keeps_the_floor_of_density_times_n(n: int, density: float, survivors: int) -> None:
    delta = torch.randperm(n, generator=torch.Generator().manual_seed(0)).double() + 1
    merged = merge("ties", torch.zeros(n), [delta], density=density)
    assert merged.count_nonzero() == survivors
    assert set(merged[merged != 0].tolist()) == set(range(n - survivors + 1, n + 1))


def test_trim_keeps_all_entries_that_tie_at_the_threshold() -> None:
    delta = torch.tensor([1.0, -2.0, 2.0, 2.0, -3.0])
    assert merge("ties", torch.zeros(5), [delta], density=0.4).tolist() == [0, -2, 2, 2, -3]


def test_trim_keeps_at_least_the_largest_entry() -> None:
    delta = torch.tensor([1.0, -2.0, 0.5])
    for cache in (None, TensorCache()):
        merged = merge("ties", torch.zeros(3), [delta], density=0.0, cache=cache, key="k")
        assert merged.tolist() == [0, -2, 0]


def test_every_expert_has_its_own_density() -> None:
    deltas = [torch.tensor([4.0, 3.0, 2.0, 1.0]), torch.tensor([10.0, 20.0, 30.0, 40.0])]
    merged = merge("ties", torch.zeros(4), deltas, density=(0.25, 0.5))
    assert merged.tolist() == [4, 0, 30, 40]


def test_weights_enter_before_the_election_and_not_the_divisor() -> None:
    merged = merge("ties", ZERO, EXPERTS, density=1.0, weight=(1.0, 2.0, 1.0))
    assert merged.tolist() == pytest.approx([-2, 4, 2.5, -0.55], abs=1e-12)


def test_a_weight_of_zero_takes_the_expert_out() -> None:
    base, experts = oracle.checkpoints(3000)
    without = merge("ties", base, experts[:2], density=0.5, weight=(0.7, 0.4))
    assert torch.equal(merge("ties", base, experts, density=0.5, weight=(0.7, 0.4, 0.0)), without)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("values", [{"lambda_": 0.0}, {"weight": (0.0, 0.0)}])
def test_nothing_added_leaves_the_base_bit_for_bit(dtype: torch.dtype, values: dict[str, object]) -> None:
    base, experts = oracle.checkpoints(1000, experts=2, dtype=dtype)
    base[0] = -0.0
    merged = merge("ties", base, experts, **values).to(dtype)
    assert torch.equal(merged, base)
    assert torch.signbit(merged[0])


def test_identical_experts_give_that_expert_whatever_their_number() -> None:
    base, (expert,) = oracle.checkpoints(5000, experts=1)
    assert torch.equal(merge("ties", base, [expert] * 5, density=1.0).bfloat16(), expert)


@settings(max_examples=60, deadline=None)
@given(
    deltas=st.lists(st.lists(st.integers(-4, 4), min_size=6, max_size=6), min_size=1, max_size=5),
    density=st.floats(0, 1),
    scale=st.sampled_from([1.0, 0.7, -1.5]),
)
def test_agrees_with_the_formula_in_the_presence_of_ties(
    deltas: list[list[int]], density: float, scale: float
) -> None:
    arrays = [np.array(delta, dtype=float) for delta in deltas]
    experts = [torch.from_numpy(array) for array in arrays]
    weights = [1.0, -1.0, 2.0, 0.5, 0.25][: len(arrays)]
    merged = merge("ties", torch.zeros(6), experts, density=density, weight=tuple(weights), lambda_=scale)
    expected = scale * oracle.disjoint_merge([oracle.trim(array, density) for array in arrays], weights)
    np.testing.assert_allclose(merged.numpy(), expected, rtol=1e-12, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    deltas=st.lists(st.lists(st.integers(-4, 4), min_size=6, max_size=6), min_size=1, max_size=5),
    elect=st.sampled_from(["sum", "count", "max"]),
    merge_=st.sampled_from(["mean", "sum", "max"]),
)
def test_every_election_and_merge_agrees_with_the_formula(
    deltas: list[list[int]], elect: str, merge_: str
) -> None:
    arrays = [np.array(delta, dtype=float) for delta in deltas]
    weights = [1.0, -1.0, 2.0, 0.5, 0.25][: len(arrays)]
    experts = [torch.from_numpy(array) for array in arrays]
    merged = merge(
        "ties", torch.zeros(6), experts, density=1.0, weight=tuple(weights), elect=elect, merge_=merge_
    )
    expected = oracle.disjoint_merge(arrays, weights, elect, merge_)
    np.testing.assert_allclose(merged.numpy(), expected, rtol=1e-12, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    deltas=st.lists(st.lists(st.integers(-4, 4), min_size=6, max_size=6), min_size=1, max_size=5),
    density=st.floats(0.01, 1),
    normalize=st.booleans(),
)
def test_the_mergekit_dialect_agrees_with_the_formula(
    deltas: list[list[int]], density: float, normalize: bool
) -> None:
    arrays = [np.array(delta, dtype=float) for delta in deltas]
    weights = [1.0, -1.0, 2.0, 0.5, 0.25][: len(arrays)]
    experts = [torch.from_numpy(array) for array in arrays]
    merged = merge(
        "ties",
        torch.zeros(6),
        experts,
        density=density,
        weight=tuple(weights),
        normalize=normalize,
        dialect="mergekit",
    )
    expected = oracle.disjoint_merge(
        [oracle.trim(a, density) for a in arrays],
        weights,
        "sum",
        "weighted" if normalize else "sum",
        "positive",
    )
    np.testing.assert_allclose(merged.numpy(), expected, rtol=1e-12, atol=1e-12)


def test_density_zero_keeps_nothing_in_the_mergekit_dialect() -> None:
    base, experts = oracle.checkpoints(100)
    merged = merge("ties", base, experts, weight=1.0, density=0.0, dialect="mergekit")
    assert torch.equal(merged.bfloat16(), base)


def test_rescale_restores_the_sum_of_magnitudes() -> None:
    base, (expert,) = oracle.checkpoints(3000, experts=1, dtype=torch.float64)
    merged = merge("ties", base, [expert], weight=1.0, density=0.3, rescale=True, dialect="mergekit")
    assert (merged - base).abs().sum().item() == pytest.approx((expert - base).abs().sum().item(), rel=1e-12)
    kept = (merged - base).count_nonzero().item()
    assert kept == 900


@pytest.mark.parametrize("density", [0.05, 0.2, 0.77, 1.0])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.3, -0.2, 1.1)])
def test_agrees_with_the_formula_on_checkpoints(density: float, weights: tuple[float, ...]) -> None:
    base, experts = oracle.checkpoints(300_000, dtype=torch.float64)
    origin, *others = oracle.doubles(base, *experts)
    trimmed = [oracle.trim(x - origin, density) for x in others]
    merged = merge("ties", base, experts, density=density, weight=weights, lambda_=0.9)
    np.testing.assert_allclose(
        merged.numpy(), origin + 0.9 * oracle.disjoint_merge(trimmed, weights), rtol=1e-11, atol=1e-15
    )


@pytest.mark.parametrize("factor", [0.5, 4.0])
def test_scaling_the_task_vectors_scales_the_merged_one(factor: float) -> None:
    generator = torch.Generator().manual_seed(3)
    deltas = [torch.randn(5000, generator=generator) for _ in range(3)]
    one = merge("ties", torch.zeros(5000), deltas, density=0.3)
    assert torch.equal(
        merge("ties", torch.zeros(5000), [factor * d for d in deltas], density=0.3), factor * one
    )


def test_the_order_of_the_experts_does_not_matter() -> None:
    base, experts = oracle.checkpoints(20_000)
    one = merge("ties", base, experts, weight=(0.2, 0.3, 0.5), density=0.4)
    other = merge("ties", base, experts[::-1], weight=(0.5, 0.3, 0.2), density=0.4)
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


def test_unchanged_parameters_neither_vote_nor_count() -> None:
    experts = [torch.tensor([6.0, 0.0]), torch.tensor([0.0, 0.0]), torch.tensor([0.0, -1.0])]
    assert merge("ties", torch.zeros(2), experts, density=1.0).tolist() == [6, -1]


def test_a_non_finite_expert_does_not_pass_unnoticed() -> None:
    experts = [torch.tensor([1.0, math.nan, 2.0]), torch.tensor([1.0, 1.0, 1.0])]
    for elect in ("sum", "count", "max"):
        for how in ("mean", "sum", "max"):
            for order in (experts, experts[::-1]):
                values = {"elect": elect, "merge_": how}
                assert merge("ties", torch.zeros(3), order, density=1.0, **values)[1].isnan()
