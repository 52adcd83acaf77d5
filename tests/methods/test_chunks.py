"""merge_chunks: what every method promises, whatever its formula."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from evomerge.methods import MaskKey, TensorCache, get_method, merge_chunks
from evomerge.methods.native import loader
from tests.methods import oracle
from tests.methods.cases import Case, every_case, statistics
from tests.methods.oracle import merge

KEY = MaskKey(seed=0, experts=("a", "b"), tensor="t")


@every_case
def test_the_bits_do_not_depend_on_chunks_threads_or_the_cache(case: Case) -> None:
    base, inputs = case.operands([(1 << 17) + 345], torch.bfloat16)
    whole = case.merge(base, inputs)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(case.merge(base, inputs, chunk=50_001), whole)
    finally:
        torch.set_num_threads(threads)
    cache = TensorCache()
    for chunk in (1 << 17, 1 << 20):
        assert torch.equal(case.merge(base, inputs, chunk=chunk, cache=cache, key="k"), whole)


@every_case
def test_the_bits_of_a_matrix_do_not_depend_on_chunks(case: Case) -> None:
    base, inputs = case.operands([97, 131])
    whole = case.merge(base, inputs)
    for chunk in (131, 1000, 5001):
        assert torch.equal(case.merge(base, inputs, chunk=chunk), whole)


class Volatile:
    """A flat tensor that is read slice by slice; a slice holds NaN from the next read on."""

    device = torch.device("cpu")

    def __init__(self, tensor: torch.Tensor) -> None:
        self._flat = tensor.reshape(-1)
        self._last = torch.empty(0)
        self.dtype, self.shape = tensor.dtype, self._flat.shape

    def numel(self) -> int:
        return self._flat.numel()

    def detach(self) -> Volatile:
        return self

    def reshape(self, size: int) -> Volatile:
        assert size == -1
        return self

    def __getitem__(self, part: slice) -> torch.Tensor:
        self._last.fill_(math.nan)
        self._last = self._flat[part].clone()
        return self._last


@every_case
@pytest.mark.parametrize("kernels", ["native", "torch"])
def test_slices_that_end_with_the_next_read_give_the_same_bits(
    case: Case, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVOMERGE_NATIVE", "0" if kernels == "torch" else "1")
    loader.library.cache_clear()
    base, inputs = case.operands([600, 257])
    options: dict[str, Any] = {}
    if needs := get_method(case.method).needs:
        options["statistics"] = statistics(needs, inputs)
    streams: list[Any] = [Volatile(tensor) for tensor in (base, *inputs)]
    try:
        whole = case.merge(base, inputs, **options)
        assert torch.equal(case.merge(streams[0], streams[1:], shape=base.shape, **options), whole)
    finally:
        loader.library.cache_clear()


@every_case
@pytest.mark.parametrize("shape", [(0,), (0, 4), (), (1,), (1, 1), (4, 1), (3, 5), (2, 3, 7)])
def test_every_shape_is_merged(case: Case, shape: tuple[int, ...]) -> None:
    base, inputs = case.operands(shape)
    merged = case.merge(base, inputs)
    assert merged.shape == torch.Size(shape)
    assert torch.isfinite(merged).all()


@every_case
@pytest.mark.parametrize("shape", [(1,), (6, 5)])
def test_inputs_that_equal_the_base_give_the_base(case: Case, shape: tuple[int, ...]) -> None:
    if get_method(case.method).base == "unused":
        pytest.skip("the method has no base")
    base, _ = case.operands(shape)
    merged = case.merge(base, [base.clone() for _ in range(case.inputs)])
    torch.testing.assert_close(merged, base, rtol=1e-6, atol=1e-9)


METHODS: dict[str, dict[str, Any]] = {
    "linear": {"weight": (0.3, 0.9)},
    "slerp": {"t": 0.4},
    "task_arithmetic": {"weight": (0.3, 0.9), "lambda_": 1.1},
    "ties": {"weight": (1.0, 1.0), "density": (0.3, 0.4)},
    "dare_linear": {"weight": (0.3, 0.9), "density": 0.4},
    "dare_ties": {"weight": (0.3, 0.9), "density": 0.4},
}
every_method = pytest.mark.parametrize("method", list(METHODS))


def formulas(
    values: dict[str, Any], base: torch.Tensor, experts: list[torch.Tensor]
) -> dict[str, Callable[[], Any]]:
    origin, *others = oracle.doubles(base, *experts)
    deltas = [x - origin for x in others]
    weights = values.get("weight", (1.0, 1.0))

    def dropped() -> list[np.ndarray]:
        masks = [oracle.kept(KEY, k, origin.size, values["density"]) for k in range(2)]
        return [m * d / values["density"] for m, d in zip(masks, deltas, strict=True)]

    def total(parts: list[np.ndarray]) -> np.ndarray:
        return sum((w * d for w, d in zip(weights, parts, strict=True)), np.zeros_like(origin))

    return {
        "linear": lambda: oracle.linear(experts, weights, normalize=True),
        "slerp": lambda: oracle.slerp(experts[0], experts[1], values["t"]),
        "task_arithmetic": lambda: origin + values["lambda_"] * total(deltas),
        "ties": lambda: (
            origin
            + oracle.disjoint_merge(
                [oracle.trim(d, density) for d, density in zip(deltas, values["density"], strict=True)],
                weights,
            )
        ),
        "dare_linear": lambda: origin + total(dropped()),
        "dare_ties": lambda: origin + oracle.disjoint_merge(dropped(), weights),
    }


@every_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_result_is_the_rounded_exact_one(method: str, dtype: torch.dtype) -> None:
    base, experts = oracle.checkpoints(40_000, experts=2, dtype=dtype)
    merged = merge(method, base, experts, masks=KEY, **METHODS[method]).to(dtype)
    exact = oracle.rounded(formulas(METHODS[method], base, experts)[method](), dtype)
    assert (merged == exact).double().mean() >= 0.999
    steps = (merged.view(torch.int16).int() - exact.view(torch.int16).int()).abs()
    assert steps[(merged.sign() == exact.sign())].max() <= 1


@every_method
def test_float32_results_are_within_float32_rounding(method: str) -> None:
    base, experts = oracle.checkpoints(40_000, experts=2, dtype=torch.float32)
    merged = merge(method, base, experts, masks=KEY, **METHODS[method])
    assert merged.dtype == torch.float32
    exact = formulas(METHODS[method], base, experts)[method]()
    np.testing.assert_allclose(merged.double().numpy(), exact, rtol=1e-6, atol=1e-8)


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_operands_are_only_read(case: Case, dtype: torch.dtype) -> None:
    base, experts = case.operands([50, 40], dtype)
    copies = [tensor.clone() for tensor in (base, *experts)]
    case.merge(base, experts)
    assert all(torch.equal(a, b) for a, b in zip((base, *experts), copies, strict=True))


def test_the_chunks_buffer_is_reused() -> None:
    x = torch.ones(100)
    pointers = {part.data_ptr() for _, part in merge_chunks("linear", None, [x], {"weight": 2.0}, chunk=10)}
    assert len(pointers) == 1


def test_a_float64_operand_makes_it_float64() -> None:
    x, y = torch.ones(3, dtype=torch.bfloat16), torch.full((3,), 1 + 2**-40, dtype=torch.float64)
    merged = merge("linear", None, [x, y], weight=(1.0, 1.0))
    assert merged.tolist() == [1 + 2**-41] * 3


def test_a_scalar_serves_every_expert_and_defaults_are_filled_in() -> None:
    base, experts = oracle.checkpoints(500, experts=2)
    assert torch.equal(
        merge("ties", base, experts),
        merge("ties", base, experts, weight=(1.0, 1.0), density=(0.2, 0.2), lambda_=1.0),
    )


@pytest.mark.parametrize(
    ("method", "values", "message"),
    [
        ("linear", {}, "linear needs a value for 'weight'"),
        ("linear", {"weigth": 1.0}, r"no parameter 'weigth' \(did you mean 'weight'\?\)"),
        ("linear", {"weight": (1.0, 2.0, 3.0)}, "3 values of 'weight' for 2 inputs"),
        ("linear", {"weight": (1.0, math.inf)}, "weight: inf is not a finite number"),
        ("ties", {"density": 1.5}, r"density: 1.5 lies outside \[0, 1\]"),
        ("lineal", {}, "did you mean 'linear'"),
    ],
)
def test_values_that_do_not_fit_are_refused(method: str, values: dict[str, Any], message: str) -> None:
    x = torch.ones(3)
    with pytest.raises(ValueError, match=message):
        merge(method, x, [x, x], **values)


def test_operands_that_do_not_fit_are_refused() -> None:
    x = torch.ones(4)
    with pytest.raises(ValueError, match=r"shapes differ: \(4,\) and \(2, 2\)"):
        merge("linear", None, [x, x.reshape(2, 2)], weight=1.0)
    with pytest.raises(ValueError, match="cannot merge int64 tensors"):
        merge("linear", None, [x.long()], weight=1.0)
    with pytest.raises(ValueError, match="needs a base"):
        merge("ties", None, [x])
    with pytest.raises(ValueError, match="slerp takes exactly 2 inputs"):
        merge("slerp", None, [x, x, x], t=0.5)
    with pytest.raises(ValueError, match="no dialect 'klingon'"):
        merge_chunks("ties", x, [x], {}, dialect="klingon")
    with pytest.raises(ValueError, match="a cache needs a key"):
        merge("linear", None, [x], weight=1.0, cache=TensorCache())


def test_mistakes_are_told_before_the_first_chunk_is_asked_for() -> None:
    with pytest.raises(ValueError, match="needs a value"):
        merge_chunks("linear", None, [torch.ones(3)], {})
