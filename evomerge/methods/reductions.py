"""Whole-tensor reductions whose bits depend on nothing but the operands.

Sums of products run in float64 over a fixed number of lanes, elementwise until the very end; counts are
integers. Neither depends on chunk size, thread count or the processor's vector width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from evomerge.methods import native
from evomerge.methods.operands import STRIP, Operands

if TYPE_CHECKING:
    from evomerge.methods.kernels import Sparse

Gram = npt.NDArray[np.float64]
Basis = Literal["inputs", "deltas", "steps"]

LANES = 1 << 13
_BLOCK = 1 << 18
_SHORT = 1 << 15


def gram(operands: Operands, basis: Basis) -> Gram:
    """Return the inner products of K vectors, ``(K, K)`` float64.

    Element i belongs to lane i mod 2¹³; each lane adds its products in order of i, and the lanes are then
    added pairwise in a binary tree.

    Args:
        operands: the tensor of every model.
        basis: ``inputs``: θ_1 … θ_K; ``deltas``: θ_k − θ_0; ``steps``: θ_1, θ_2 − θ_1, …, θ_K − θ_1
            (small angles and distances without cancellation).
    """
    count = len(operands.inputs)
    pairs = [(i, j) for i in range(count) for j in range(i, count)]
    sums = torch.zeros(len(pairs), LANES, dtype=torch.float64, device=operands.device)
    if native.usable(operands) and count <= native.MOST_VECTORS:
        minus = native.BASE if basis == "deltas" else None
        for start in range(0, operands.size, STRIP):
            stop = min(start + STRIP, operands.size)
            native.add_products(operands, range(count), minus, basis == "steps", start, stop, sums)
    else:
        _add_products(operands, basis, pairs, sums)
    matrix = np.empty((count, count))
    for value, (i, j) in zip(fold_lanes(sums).tolist(), pairs, strict=True):
        matrix[i, j] = matrix[j, i] = value
    return matrix


def absolute_sums(operands: Operands, k: int, sparse: Sparse) -> tuple[float, float]:
    """Return Σ |τ_k| and Σ |τ̂_k|, of what `sparse` keeps (before its scales), over the lanes of `gram`."""
    sums = torch.zeros(2, LANES, dtype=torch.float64, device=operands.device)
    if native.usable(operands) and sparse.rules is not None:
        for start in range(0, operands.size, STRIP):
            stop = min(start + STRIP, operands.size)
            native.add_magnitudes(operands, k, sparse.rules[k], start, stop, sums)
    else:
        for chunk in operands.fork().chunks(LANES):
            delta = chunk.delta(k)
            sums[0, : delta.numel()].add_(torch.abs(delta, out=chunk.row("part")))
            sparse.keep(k, delta, chunk.start)
            sums[1, : delta.numel()].add_(delta.abs_())
    whole, kept = fold_lanes(sums).tolist()
    return whole, kept


def fold_lanes(sums: Tensor) -> Tensor:
    """Add the lanes, ``(…, LANES)``, pairwise in a binary tree."""
    width = LANES
    while width > 1:
        width //= 2
        sums = sums[..., :width] + sums[..., width:]
    return sums[..., 0]


def _add_products(operands: Operands, basis: Basis, pairs: Sequence[tuple[int, int]], sums: Tensor) -> None:
    rows = torch.empty(len(operands.inputs) + 2, LANES, dtype=torch.float64, device=operands.device)
    for start in range(0, operands.size, LANES):
        stop = min(start + LANES, operands.size)
        vectors = read_vectors(operands, basis, start, stop, rows)
        product = rows[-1, : stop - start]
        for lane, (i, j) in zip(sums, pairs, strict=True):
            lane[: stop - start].add_(torch.mul(vectors[i], vectors[j], out=product))


def read_vectors(operands: Operands, basis: Basis, start: int, stop: int, rows: Tensor) -> list[Tensor]:
    """Read the elements ``start:stop`` of the vectors of a Gram matrix into rows of scratch memory."""
    count = len(operands.inputs)
    vectors = [rows[k, : stop - start].copy_(x[start:stop]) for k, x in enumerate(operands.inputs)]
    if basis == "deltas":
        assert operands.base is not None
        base = rows[count, : stop - start].copy_(operands.base[start:stop])
        for vector in vectors:
            vector.sub_(base)
    elif basis == "steps":
        for vector in vectors[1:]:
            vector.sub_(vectors[0])
    return vectors


@dataclass(frozen=True)
class Magnitudes:
    """Every |θ_k − θ_0| of a tensor, as its distinct values.

    Attributes:
        values: ``(m,)`` ascending.
        upto: ``(m,)`` number of elements that are not larger.
    """

    values: npt.NDArray[Any]
    upto: npt.NDArray[np.int64]

    @property
    def nbytes(self) -> int:
        """Memory of the two arrays."""
        return self.values.nbytes + self.upto.nbytes

    def largest(self, rank: int) -> float:
        """Return the `rank`-th largest magnitude."""
        return float(self.values[np.searchsorted(self.upto, self.upto[-1] - rank, side="right")])


def kth_magnitude(operands: Operands, k: int, rank: int) -> float:
    """Return the `rank`-th largest |θ_k − θ_0|, exactly; rank 1 is the largest.

    With a cache, the distinct magnitudes are listed once, and every further rank is a binary search: deltas
    of 16-bit checkpoints have few (some ten thousand among millions of elements). Where there are too many
    of them to keep, and without a cache, the one rank is selected: `select_near` if the tensor's elements
    are spread as its sample says, else `select`.

    Args:
        operands: the tensor of every model.
        k: index of the input.
        rank: in 1 … n.
    """
    what = f"distinct magnitudes of {k}"
    if operands.known(what) or operands.caching:
        magnitudes = operands.cached(what, lambda: list_magnitudes(operands, k))
        if magnitudes is not None:
            return magnitudes.largest(rank)
    found = select_near(operands, k, rank)
    return select(operands, k, rank) if found is None else found


def list_magnitudes(operands: Operands, k: int) -> Magnitudes | None:
    """Return the distinct |θ_k − θ_0|, or None when listing them would hardly shorten them."""
    values: npt.NDArray[Any] = np.empty(
        0, dtype=np.float64 if operands.dtype == torch.float64 else np.float32
    )
    counts = np.empty(0, dtype=np.int64)
    for chunk in operands.chunks(_BLOCK):
        ordered = np.sort(chunk.delta(k).abs_().cpu().numpy())
        first = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
        if first.size > max(ordered.size // 2, _SHORT):
            return None
        values = np.concatenate([values, ordered[first]])
        counts = np.concatenate([counts, np.diff(first, append=ordered.size)])
        order = np.argsort(values, kind="stable")
        values, counts = values[order], counts[order]
        first = np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1]]))
        values, counts = values[first], np.add.reduceat(counts, first)
        if values.size > max(operands.size // 8, _SHORT):
            return None
    return Magnitudes(values, np.cumsum(counts))


def select_near(operands: Operands, k: int, rank: int) -> float | None:
    """Return the `rank`-th largest |θ_k − θ_0|, exactly, or None when a sample misjudges where it lies.

    Deltas of 16-bit checkpoints repeat few values: of those, a pass counts how many magnitudes exceed, and equal,
    the sample's values next to its quantile, of which one often is the answer. Otherwise the sample brackets the
    value within six standard errors; a pass counts what is larger and collects what lies inside.
    """
    n = operands.size
    sample = operands.sample(k).abs_().cpu().numpy()
    sample.sort()
    center = min(math.floor(sample.size * (1 - rank / n)), sample.size - 1)
    guess = _guess(operands, k, rank, sample, center)
    if guess is not None:
        return guess
    spread = 6 * math.sqrt(rank * (1 - rank / n) / n * sample.size) + 2
    first, last = math.floor(center - spread), math.ceil(center + 1 + spread)
    low = float(sample[first]) if first >= 0 else 0.0
    high = float(sample[last]) if last < sample.size else math.inf
    larger, inside, most = 0, [], max(n // 8, _SHORT)
    for start in range(0, n, STRIP):
        above, between = _between(operands, k, start, min(start + STRIP, n), low, high)
        larger += above
        inside.append(between)
        most -= between.size
        if larger >= rank or most < 0:
            return None
    collected = np.concatenate(inside)
    at = collected.size - (rank - larger)
    return float(np.partition(collected, at)[at]) if at >= 0 else None


def _guess(operands: Operands, k: int, rank: int, sample: npt.NDArray[Any], center: int) -> float | None:
    """Return one of the sample's values around `center` if it is the one sought."""
    short = (torch.bfloat16, torch.float16)
    if not native.usable(operands) or {operands.tensor(k).dtype, operands.tensor(-1).dtype} - {*short}:
        return None
    around = np.unique(sample[max(0, center - 512) : center + 513])
    at = int(np.searchsorted(around, sample[center]))
    values = around[max(0, at - 1) : at + native.GUESSES - 1]
    values = np.pad(values, (0, native.GUESSES - values.size), mode="edge").astype(np.float32)
    counts = np.zeros((2, native.GUESSES), dtype=np.int64)
    for start in range(0, operands.size, STRIP):
        native.count_ranks(operands, k, start, min(start + STRIP, operands.size), values, counts)
    above, equal = counts
    found = np.flatnonzero((above < rank) & (rank <= above + equal))
    return float(values[found[0]]) if found.size else None


