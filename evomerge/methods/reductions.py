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
from evomerge.methods.operands import RUN, RUNS, STRIP, Operands

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


def order_statistics(operands: Operands, wanted: Sequence[tuple[int, int]]) -> list[float]:
    """Return, for each (k, rank), the `rank`-th largest |θ_k − θ_0|, exactly; rank 1 is the largest.

    With a cache, the distinct magnitudes are listed once, and every further rank is a binary search: deltas
    of 16-bit checkpoints have few (some ten thousand among millions of elements). Where there are too many
    of them to keep, and without a cache, the ranks are selected: `select_near` if the tensor's elements
    are spread as its sample says, else `select`.

    Args:
        operands: the tensor of every model.
        wanted: index of the input, and rank in 1 … n.
    """
    found: dict[tuple[int, int], float | None] = {}
    for k, rank in wanted:
        what = f"distinct magnitudes of {k}"
        if operands.known(what) or operands.caching:
            magnitudes = operands.cached(what, lambda k=k: list_magnitudes(operands, k))  # type: ignore[misc]
            if magnitudes is not None:
                found[k, rank] = magnitudes.largest(rank)
    left = [each for each in dict.fromkeys(wanted) if each not in found]
    found.update(zip(left, select_near(operands, left), strict=True))
    chosen = ((k, rank, found[k, rank]) for k, rank in wanted)
    return [select(operands, k, rank) if value is None else value for k, rank, value in chosen]


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


def select_near(operands: Operands, wanted: Sequence[tuple[int, int]]) -> list[float | None]:
    """Return the order statistics of `order_statistics`, or None for those where a sample misjudges where they lie.

    The sample brackets each value within six standard errors; one pass over all of them counts what is larger, and
    what is equal to the bounds and to the sample's own quantile, and collects the others inside. Deltas of 16-bit
    checkpoints repeat few values, which are counted for the most part.
    """
    if not wanted:
        return []
    brackets = [_bracket(operands, k, rank) for k, rank in wanted]
    most = max(operands.size // 8, _SHORT)
    file = native.file_magnitudes if native.usable(operands) else _file_magnitudes
    filed = file(operands, [k for k, _ in wanted], brackets, most)
    return [
        _ranked(*each, rank)
        for each, (_, rank) in zip(zip(brackets, filed, strict=True), wanted, strict=True)
    ]


def _bracket(operands: Operands, k: int, rank: int) -> tuple[float, float, float]:
    """Return where a sample says that an order statistic lies: at least, most likely, at most."""
    n = operands.size
    sample = operands.sample(k).abs_().cpu().numpy()
    center = min(math.floor(sample.size * (1 - rank / n)), sample.size - 1)
    middle = native.nth(sample.copy(), center)
    error = math.sqrt(rank * (1 - rank / n) / n * sample.size)
    if sample.size == RUNS * RUN:
        # Neighbours are alike in some tensors: then the runs differ by more than chance.
        above = (sample.reshape(-1, RUN) > middle).sum(axis=1)
        error = max(error, float(above.std()) * math.sqrt(above.size))
    spread = 6 * error + 2
    first, last = math.floor(center - spread), math.ceil(center + 1 + spread)
    low = native.nth(sample.copy(), first) if first >= 0 else 0.0
    high = native.nth(sample, last) if last < sample.size else math.inf
    return low, middle, high


def _ranked(bracket: tuple[float, float, float], filed: native.Filed, rank: int) -> float | None:
    """Return the `rank`-th largest magnitude, or None if it is not within the bracket."""
    low, middle, high = bracket
    inside = filed.inside
    rank -= filed.above
    if inside is None or rank <= 0:
        return None
    larger = int(np.count_nonzero(inside > middle))
    groups: list[tuple[int, float | None]] = [(filed.at_high, high), (larger, None)]
    groups += [(filed.at_middle, middle)] if middle < high else []
    groups += [(inside.size - larger, None)]
    groups += [(filed.at_low, low)] if low < middle else []
    skipped = 0
    for count, value in groups:
        if rank <= count:
            if value is not None:
                return value
            at = inside.size - skipped - rank
            return native.nth(inside, at, low, high)
        rank -= count
        skipped += count if value is None else 0
    return None


def _file_magnitudes(
    operands: Operands, inputs: Sequence[int], brackets: Sequence[tuple[float, float, float]], most: int
) -> list[native.Filed]:
    """Do what `native.file_magnitudes` does, in plain torch."""
    results = []
    for k, (low, middle, high) in zip(inputs, brackets, strict=True):
        counts, inside, left = np.zeros(4, dtype=np.int64), [], most
        for chunk in operands.chunks(operands.strip):
            x = chunk.delta(k).abs_().cpu().numpy()
            counts += [
                np.count_nonzero(x > high),
                *(np.count_nonzero(x == each) for each in (high, middle, low)),
            ]
            inside.append(x[(x > low) & (x < high) & (x != middle)])
            left -= inside[-1].size
            if left < 0:
                break
        above, at_high, at_middle, at_low = map(int, counts)
        collected = np.concatenate(inside) if left >= 0 else None
        results.append(native.Filed(above, at_high, at_middle, at_low, collected))
    return results


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
