"""tsv_m, iso_c, iso_cts, knots and wudi: against decompositions in float64, and what all of them promise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.methods import MaskKey, TensorCache
from tests.methods import dense_oracle, oracle
from tests.methods.dense_oracle import Matrix
from tests.methods.oracle import merge

WEIGHTS = (1.0, 0.7, -0.4)
SHAPES = [(40, 24), (24, 40), (30, 30), (1, 50), (50, 1), (2, 6), (90, 200), (200, 90)]

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "tsv_m": ("tsv_m", {}),
    "tsv_m-all": ("tsv_m", {"rank": 3.0}),
    "iso_c": ("iso_c", {}),
    "iso_cts": ("iso_cts", {}),
    "iso_cts-3": ("iso_cts", {"common_space_fraction": 0.3}),
    "wudi-closed": ("wudi", {"solver": "closed_form"}),
    "wudi-ridge": ("wudi", {"solver": "closed_form", "ridge": 0.3}),
    "knots-ties": ("knots", {"density": 0.3}),
    "knots-linear": ("knots", {"inner": "task_arithmetic"}),
}
every_method = pytest.mark.parametrize("name", list(METHODS))


def experts(
    shape: tuple[int, int],
    count: int = 3,
    *,
    rank: int | None = None,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> tuple[torch.Tensor, list[torch.Tensor], list[Matrix]]:
    """Return a base, experts, and the exact task vectors, of low rank where one is given."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    base = (0.02 * draw(*shape)).to(dtype)
    deltas = [
        1e-3 * (draw(*shape) if rank is None else draw(shape[0], rank) @ draw(rank, shape[1]))
        for _ in range(count)
    ]
    inputs = [(base.double() + delta).to(dtype) for delta in deltas]
    return base, inputs, [delta.numpy() for delta in deltas]


def task_vector(name: str, base: torch.Tensor, inputs: Sequence[torch.Tensor], **values: Any) -> Matrix:
    method, own = METHODS[name]
    merged = merge(method, base, inputs, **{"weight": WEIGHTS[: len(inputs)], **own, **values})
    return (merged.double() - base.double()).numpy()


def expected(name: str, deltas: Sequence[Matrix], weights: Sequence[float] = WEIGHTS) -> Matrix:
    def knots_ties() -> Matrix:
        u, parts = dense_oracle.aligned(deltas)
        trimmed = [oracle.trim(part.reshape(-1), 0.3) for part in parts]
        return u @ oracle.disjoint_merge(trimmed, weights).reshape(parts[0].shape)

    formulas: dict[str, Callable[[], Matrix]] = {
        "tsv_m": lambda: dense_oracle.tsv_m(deltas, weights),
        "tsv_m-all": lambda: dense_oracle.tsv_m(deltas, weights, 3.0),
        "iso_c": lambda: dense_oracle.iso_c(deltas, weights),
        "iso_cts": lambda: dense_oracle.iso_cts(deltas, weights, 0.8),
        "iso_cts-3": lambda: dense_oracle.iso_cts(deltas, weights, 0.3),
        "wudi-closed": lambda: dense_oracle.wudi_minimum(deltas, weights),
        "wudi-ridge": lambda: dense_oracle.wudi_minimum(deltas, weights, 0.3),
        "knots-ties": knots_ties,
        "knots-linear": lambda: sum(w * d for w, d in zip(weights, deltas, strict=True)),
    }
    return formulas[name]()


def close(actual: Matrix, wanted: Matrix, tolerance: float) -> None:
    assert np.linalg.norm(actual - wanted) <= tolerance * max(np.linalg.norm(wanted), 1e-12)


@every_method
@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_the_decompositions_of_the_paper(name: str, shape: tuple[int, int]) -> None:
    base, inputs, deltas = experts(shape)
    close(task_vector(name, base, inputs), expected(name, deltas), 2e-8)


