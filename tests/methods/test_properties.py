"""Properties of all merge methods in all dialects, over the registry and the table in `promises`."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.methods import MaskKey, TensorCache, all_methods, get_method
from tests.methods.cases import KEYS, Case, cases, statistics
from tests.methods.promises import PROMISES, promise_of, varied

SHAPES = [(0,), (1,), (7,), (130,), (0, 3), (1, 1), (1, 6), (9, 1), (6, 10), (17, 5), (2, 3, 4)]

every_case = pytest.mark.parametrize("case", varied(cases()))

shapes = st.sampled_from(SHAPES)
filled = st.sampled_from([shape for shape in SHAPES if 0 not in shape])
seeds = st.integers(0, 2**16)
quick = settings(max_examples=5, deadline=None)


def given_values(case: Case, values: dict[str, Any]) -> Case:
    return replace(case, values={**case.values, **values})


def close(one: torch.Tensor, other: torch.Tensor, scale: torch.Tensor) -> None:
    """Compare two float64 tensors, to rounding errors of tensors that are as large as `scale`."""
    size = float(scale.abs().max()) if scale.numel() else 1.0
    torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9 * size)


def test_every_method_has_an_entry() -> None:
    missing = set(all_methods()) - {name.partition("-")[0] for name in PROMISES}
    assert not missing, f"tests/methods/promises.py has no entry for {', '.join(sorted(missing))}"
    dialects = {f"{name}-{dialect}" for name, m in all_methods().items() for dialect in m.dialects}
    unknown = set(PROMISES) - set(all_methods()) - dialects
    assert not unknown, f"tests/methods/promises.py speaks of {', '.join(sorted(unknown))}: no such methods"


@every_case
@quick
@given(shape=shapes, seed=seeds, data=st.data())
def test_the_order_of_the_experts_does_not_matter(
    case: Case, shape: tuple[int, ...], seed: int, data: st.DataObject
) -> None:
    if not promise_of(case).symmetric or case.inputs == 1:
        pytest.skip("the method's inputs differ in their parts")
    order = data.draw(st.permutations(range(case.inputs)))

    def moved(items: Sequence[Any]) -> list[Any]:
        return [items[k] for k in order]

    base, inputs = case.operands(shape, torch.float64, seed)
    weighed = statistics(get_method(case.method).needs, inputs) if get_method(case.method).needs else None
    values = {
        name: tuple(moved(value)) if isinstance(value, tuple) else value
        for name, value in case.values.items()
    }
    key = KEYS[case.inputs]
    merged = case.merge(base, inputs, statistics=weighed)
    other = given_values(case, values).merge(
        base,
        moved(inputs),
        statistics=None if weighed is None else moved(weighed),
        masks=MaskKey(key.seed, tuple(moved(key.experts)), key.tensor),
    )
    close(other, merged, merged)


@every_case
@quick
@given(shape=shapes, seed=seeds, dtype=st.sampled_from([torch.bfloat16, torch.float32]))
def test_equal_experts_give_that_expert(
    case: Case, shape: tuple[int, ...], seed: int, dtype: torch.dtype
) -> None:
    promise = promise_of(case)
    if promise.equal is None or get_method(case.method).base_in(case.dialect).endswith("input"):
        pytest.skip("equal experts are changed by the method")
    base, (expert, *_) = case.operands(shape, dtype, seed)
    merged = given_values(case, promise.equal(case.inputs)).merge(
        base, [expert.clone() for _ in range(case.inputs)]
    )
    size = float(expert.abs().max()) if expert.numel() else 1.0
    torch.testing.assert_close(merged, expert.float(), rtol=1e-5, atol=1e-6 * size)


@every_case
@quick
@given(shape=shapes, seed=seeds, dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
def test_the_base_comes_out_bit_for_bit(
    case: Case, shape: tuple[int, ...], seed: int, dtype: torch.dtype
) -> None:
    promise = promise_of(case)
    if promise.base is None:
        pytest.skip("no values of the method give the base")
    base, inputs = case.operands(shape, dtype, seed)
    merged = given_values(case, promise.base).merge(base, inputs)
    assert torch.equal(merged, base.float())


@every_case
@quick
@given(shape=shapes, seed=seeds, factor=st.floats(0.05, 20))
def test_scaled_task_vectors_give_a_scaled_task_vector(
    case: Case, shape: tuple[int, ...], seed: int, factor: float
) -> None:
    if not promise_of(case).scales:
        pytest.skip("the method knows sizes that are not relative")
    base, inputs = case.operands(shape, torch.float64, seed)
    if not get_method(case.method).base_in(case.dialect).endswith("origin"):
        scaled = case.merge(factor * base, [factor * x for x in inputs])
        close(scaled, factor * case.merge(base, inputs), scaled)
        return
    task = case.merge(base, inputs) - base
    scaled = case.merge(base, [base + factor * (x - base) for x in inputs]) - base
    close(scaled, factor * task, scaled)


@every_case
@quick
@given(
    shape=shapes,
    seed=seeds,
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]),
    chunk=st.sampled_from([1, 3, 64, 1 << 18]),
)
def test_the_bits_do_not_depend_on_chunks_and_cache(
    case: Case, shape: tuple[int, ...], seed: int, dtype: torch.dtype, chunk: int
) -> None:
    base, inputs = case.operands(shape, dtype, seed)
    whole = case.merge(base, inputs)
    assert whole.shape == torch.Size(shape)
    assert torch.isfinite(whole).all()
    cache = TensorCache()
    others = promise_of(case).base or (promise_of(case).equal or any_other)(case.inputs)
    given_values(case, others).merge(base, inputs, cache=cache, key="k")
    for _ in range(2):
        assert torch.equal(case.merge(base, inputs, cache=cache, key="k", chunk=chunk), whole)


def any_other(count: int) -> dict[str, Any]:
    return {}


@every_case
@quick
@given(shape=shapes, seed=seeds, dtype=st.sampled_from([torch.bfloat16, torch.float16]))
def test_only_numbers_count_and_not_the_format_that_holds_them(
    case: Case, shape: tuple[int, ...], seed: int, dtype: torch.dtype
) -> None:
    base, inputs = case.operands(shape, dtype, seed)
    wide = case.merge(base.float(), [x.float() for x in inputs])
    assert wide.dtype == torch.float32 or wide.numel() == 0
    assert torch.equal(case.merge(base, inputs), wide)


@every_case
@quick
@given(shape=filled, seed=seeds, data=st.data())
def test_a_weight_that_is_not_a_number_does_not_go_unnoticed(
    case: Case, shape: tuple[int, ...], seed: int, data: st.DataObject
) -> None:
    base, inputs = case.operands(shape, seed=seed)
    where = data.draw(st.integers(0, base.numel() - 1))
    inputs[data.draw(st.integers(0, case.inputs - 1))].view(-1)[where] = float("nan")
    everything = {"density": 1.0} if "density" in case.values else {}
    assert not torch.isfinite(given_values(case, everything).merge(base, inputs)).all()


@every_case
def test_the_bits_do_not_depend_on_threads(case: Case) -> None:
    base, inputs = case.operands([210, 190])
    alone = case.merge(base, inputs)
    cache = TensorCache()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(case.merge(base, inputs), alone)
        torch.set_num_threads(1)
        with ThreadPoolExecutor(3) as pool:
            runs = [
                pool.submit(case.merge, base, inputs, cache=cache, key="k", chunk=1 << 13) for _ in range(3)
            ]
            assert all(torch.equal(run.result(), alone) for run in runs)
    finally:
        torch.set_num_threads(before)