def _between(
    operands: Operands, k: int, start: int, stop: int, low: float, high: float
) -> tuple[int, npt.NDArray[Any]]:
    """Count |θ_k − θ_0| above `high` among the elements ``start:stop``, and return those in [low, high]."""
    if native.usable(operands):
        room = operands.row("room", stop - start + 256).numpy()
        larger, found = native.collect_between(operands, k, start, stop, low, high, room)
        return larger, room[:found].copy()
    magnitudes = next(operands.chunks(stop - start, start, stop)).delta(k).abs_().cpu().numpy()
    between = magnitudes[(magnitudes >= low) & (magnitudes <= high)]
    return int(np.count_nonzero(magnitudes > high)), between


def select(operands: Operands, k: int, rank: int) -> float:
    """Return the `rank`-th largest |θ_k − θ_0|, exactly, by radix selection on the bit patterns.

    Histograms of 16 bits at a time are streamed: nothing of the tensor's size is allocated.
    """
    bits = 64 if operands.dtype == torch.float64 else 32
    return radix_select(lambda prefix, shift: digit_counts(operands, k, prefix, shift), rank, bits)


def radix_select(counts: Callable[[int, int], npt.NDArray[np.int64]], rank: int, bits: int = 32) -> float:
    """Return the `rank`-th largest of non-negative numbers that are known by histograms of their bit patterns.

    Args:
        counts: ``(prefix, shift) → (2¹⁶,)``: how often each value of the bits shift … shift + 15 occurs among
            the numbers whose higher bits are `prefix`.
        rank: 1 is the largest.
        bits: width of the numbers, 32 or 64.
    """
    prefix = 0
    for shift in range(bits - 16, -1, -16):
        found = counts(prefix, shift)
        above = np.cumsum(found[::-1])[::-1]
        digit = int(np.flatnonzero(above >= rank)[-1])
        rank -= int(above[digit] - found[digit])
        prefix = prefix << 16 | digit
    pattern = np.array(prefix, dtype=f"u{bits // 8}")
    return float(pattern.view(f"f{bits // 8}"))


def digit_counts(operands: Operands, k: int, prefix: int, shift: int) -> npt.NDArray[np.int64]:
    """Count bits shift … shift + 15 of |δ| among the elements whose higher bits are `prefix`.

    Returns ``(2¹⁶,)``.
    """
    bits = 64 if operands.dtype == torch.float64 else 32
    total = np.zeros(1 << 16, dtype=np.int64)
    if native.usable(operands):
        for start in range(0, operands.size, STRIP):
            stop = min(start + STRIP, operands.size)
            native.count_digits(operands, k, start, stop, prefix, shift, total)
        return total
    for chunk in operands.chunks(_BLOCK):
        keys: npt.NDArray[Any] = chunk.delta(k).abs_().cpu().numpy().view(f"u{bits // 8}")
        digits = keys >> keys.dtype.type(shift)
        if shift < bits - 16:
            digits = digits[digits >> keys.dtype.type(16) == prefix] & keys.dtype.type(0xFFFF)
        total += np.bincount(digits.astype(np.intp), minlength=1 << 16)
    return total
