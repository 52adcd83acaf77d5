"""The C kernels give the bits of the plain torch operations, and everything works without them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evomerge.methods import MaskKey, TensorMerge, native
from evomerge.methods.kernels import Sparse
from evomerge.methods.masks import hash_v1
from evomerge.methods.native import loader
from evomerge.methods.operands import Operands
from evomerge.methods.reductions import absolute_sums, gram, select, select_near

pytestmark = pytest.mark.skipif(
    not any(shutil.which(command) for command in ("cc", "gcc", "clang")), reason="no C compiler"
)

SIZES = (1, 255, 256, 257, 5000)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
KEY = MaskKey(seed=3, experts=("a" * 64, "b" * 64, "c" * 64), tensor="w")
MERGES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("linear", {"weight": (0.2, 0.9, -0.3), "normalize": False}),
    ("linear", {"weight": (0.0, 0.0, 0.0), "normalize": False}),
    ("linear", {"weight": (0.0, 1.0, 0.0)}),
    ("task_arithmetic", {"weight": (0.2, 0.0, -0.3), "lambda": 0.7}),
    ("task_arithmetic", {"weight": (0.0, 1.0, 0.0)}),
    ("task_arithmetic", {"weight": (0.0, 0.0, 0.0)}),
    ("ties", {"weight": (0.2, 0.9, -0.3), "density": (0.2, 0.5, 1.0), "lambda": 1.3}),
    ("ties", {"density": 0.01}),
    ("ties", {"weight": (0.2, 0.9, -0.3), "elect": "count", "merge": "sum", "density": 0.7}),
    ("ties", {"weight": (0.2, 0.9, -0.3), "elect": "max", "merge": "max", "density": 0.7}),
    ("ties", {"weight": (1.0, 1.0, 1.0), "elect": "sum", "merge": "max", "density": 1.0}),
    ("ties/mergekit", {"weight": (0.2, 0.9, -0.3), "density": (0.2, 0.0, 1.0), "rescale": True}),
    ("ties/mergekit", {"weight": (0.2, 0.9, -0.2), "density": 0.5, "normalize": False}),
    ("dare_linear/mergekit", {"weight": (0.2, 0.9, -0.3), "density": (0.1, 0.5, 1.0)}),
    ("dare_ties/mergekit", {"weight": (0.2, 0.9, 0.3), "density": (0.1, 0.5, 0.0)}),
    ("dare_linear", {"weight": (0.2, 0.9, -0.3), "density": (0.1, 0.5, 1.0)}),
    ("dare_ties", {"weight": (0.2, 0.9, 0.3), "density": (0.1, 0.5, 0.0)}),
    ("breadcrumbs/mergekit", {"weight": (0.2, 0.9, -0.3), "density": (0.1, 0.5, 1.0), "gamma": 0.1}),
    ("breadcrumbs_ties/mergekit", {"weight": (0.2, 0.9, 0.3), "density": 0.4, "rescale": True}),
    ("della", {"weight": (0.2, 0.9, -0.3), "density": (0.2, 0.5, 1.0)}),
    ("magmax", {"weight": (1.0, -0.9, 0.3)}),
)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A switch that turns the C kernels off."""

    def off() -> None:
        monkeypatch.setenv(loader.SWITCH, "0")
        loader.library.cache_clear()

    yield off
    monkeypatch.undo()
    loader.library.cache_clear()