@every_method
@pytest.mark.parametrize("shape", [(40, 24), (90, 200)])
def test_float32_operands_are_as_good_as_their_rounding(name: str, shape: tuple[int, int]) -> None:
    base, inputs, deltas = experts(shape, dtype=torch.float32)
    close(task_vector(name, base, inputs), expected(name, deltas), 3e-5)


@every_method
@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (90, 200), (200, 90)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_deltas_of_low_rank_stay_in_their_numerical_rank(
    name: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    base, inputs, deltas = experts(shape, rank=2, dtype=dtype)
    merged = task_vector(name, base, inputs)
    close(merged, expected(name, deltas), 1e-10 if dtype == torch.float64 else 5e-6)
    spectrum = np.linalg.svd(merged, compute_uv=False)
    assert spectrum[6] < 1e-6 * spectrum[0]


def test_golden_value_of_iso_c() -> None:
    merged = merge("iso_c", torch.zeros(2, 2), [torch.diag(torch.tensor([3.0, 1.0]))])
    torch.testing.assert_close(merged, 2 * torch.eye(2))


def test_golden_value_of_tsv_m() -> None:
    inputs = [torch.diag(torch.tensor(d)) for d in ([2.0, 0.0], [0.0, 1.0])]
    torch.testing.assert_close(
        merge("tsv_m", torch.zeros(2, 2), inputs), torch.diag(torch.tensor([2.0, 1.0]))
    )


@pytest.mark.parametrize("values", [{"solver": "closed_form"}, {"steps": 50}])
def test_wudi_adds_task_vectors_whose_rows_are_orthogonal(values: dict[str, Any]) -> None:
    first, second = torch.zeros(4, 6), torch.zeros(4, 6)
    first[:, :3] = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    second[:, 3:] = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    merged = merge("wudi", torch.zeros(4, 6), [first, second], **values)
    torch.testing.assert_close(merged, first + second, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_wudi_takes_the_steps_of_adam(
    shape: tuple[int, int], rank: int | None, dtype: torch.dtype, tolerance: float
) -> None:
    base, inputs, deltas = experts(shape, rank=rank, dtype=dtype)
    wanted = dense_oracle.wudi_steps([torch.from_numpy(d) for d in deltas], WEIGHTS, 60, 1e-5)
    merged = merge("wudi", base, inputs, weight=WEIGHTS, steps=60).double() - base.double()
    close(merged.numpy(), wanted.numpy(), tolerance)
    assert not torch.allclose(wanted, torch.from_numpy(expected("knots-linear", deltas)), rtol=1e-2)


def test_no_steps_of_wudi_are_task_arithmetic() -> None:
    base, inputs, deltas = experts((20, 30))
    merged = merge("wudi", base, inputs, weight=WEIGHTS, steps=0) - base
    close(merged.numpy(), expected("knots-linear", deltas), 1e-12)


def test_the_closed_form_of_wudi_is_a_minimum_and_a_large_ridge_the_sum() -> None:
    base, inputs, deltas = experts((20, 30))
    tau = torch.from_numpy(task_vector("wudi-closed", base, inputs)).requires_grad_()
    loss = dense_oracle.wudi_loss(tau, [torch.from_numpy(d) for d in deltas], WEIGHTS)
    (gradient,) = torch.autograd.grad(loss, tau)
    assert gradient.abs().max() < 1e-12
    close(task_vector("wudi-ridge", base, inputs, ridge=1e9), expected("knots-linear", deltas), 1e-6)


def test_wudi_of_a_layer_that_keeps_its_matrix_transposed() -> None:
    base, inputs, _ = experts((20, 30))
    values: dict[str, Any] = {"weight": WEIGHTS, "solver": "closed_form"}
    straight = merge("wudi", base, inputs, **values)
    turned = merge("wudi", base.T.contiguous(), [x.T.contiguous() for x in inputs], transposed=True, **values)
    torch.testing.assert_close(turned.T, straight, rtol=1e-12, atol=1e-14)
    unaware = merge("wudi", base.T.contiguous(), [x.T.contiguous() for x in inputs], **values)
    assert not torch.allclose(unaware.T, straight)


@pytest.mark.parametrize("name", ["iso_c", "iso_cts-3", "tsv_m", "wudi-closed", "knots-ties"])
@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (100, 20)])
def test_a_layer_means_the_same_however_its_matrix_is_kept(name: str, shape: tuple[int, int]) -> None:
    method, own = METHODS[name]
    base, inputs, _ = experts(shape)
    straight = merge(method, base, inputs, weight=WEIGHTS, **own)
    turned = merge(
        method,
        base.T.contiguous(),
        [x.T.contiguous() for x in inputs],
        weight=WEIGHTS,
        transposed=True,
        **own,
    )
    torch.testing.assert_close(turned.T, straight, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("name", ["tsv_m", "tsv_m-all", "iso_c", "iso_cts", "wudi-closed", "wudi-ridge"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_orthogonal_changes_of_coordinates_commute_with_the_merge(name: str, side: str) -> None:
    _, _, deltas = experts((12, 18))
    generator = torch.Generator().manual_seed(5)
    size = 12 if side == "left" else 18
    q, _ = np.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64).numpy())

    def turn(matrix: Matrix) -> Matrix:
        return q @ matrix if side == "left" else matrix @ q

    zero = torch.zeros(12, 18, dtype=torch.float64)
    straight = task_vector(name, zero, [torch.from_numpy(d) for d in deltas])
    turned = task_vector(name, zero, [torch.from_numpy(turn(d)) for d in deltas])
    close(turned, turn(straight), 1e-9)


@every_method
@settings(max_examples=10, deadline=None)
@given(scale=st.floats(1e-3, 1e3), seed=st.integers(0, 99))
def test_scaled_task_vectors_give_the_scaled_merge(name: str, scale: float, seed: int) -> None:
    _, _, deltas = experts((9, 14), seed=seed)
    zero = torch.zeros(9, 14, dtype=torch.float64)
    one = task_vector(name, zero, [torch.from_numpy(d) for d in deltas])
    other = task_vector(name, zero, [torch.from_numpy(scale * d) for d in deltas])
    close(other, scale * one, 1e-6)


@every_method
@settings(max_examples=5, deadline=None)
@given(order=st.permutations(range(3)), seed=st.integers(0, 99))
def test_the_order_of_the_experts_does_not_matter(name: str, order: list[int], seed: int) -> None:
    base, inputs, _ = experts((10, 15), seed=seed)
    one = task_vector(name, base, inputs)
    weights = tuple(WEIGHTS[k] for k in order)
    close(task_vector(name, base, [inputs[k] for k in order], weight=weights), one, 1e-6)


@every_method
def test_the_weight_is_a_factor_of_the_task_vector(name: str) -> None:
    if name.startswith("knots"):
        pytest.skip("the basis is that of the task vectors as they are")
    base, inputs, deltas = experts((12, 18))
    scaled = [base + w * torch.from_numpy(d) for w, d in zip(WEIGHTS, deltas, strict=True)]
    close(task_vector(name, base, scaled, weight=1.0), task_vector(name, base, inputs), 1e-8)


@pytest.mark.parametrize("name", ["tsv_m", "tsv_m-all", "wudi-closed", "wudi-ridge", "knots-ties"])
@pytest.mark.parametrize("shape", [(12, 18), (18, 12), (1, 7)])
def test_identical_experts(name: str, shape: tuple[int, int]) -> None:
    base, (expert,), (delta,) = experts(shape, count=1, rank=2)
    values: dict[str, Any] = {"density": 1.0} if name == "knots-ties" else {}
    if name == "wudi-ridge":
        # The ridge pulls towards the sum of the experts, which is not the expert.
        values["ridge"] = 0.0
    close(task_vector(name, base, [expert] * 3, weight=1.0, **values), delta, 1e-8)


def test_iso_of_identical_experts_is_the_flattened_sum() -> None:
    base, (expert,), (delta,) = experts((12, 18), count=1)
    wanted = dense_oracle.iso_c([delta] * 3, (1.0,) * 3)
    for name in ("iso_c", "iso_cts"):
        merged = task_vector(name, base, [expert] * 3, weight=1.0)
        if name == "iso_c":
            close(merged, wanted, 1e-9)
        spectrum = np.linalg.svd(merged, compute_uv=False)
        close(spectrum[:9], np.full(9, spectrum[0]), 1e-7)


@every_method
def test_an_expert_that_equals_the_base_disturbs_nothing(name: str) -> None:
    base, inputs, deltas = experts((12, 18), count=2)
    inputs = [inputs[0], base.clone(), inputs[1]]
    merged = task_vector(name, base, inputs, weight=1.0)
    assert np.isfinite(merged).all()
    if name in ("iso_c", "wudi-closed", "knots-linear"):
        close(merged, expected(name, deltas, (1.0, 1.0)), 1e-9)


@every_method
def test_an_expert_of_weight_zero_is_left_out(name: str) -> None:
    base, inputs, _ = experts((12, 18))
    with_it = task_vector(name, base, inputs, weight=(1.0, 0.0, 0.7))
    without = task_vector(name, base, [inputs[0], inputs[2]], weight=(1.0, 0.7))
    assert np.array_equal(with_it, without)


@every_method
@pytest.mark.parametrize("values", [{"lambda_": 0.0}, {"weight": 0.0}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_added_leaves_the_base_bit_for_bit(
    name: str, values: dict[str, Any], dtype: torch.dtype
) -> None:
    base, inputs, _ = experts((12, 18), dtype=dtype)
    base[0, 0] = -0.0
    method, own = METHODS[name]
    merged = merge(method, base, inputs, **{**own, **values}).to(dtype)
    assert torch.equal(merged, base)
    assert torch.signbit(merged[0, 0])


@every_method
def test_lambda_scales_what_is_added(name: str) -> None:
    base, inputs, _ = experts((12, 18))
    close(task_vector(name, base, inputs, lambda_=0.3), 0.3 * task_vector(name, base, inputs), 1e-12)


@every_method
@pytest.mark.parametrize("shape", [(7,), (), (2, 3, 4)])
def test_what_is_no_matrix_gets_the_mean_of_the_task_vectors(name: str, shape: tuple[int, ...]) -> None:
    base, inputs = oracle.checkpoints(torch.Size(shape).numel(), dtype=torch.float64)
    base, inputs = base.reshape(shape), [x.reshape(shape) for x in inputs]
    method, own = METHODS[name]
    merged = merge(method, base, inputs, weight=WEIGHTS, lambda_=0.5, **own)
    wanted = base + 0.5 * sum(w * (x - base) for w, x in zip(WEIGHTS, inputs, strict=True)) / 3
    torch.testing.assert_close(merged, wanted, rtol=1e-12, atol=1e-15)


@every_method
def test_opposite_experts(name: str) -> None:
    base, (expert,), (delta,) = experts((12, 18), count=1)
    opposite = torch.from_numpy(2 * base.numpy() - expert.numpy())
    merged = task_vector(name, base, [expert, opposite], weight=1.0)
    assert np.isfinite(merged).all()
    if name == "iso_c":
        assert np.abs(merged).max() < 1e-9
    else:
        assert np.linalg.norm(merged) < 3 * np.linalg.norm(delta)


@every_method
def test_more_experts_than_rows(name: str) -> None:
    base, inputs, deltas = experts((2, 9), count=5)
    weights = (1.0, 0.5, -0.5, 0.8, 0.3)
    merged = task_vector(name, base, inputs, weight=weights)
    close(merged, expected(name, deltas, weights), 1e-7)


@every_method
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_where_it_is(name: str, value: float) -> None:
    base, inputs, _ = experts((12, 18), dtype=torch.float32)
    inputs[1][3, 5] = value
    method, own = METHODS[name]
    broken = ~torch.isfinite(merge(method, base, inputs, **own))
    assert broken[3, 5]
    assert broken.sum() == 1


@every_method
@pytest.mark.parametrize("shape", [(300, 64), (64, 300)])
def test_the_bits_depend_on_neither_chunks_nor_threads_nor_the_cache(
    name: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evomerge.methods.matrices.BLOCK", 50 * 64)
    method, own = METHODS[name]
    base, inputs, _ = experts(shape, dtype=torch.bfloat16)
    values = {"weight": (0.7, 0.7, 0.7), **own}
    whole = merge(method, base, inputs, **values)
    cache = TensorCache()
    merge(method, base, inputs, **{**values, "weight": 1.0}, cache=cache, key="k")
    threads = torch.get_num_threads()
    try:
        for count, chunk in ((1, 777), (2, 1 << 20)):
            torch.set_num_threads(count)
            assert torch.equal(merge(method, base, inputs, chunk=chunk, **values), whole)
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(merge(method, base, inputs, cache=cache, key="k", **values), whole)


@every_method
def test_rows_longer_than_a_block(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evomerge.methods.matrices.BLOCK", 5)
    base, inputs, deltas = experts((9, 8))
    close(task_vector(name, base, inputs), expected(name, deltas), 1e-9)


def test_factors_of_the_parents_are_kept_and_counted() -> None:
    base, inputs, _ = experts((40, 24), dtype=torch.float32)
    for method, weighted in (
        ("tsv_m", True),
        ("wudi", True),
        ("knots", True),
        ("iso_c", False),
        ("iso_cts", False),
    ):
        cache = TensorCache()
        merge(method, base, inputs, cache=cache, key="k", weight=0.5)
        size = cache.nbytes
        assert size > 24 * 24 * 4
        weight: Any = (0.1, 0.2, 0.3) if weighted else 0.3
        merge(method, base, inputs, cache=cache, key="k", weight=weight, lambda_=0.7)
        assert cache.nbytes == size


@pytest.mark.parametrize("density", [0.5, 1.0])
def test_knots_drops_at_random_in_the_common_basis(density: float) -> None:
    base, inputs, deltas = experts((24, 40), rank=2)
    key = MaskKey(seed=3, experts=("a", "b", "c"), tensor="t")
    merged = (
        merge("knots", base, inputs, inner="dare_linear", density=density, masks=key, weight=WEIGHTS) - base
    )
    u, parts = dense_oracle.aligned(deltas)
    if density == 1:
        close(merged.numpy(), expected("knots-linear", deltas), 1e-9)
        return
    # Signs of the singular vectors are arbitrary, masks are not: compare in the basis, entry by entry.
    other = (
        merge("knots", base, inputs, inner="dare_linear", density=density, masks=key, weight=WEIGHTS) - base
    )
    assert torch.equal(merged, other)
    kept = [oracle.kept(key, k, parts[0].size, density).reshape(40, 6).T for k in range(3)]
    wanted = sum(w * m * part / density for w, m, part in zip(WEIGHTS, kept, parts, strict=True))
    close(merged.numpy(), u @ wanted, 1e-9)


def test_knots_without_masks_says_what_is_missing() -> None:
    base, inputs, _ = experts((6, 8))
    with pytest.raises(ValueError, match="needs a mask key"):
        merge("knots", base, inputs, inner="dare_ties")


@pytest.mark.parametrize(
    ("method", "values", "message"),
    [
        ("wudi", {"solver": "sgd"}, "'sgd' is not one of adam, closed_form"),
        ("wudi", {"steps": 2.5}, "steps: 2.5 is not a whole number"),
        ("wudi", {"ridge": -1.0}, r"ridge: -1.0 lies outside \[0, inf\)"),
        ("iso_cts", {"common_space_fraction": 1.2}, r"lies outside \[0, 1\]"),
        ("tsv_m", {"rank": -1.0}, "rank: -1.0 lies outside"),
        ("knots", {"inner": "slerp"}, "'slerp' is not one of ties, dare_ties"),
    ],
)
def test_values_that_do_not_fit_are_refused(method: str, values: dict[str, Any], message: str) -> None:
    x = torch.ones(3, 3)
    with pytest.raises(ValueError, match=message):
        merge(method, x, [x, x], **values)
