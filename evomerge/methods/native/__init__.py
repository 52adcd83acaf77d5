"""Fused kernels in C: what the torch operations of the methods do, in one pass over memory, bit for bit.

They take float32, bfloat16 and float16 operands on the CPU; for all else, and on machines without a C compiler,
the plain torch operations run.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from evomerge.methods.masks import MaskKey, key_words, limit_of
from evomerge.methods.native.loader import library

if TYPE_CHECKING:
    from evomerge.methods.operands import Operands

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
BASE = -1
"""Stands for the base where the others are input numbers."""

MOST_VECTORS = 16
_SPARE = 256  # What a block of the C kernels may add before it sees that the room is full.
_TRIM, _MASK = 1, 2


@dataclass(frozen=True)
class Trim:
    """Entries whose magnitude is at most `low` become 0."""

    low: float


@dataclass(frozen=True)
class Mask:
    """Entry i of the expert is kept where its hash lies under the density."""

    key: MaskKey
    expert: int
    density: float


@dataclass(frozen=True)
class Band:
    """Entries whose magnitude is not from `low` to `high` become 0."""

    low: float
    high: float


_BAND = 3

Sparsity = Trim | Mask | Band | None
"""How one operand's delta is made sparse; None: it is not."""


@dataclass(frozen=True)
class Term:
    """One operand of a fused kernel: the input's number or `BASE`, and what the kernel does with it."""

    operand: int
    coefficient: float = 1.0
    sparsity: Sparsity = None
    weight: float = 0.0


@dataclass(frozen=True)
class Fused:
    """A merge that one C function computes.

    Attributes:
        function: ``combine``: Σ c_k θ_k; ``deltas``: θ_0 + Σ c_k τ̂_k, the first term being the base;
            ``disjoint``: TIES' election and disjoint merge of the c_k τ̂_k, the first term being the base.
        terms: the operands in order.
        options: integers and floats that the function takes after the terms.
        tie: of ``disjoint``: the sign of elements where neither sign wins, asked for when there is one.
    """

    function: Literal["combine", "deltas", "disjoint"]
    terms: tuple[Term, ...]
    options: tuple[int | float, ...] = ()
    tie: Callable[[], int] | None = None


class _Operand(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
        ("sparsity", ctypes.c_int32),
        ("coefficient", ctypes.c_float),
        ("low", ctypes.c_float),
        ("key0", ctypes.c_uint32),
        ("key1", ctypes.c_uint32),
        ("limit", ctypes.c_uint64),
        ("weight", ctypes.c_float),
        ("high", ctypes.c_float),
    )


def usable(operands: Operands) -> bool:
    """Whether the C kernels can work on these operands."""
    return operands.device.type == "cpu" and operands.dtype == torch.float32 and library() is not None


class Runner:
    """A fused merge bound to one tensor's operands; not to be shared by threads.

    Args:
        fused: what to compute.
        operands: for which `usable` holds.
        factor: multiplied in before the rounding.
    """

    def __init__(self, fused: Fused, operands: Operands, factor: float = 1.0) -> None:
        self._function = getattr(_loaded(), f"evomerge_{fused.function}")
        self._terms = _Terms(fused.terms, operands)
        self._options = tuple(map(_number, fused.options))
        self._tie = fused.tie
        self._sign: float | None = None
        self._masked = fused.function != "combine"
        self._factor = ctypes.c_float(factor)

    def __call__(self, start: int, stop: int, out: Tensor) -> bool:
        """Write the elements ``start:stop`` to `out`, rounded to its dtype; returns whether all are finite."""
        if start >> 32 != (stop - 1) >> 32:
            middle = (stop - 1) >> 32 << 32
            first = self(start, middle, out[: middle - start])
            return self(middle, stop, out[middle - start :]) and first
        self._terms.read(start, stop)
        result = self._call(start, stop, out)
        if result & 2 and self._tie is not None and self._sign is None:
            self._sign = float(self._tie())
            self._terms.read(start, stop)
            result = self._call(start, stop, out)
        return not result & 1

    def _call(self, start: int, stop: int, out: Tensor) -> int:
        return int(
            self._function(
                self._terms.array,
                ctypes.c_int32(len(self._terms.array)),
                *self._options,
                *([] if self._tie is None else [ctypes.c_float(self._sign or 0.0)]),
                *([ctypes.c_uint32(start & 0xFFFFFFFF)] if self._masked else []),
                ctypes.c_int64(stop - start),
                self._factor,
                ctypes.c_int32(DTYPES[out.dtype]),
                ctypes.c_void_p(out.data_ptr()),
            )
        )