def family(n: int, dtype: torch.dtype) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A base and three experts with many zero deltas, equal magnitudes and cancelling sums."""
    generator = torch.Generator().manual_seed(n)
    base = 0.02 * torch.randn(n, generator=generator)
    base[::7] = 0.0
    base[3::11] = -0.0
    steps = torch.randint(-3, 4, (3, n), generator=generator) * 2.0**-9
    return base.to(dtype), [(base + step).to(dtype) for step in steps]


def merged(name: str, values: dict[str, Any], n: int, dtype: torch.dtype, out: torch.dtype) -> torch.Tensor:
    base, experts = family(n, dtype)
    name, _, dialect = name.partition("/")
    merge = TensorMerge(name, base, experts, values, masks=KEY, factor=0.75, dialect=dialect or "paper")
    result = torch.empty(n, dtype=out)
    assert merge.write(0, n, result)
    return result


@pytest.mark.parametrize(("dtype", "out"), zip(DTYPES, (*DTYPES[1:], DTYPES[0]), strict=True))
@pytest.mark.parametrize(("name", "values"), MERGES)
def test_the_bits_are_those_of_plain_torch(
    name: str, values: dict[str, Any], dtype: torch.dtype, out: torch.dtype, plain: Any
) -> None:
    assert loader.library() is not None
    sizes = (*SIZES, (1 << 17) + 3) if dtype == torch.bfloat16 else SIZES
    ours = [merged(name, values, n, dtype, out) for n in sizes]
    plain()
    assert loader.library() is None
    for one, n in zip(ours, sizes, strict=True):
        other = merged(name, values, n, dtype, out)
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8)), (n, (one != other).nonzero()[:3])


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_16_bit_number_is_widened_and_rounded_as_torch_does(dtype: torch.dtype) -> None:
    patterns = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    values = patterns.view(torch.bfloat16) if dtype != torch.float16 else patterns.view(torch.float16)
    finite = values[torch.isfinite(values.float())]
    inputs = [torch.zeros_like(finite), finite]
    out = torch.empty(finite.numel(), dtype=torch.float32)
    assert TensorMerge("linear", None, inputs, {"weight": (0.0, 1.0)}).write(0, finite.numel(), out)
    assert torch.equal(out, finite.float())

    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(1 << 31), (1 << 31) - 1, (200_000,), generator=generator).to(torch.int32)
    source = torch.cat([bits.view(torch.float32), values.float(), values.float() * (1 + 2**-9)])
    rounded = torch.empty(source.numel(), dtype=dtype)
    assert not native.narrow(source, rounded)
    expected = source.to(dtype)
    numbers = ~torch.isnan(expected)
    assert torch.equal(torch.isnan(rounded), torch.isnan(expected))
    assert torch.equal(rounded[numbers].view(torch.uint8), expected[numbers].view(torch.uint8))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3.4e38])
@pytest.mark.parametrize("at", [0, 700, 999])
def test_a_value_that_is_not_finite_is_noticed(bad: float, at: int) -> None:
    source = torch.ones(1000)
    out = torch.empty(1000, dtype=torch.bfloat16)
    assert native.narrow(source, out)
    source[at] = bad
    assert not native.narrow(source, out)


def test_the_hash_is_the_one_of_the_definition() -> None:
    n = 70_000
    base, expert = torch.zeros(n), torch.ones(n)
    key = MaskKey(seed=3, experts=("a" * 64,), tensor="w")
    out = torch.empty(n)
    TensorMerge("dare_linear", base, [expert], {"weight": 1.0, "density": 0.3}, masks=key).write(0, n, out)
    hashes = hash_v1(key.seed, key.experts[0], key.tensor, 0, np.empty(n, np.uint32))
    assert np.array_equal(out.numpy() != 0, hashes < 0.3 * 2**32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_reductions_have_the_bits_of_plain_torch(dtype: torch.dtype, plain: Any) -> None:
    def everything() -> list[Any]:
        found: list[Any] = []
        for n in (1, 300, 20_000, (1 << 17) + 5):
            base, experts = family(n, dtype)
            operands = Operands(base, experts, MaskKey(0, ("a", "b", "c"), "w"))
            found += [gram(operands, basis).tolist() for basis in ("inputs", "deltas", "steps")]
            halves = Sparse(
                (1.0,) * 3,
                lambda k, delta, start: torch.hardshrink(delta, 2**-9, out=delta),
                (native.Trim(2**-9),) * 3,
            )
            found += [absolute_sums(operands, k, halves) for k in range(3)]
            found += [select(operands, 0, rank) for rank in (1, n // 2 + 1, n)]
            found += select_near(operands, [(1, rank) for rank in (1, n // 2 + 1, n)])
        return found

    ours = everything()
    plain()
    assert everything() == ours


@pytest.mark.parametrize("n", [1, 2, 4001])
def test_an_order_statistic_is_that_of_a_sort(n: int) -> None:
    generator = np.random.default_rng(n)
    for values in (
        generator.random(n),
        generator.integers(0, 5, n),
        np.zeros(n),
        1e-42 * generator.random(n),
    ):
        ordered = np.sort(values.astype(np.float32))
        for at in {0, n // 3, n - 1}:
            for bounds in ((), (float(ordered[0]), float(ordered[-1]))):
                assert native.nth(values.astype(np.float32), at, *bounds) == ordered[at]


def test_a_broken_compiler_is_no_obstacle(tmp_path: Path) -> None:
    script = (
        "import torch; from evomerge.methods import merge_chunks; from evomerge.methods.native import library;"
        "x = torch.ones(3); print([c.tolist() for _, c in merge_chunks('linear', None, [x], {'weight': 1.0})],"
        " library())"
    )
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho 'no space left' >&2\nexit 1\n")
    compiler.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={**__import__("os").environ, "CC": str(compiler), "EVOMERGE_CACHE": str(tmp_path)},
        check=True,
    )
    assert done.stdout.split() == ["[[1.0,", "1.0,", "1.0]]", "None"]