def count_votes(fused: Fused, operands: Operands) -> int:
    """Return the sum of the elected signs of a ``disjoint`` merge over the whole tensor."""
    terms = _Terms(fused.terms, operands)
    function = _loaded().evomerge_votes
    function.restype = ctypes.c_int64
    votes = 0
    for start in range(0, operands.size, operands.strip):
        stop = min(start + operands.strip, operands.size)
        terms.read(start, stop)
        votes += function(
            terms.array,
            ctypes.c_int32(len(terms.array)),
            _number(fused.options[0]),
            ctypes.c_uint32(start & 0xFFFFFFFF),
            ctypes.c_int64(stop - start),
        )
    return votes


def _number(value: int | float) -> ctypes.c_float | ctypes.c_int32:
    return ctypes.c_float(value) if isinstance(value, float) else ctypes.c_int32(value)


class _Terms:
    """The C view of some operands; `read` points it to a range of elements."""

    def __init__(self, terms: Sequence[Term], operands: Operands) -> None:
        self.array = (_Operand * len(terms))()
        self._operands = operands
        self._terms = terms
        self._parts: list[Tensor] = []
        self._high = -1
        for entry, term in zip(self.array, terms, strict=True):
            entry.dtype = DTYPES[operands.tensor(term.operand).dtype]
            entry.coefficient, entry.weight = term.coefficient, term.weight
            if isinstance(term.sparsity, Trim):
                entry.sparsity, entry.low = _TRIM, term.sparsity.low
            elif isinstance(term.sparsity, Mask):
                entry.sparsity, entry.limit = _MASK, limit_of(term.sparsity.density)
            elif isinstance(term.sparsity, Band):
                entry.sparsity, entry.low, entry.high = _BAND, term.sparsity.low, term.sparsity.high

    def read(self, start: int, stop: int) -> None:
        self._parts = [self._operands.tensor(term.operand)[start:stop] for term in self._terms]
        for entry, part in zip(self.array, self._parts, strict=True):
            entry.data = part.data_ptr()
        if start >> 32 != self._high:
            self._high = start >> 32
            for entry, term in zip(self.array, self._terms, strict=True):
                if isinstance(term.sparsity, Mask):
                    rule = term.sparsity
                    entry.key0, entry.key1 = key_words(
                        rule.key.seed, rule.key.experts[rule.expert], rule.key.tensor, self._high
                    )


def narrow(source: Tensor, out: Tensor) -> bool:
    """Round float32 values to `out`'s dtype, ties to even; returns whether all results are finite.

    Both are flat and contiguous; the bits are those of ``out.copy_(source)``.
    """
    loaded = library()
    if loaded is None or source.dtype != torch.float32 or out.dtype not in DTYPES or out.device.type != "cpu":
        out.copy_(source)
        return bool(torch.isfinite(out.sum())) or bool(torch.isfinite(out).all())
    bad = loaded.evomerge_narrow(
        ctypes.c_void_p(source.data_ptr()),
        ctypes.c_int64(source.numel()),
        ctypes.c_int32(DTYPES[out.dtype]),
        ctypes.c_void_p(out.data_ptr()),
    )
    return not bad


def add_products(
    operands: Operands,
    vectors: Sequence[int],
    minus: int | None,
    steps: bool,
    start: int,
    stop: int,
    sums: Tensor,
) -> None:
    """Add the products of the vectors' elements ``start:stop`` to lanes; see `reductions.gram`."""
    terms = _Terms([Term(k) for k in vectors], operands)
    terms.read(start, stop)
    origin = None
    if minus is not None:
        origin = _Terms([Term(minus)], operands)
        origin.read(start, stop)
    lanes = sums.shape[1]
    _loaded().evomerge_gram(
        terms.array,
        ctypes.c_int32(len(vectors)),
        None if origin is None else origin.array,
        ctypes.c_int32(steps),
        ctypes.c_int64(stop - start),
        ctypes.c_int64(start % lanes),
        ctypes.c_int64(lanes),
        ctypes.c_void_p(sums.data_ptr()),
    )


def add_magnitudes(
    operands: Operands, k: int, sparsity: Sparsity, start: int, stop: int, sums: Tensor
) -> None:
    """Add |τ_k| and |τ̂_k| of the elements ``start:stop`` to ``(2, lanes)``; see `reductions.absolute_sums`."""
    vector = _Terms([Term(k, sparsity=sparsity)], operands)
    base = _Terms([Term(BASE)], operands)
    vector.read(start, stop)
    base.read(start, stop)
    lanes = sums.shape[1]
    _loaded().evomerge_absolute(
        vector.array,
        base.array,
        ctypes.c_uint32(start & 0xFFFFFFFF),
        ctypes.c_int64(stop - start),
        ctypes.c_int64(start % lanes),
        ctypes.c_int64(lanes),
        ctypes.c_void_p(sums.data_ptr()),
    )


class _Bracket(ctypes.Structure):
    _fields_ = (
        ("low", ctypes.c_float),
        ("middle", ctypes.c_float),
        ("high", ctypes.c_float),
        ("above", ctypes.c_int64),
        ("at_high", ctypes.c_int64),
        ("at_middle", ctypes.c_int64),
        ("at_low", ctypes.c_int64),
        ("inside", ctypes.c_void_p),
        ("room", ctypes.c_int64),
        ("found", ctypes.c_int64),
    )


class Filed(NamedTuple):
    """Where the magnitudes of a vector lie with respect to low ≤ middle ≤ high.

    Attributes:
        above: how many are larger than high.
        at_high, at_middle, at_low: how many are equal to each of the three.
        inside: those between low and high, without those equal to middle; None: more than were asked for.
    """

    above: int
    at_high: int
    at_middle: int
    at_low: int
    inside: npt.NDArray[Any] | None


def file_magnitudes(
    operands: Operands, inputs: Sequence[int], brackets: Sequence[tuple[float, float, float]], most: int
) -> list[Filed]:
    """File |τ_k| of each of the inputs under a bracket (low, middle, high) of its own, in one pass.

    Args:
        operands: for which `usable` holds.
        inputs, brackets: one for each result.
        most: how many numbers inside a bracket to collect.
    """
    vectors, base = _Terms([Term(k) for k in inputs], operands), _Terms([Term(BASE)], operands)
    rooms = [np.empty(most + _SPARE + 16, dtype=np.float32) for _ in inputs]
    array = (_Bracket * len(brackets))()
    for entry, bounds, room in zip(array, brackets, rooms, strict=True):
        entry.low, entry.middle, entry.high = bounds
        entry.inside, entry.room = room.ctypes.data, most + _SPARE
    for start in range(0, operands.size, operands.strip):
        stop = min(start + operands.strip, operands.size)
        base.read(start, stop)
        vectors.read(start, stop)
        _loaded().evomerge_brackets(
            base.array, vectors.array, array, ctypes.c_int32(len(array)), ctypes.c_int64(stop - start)
        )
    return [
        Filed(
            *(entry.above, entry.at_high, entry.at_middle, entry.at_low),
            room[: entry.found] if 0 <= entry.found <= most else None,
        )
        for entry, room in zip(array, rooms, strict=True)
    ]


def nth(values: npt.NDArray[Any], at: int, low: float = 0.0, high: float = math.inf) -> float:
    """Return entry `at`, counted from 0, of magnitudes in ascending order; they may be overwritten.

    Args:
        values: ``(n,)``, none negative.
        at: in 0 … n − 1.
        low, high: between which all of them lie.
    """
    loaded = library()
    if loaded is None or values.dtype != np.float32:
        return float(np.partition(values, at)[at])
    function = loaded.evomerge_nth
    function.restype = ctypes.c_float
    return float(
        function(
            values.ctypes.data_as(ctypes.c_void_p),
            ctypes.c_int64(values.size),
            ctypes.c_int64(at),
            ctypes.c_float(low),
            ctypes.c_float(high),
        )
    )


def _pair(operands: Operands, k: int, start: int, stop: int) -> tuple[_Terms, _Terms]:
    vector, base = _Terms([Term(k)], operands), _Terms([Term(BASE)], operands)
    vector.read(start, stop)
    base.read(start, stop)
    return vector, base


def count_digits(
    operands: Operands, k: int, start: int, stop: int, prefix: int, shift: int, counts: npt.NDArray[np.int64]
) -> None:
    """Count bits shift … shift + 15 of |τ_k|; see `reductions.select`."""
    vector, base = _pair(operands, k, start, stop)
    _loaded().evomerge_digits(
        vector.array,
        base.array,
        ctypes.c_int64(stop - start),
        ctypes.c_uint32(prefix),
        ctypes.c_int32(shift),
        counts.ctypes.data_as(ctypes.c_void_p),
    )


def places(magnitudes: npt.NDArray[np.float32], out: npt.NDArray[np.float64]) -> None:
    """Write each entry's place in its row's order to `out`, ``(rows, d)``; see `della.places`."""
    rows, d = magnitudes.shape
    scratch = np.empty(2 * d, dtype=np.uint64)
    _loaded().evomerge_places(
        magnitudes.ctypes.data_as(ctypes.c_void_p),
        ctypes.c_int64(rows),
        ctypes.c_int64(d),
        scratch.ctypes.data_as(ctypes.c_void_p),
        out.ctypes.data_as(ctypes.c_void_p),
    )


def _loaded() -> Any:
    loaded = library()
    assert loaded is not None, "the caller has asked whether the kernels are there"
    return loaded
