"""Task vectors as matrices: what the methods of dense linear algebra share.

A formula sees the task vectors of one weight as K matrices A_k ``(m, n)``, in blocks of rows: τ_k as it is
stored, or τ_kᵀ where n is to be the other side. It may pass over the blocks as often as it likes, and ends with
a function from the rows of all A_k to the rows of the merged matrix. So nothing of an embedding's size is ever
held, and what is held are matrices over the n columns.

Singular vectors come from Gram matrices in float64: their eigenvalues are squared singular values, good to
1e-8 of the largest singular value, which float32 decompositions do not reach. Everything is restricted to the
numerical rank, so that no result depends on how an algorithm fills a null space.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from evomerge.methods.kernels import DeltaCombination, Values
from evomerge.methods.operands import Chunk, Operands
from evomerge.methods.registry import Parameter
from evomerge.threads import one_thread_per_operation

WEIGHT = Parameter(
    "weight", "expert", "Factor of the expert's task vector; 0 leaves the expert out altogether.", 1.0
)

BLOCK = 1 << 20
"""Elements of a block of rows. Fixed, since products of matrices round by the shape of the blocks."""

PARALLEL = 1e-5
"""Unit vectors whose span has a singular value below this count as linearly dependent."""

T = TypeVar("T")

_EPSILON = torch.finfo(torch.float64).eps
_SKETCHES = (8, 32, 128, 512)
_SEED = 0


class TaskMatrices:
    """The task vectors of one weight as matrices A_k, read in blocks of rows.

    Experts of weight 0 are left out. Where the rows of all A_k span few dimensions, as those of LoRA experts
    do, blocks hold coordinates in an orthonormal basis R ``(n, l)`` of that span instead: A_k R.

    Args:
        operands: a matrix of every model.
        weights: one number per input.
        turned: A_k is τ_kᵀ instead of τ_k.

    Attributes:
        operands: as given.
        experts: indices of the inputs that take part.
        weights: theirs, none of them 0.
        turned: as given.
        shape: ``(m, n)`` of the A_k.
        outputs: whether the n columns are the layer's outputs, not its inputs.
        norms: ‖A_k‖_F.
        height: rows of a block; the last may have fewer.
        noise: singular values up to this one may be nothing but the rounding of the checkpoints.
        basis: R, or None.
    """

    def __init__(self, operands: Operands, weights: Sequence[float], *, turned: bool) -> None:
        self.operands = operands
        self.experts = tuple(k for k, w in enumerate(weights) if w != 0)
        self.weights = tuple(weights[k] for k in self.experts)
        self.turned = turned
        rows, columns = operands.shape
        self.shape = (columns, rows) if turned else (rows, columns)
        self.outputs = turned != operands.transposed
        self.basis: Tensor | None = None
        self.height = max(1, BLOCK // self.shape[1])
        self._whole: list[Tensor] | None = None
        if turned:
            self._whole = [operands.whole(k).sub_(operands.whole_base()).T for k in self.experts]
        squares = [0.0] * len(self.experts)
        for block in self.blocks():
            for i, a in enumerate(block):
                squares[i] += float(a.square().sum())
        self.norms = tuple(math.sqrt(square) for square in squares)
        self.noise = self._noise()

    def _noise(self) -> float:
        """A spectral norm that independent rounding errors of the weights do not reach."""
        square = sum(float(c.base().double().square().sum()) for c in self.operands.fork().chunks(BLOCK))
        size = math.sqrt(self.operands.size)
        largest = (math.sqrt(square) + max(self.norms, default=0.0)) / size
        return torch.finfo(self.operands.dtype).eps * largest * sum(map(math.sqrt, self.shape))

    def cached(self, what: str, build: Callable[[], T], *, weighted: bool = False) -> T:
        """Return what `build` finds, from the cache if there is one.

        Args:
            what: names it; it depends on nothing but the parents and this name.
            build: makes it.
            weighted: it depends on the weights as well, and is kept where they are all 1.
        """
        if weighted and any(w != 1 for w in self.weights):
            return build()
        turned = " turned" if self.turned else ""
        return self.operands.cached(f"{what} of {self.experts}{turned}", build)

    def evened(self) -> tuple[TaskMatrices, float]:
        """Return the same with weights 1, and w, if all weights are w; else itself and 1.

        What is found for weights 1 depends on the parents alone.
        """
        if len(set(self.weights)) > 1:
            return self, 1.0
        other = copy.copy(self)
        other.weights = (1.0,) * len(self.weights)
        return other, self.weights[0]

    def blocks(self) -> Iterator[list[Tensor]]:
        """Yield the rows of every A_k (or A_k R), float64, one block after another."""
        for start in range(0, self.shape[0], self.height):
            yield self.rows(start)

    def rows(self, start: int) -> list[Tensor]:
        """Return the block that begins at row `start`."""
        stop = min(start + self.height, self.shape[0])
        if self._whole is not None:
            block = [a[start:stop].double() for a in self._whole]
        else:
            width = self.shape[1]
            (chunk,) = self.operands.fork().chunks(BLOCK + width, start * width, stop * width)
            block = [chunk.delta(k).to(torch.float64, copy=True).reshape(-1, width) for k in self.experts]
        return block if self.basis is None else [a @ self.basis for a in block]

    def sums(self) -> Iterator[Tensor]:
        """Yield the rows of M = Σ w_k A_k."""
        return (self.total(block) for block in self.blocks())

    def total(self, block: Sequence[Tensor]) -> Tensor:
        """Return the rows of M that belong to a block."""
        total = block[0] * self.weights[0]
        for a, w in zip(block[1:], self.weights[1:], strict=True):
            total.add_(a, alpha=w)
        return total

    def expand(self, rows: Tensor) -> Tensor:
        """Return rows in coordinates of R as rows of n columns."""
        return rows if self.basis is None else rows @ self.basis.T

    def compress(self) -> None:
        """Find the basis R, if the rows of all A_k span at most a quarter of the n dimensions (and 512).

        A random sketch of the span (Halko, Martinsson & Tropp 2011, arXiv 0909.4061, algorithm 4.1), first a
        small one, accepted only if what lies outside of it is rounding noise.
        """
        self.basis = self.cached("row space", self._row_space)

    def _row_space(self) -> Tensor | None:
        found = None
        for length in _SKETCHES:
            if found is None and length <= self.shape[1] // 4 and any(self.norms):
                found = self._row_space_within(length)
        return found

    def _row_space_within(self, length: int) -> Tensor | None:
        """Return an orthonormal basis of the rows' span if it has fewer than `length` dimensions."""
        m, n = self.shape
        generator = torch.Generator().manual_seed(_SEED)
        sketch: Tensor | None = None
        for block in self.blocks():
            for a in block:
                mixed = a.T @ torch.randn(len(a), length, generator=generator, dtype=a.dtype).to(a.device)
                sketch = mixed if sketch is None else sketch.add_(mixed)
        assert sketch is not None
        basis: Tensor
        basis, triangle = torch.linalg.qr(sketch)
        spread = torch.linalg.svdvals(triangle)
        if spread[-1] > PARALLEL * spread[0]:
            return None
        outside, products = 0.0, torch.zeros(length, length, dtype=torch.float64, device=basis.device)
        for block in self.blocks():
            for a in block:
                inside = a @ basis
                outside += float((a - inside @ basis.T).square().sum())
                products.addmm_(inside.T, inside)
        elementwise = self.noise / sum(map(math.sqrt, self.shape)) * math.sqrt(m * n * len(self.experts))
        if math.sqrt(outside) > elementwise + math.sqrt(_EPSILON) * max(self.norms):
            return None
        vectors, _ = self.spectrum(products)
        return basis @ vectors

    def spectrum(
        self, products: Tensor, most: int | None = None, *, noise: float | None = None, size: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Return right singular vectors V ``(n, r)`` and singular values ``(r,)``, descending.

        Args:
            products: AᵀA ``(n, n)`` of the matrix A.
            most: no more than so many; by default all of the numerical rank.
            height: rows of a block; the last may have fewer.
        noise: singular values up to this one do not count; by default `noise` of the A_k.
            size: of what A is the remainder of, in the same norm.
        """
        squares, vectors = torch.linalg.eigh(products)
        values = squares.clamp(min=0).sqrt().flip(0)
        noise = self.noise if noise is None else noise
        floor = max(noise, math.sqrt(len(values) * _EPSILON) * max(float(values[0]), size))
        rank = int((values > floor).sum())
        rank = rank if most is None else min(rank, most)
        return vectors.flip(1)[:, :rank], values[:rank]


def gram(blocks: Iterable[Tensor]) -> Tensor:
    """Return AᵀA of a matrix given in blocks of rows."""
    products: Tensor | None = None
    for block in blocks:
        products = block.T @ block if products is None else products.addmm_(block.T, block)
    assert products is not None, "a matrix without rows"
    return products


def weighted(block: Sequence[Tensor], transforms: Sequence[Tensor]) -> Tensor:
    """Return rows of Σ A_k X_k."""
    total = block[0] @ transforms[0]
    for a, x in zip(block[1:], transforms[1:], strict=True):
        total.addmm_(a, x)
    return total


def inverse_root(products: Tensor) -> Tensor:
    """Return (UᵀU)^(-1/2) of UᵀU ``(p, p)``, on its numerical range: U (UᵀU)^(-1/2) is U's polar factor."""
    values: Tensor
    vectors: Tensor
    values, vectors = torch.linalg.eigh(products)
    kept = values > PARALLEL**2
    return vectors[:, kept] / values[kept].sqrt() @ vectors[:, kept].T


Rows = Callable[[Sequence[Tensor], int], Tensor]
"""``(block of every A_k, its first row) → merged rows (b, n)``."""


@dataclass(frozen=True)
class Factors:
    """Matrices that depend on the parents alone, as one value of a cache."""

    parts: tuple[Tensor, ...]

    @property
    def nbytes(self) -> int:
        """Memory of all of them."""
        return sum(part.nbytes for part in self.parts)


def narrow(operands: Operands, experts: int) -> bool:
    """Turn matrices that are wider than high: Gram matrices are then taken over the shorter side."""
    return operands.shape[0] < operands.shape[1]


def _mean(values: Values) -> Sequence[float]:
    count = sum(w != 0 for w in values["weight"])
    return [values["lambda"] * w / max(count, 1) for w in values["weight"]]


MEAN = DeltaCombination(_mean)


@dataclass(frozen=True)
class MatrixMerge:
    """θ = θ_0 + λ f(τ_1, …, τ_K) for matrices; θ_0 + λ mean(w_k τ_k) for tensors of other ranks.

    A matrix is every tensor with two dimensions, embeddings and heads included, as in the authors' code of
    the methods that use it. Without a term (λ or all w_k are 0) the base is copied bit for bit. All work runs
    on one thread per operation, so that the bits do not depend on how many there are.

    Attributes:
        formula: f, as a function of (A_k, values).
        turned: of (operands, number of experts), whether A_k is τ_kᵀ.
    """

    formula: Callable[[TaskMatrices, Values], Rows]
    turned: Callable[[Operands, int], bool] = narrow

    def prepare(self, operands: Operands, values: Values) -> Any:
        count = sum(w != 0 for w in values["weight"])
        if len(operands.shape) != 2 or count == 0 or values["lambda"] == 0:
            return MEAN.prepare(operands, values)
        with one_thread_per_operation():
            turned = self.turned(operands, count)
            deltas = TaskMatrices(operands, values["weight"], turned=turned)
            if not all(map(math.isfinite, deltas.norms)):
                # The elements that are not finite stay so; the caller finds and names them.
                return MEAN.prepare(operands, values)
            deltas.compress()
            return _Merged(deltas, self.formula(deltas, values), values["lambda"])

    def apply(self, plan: Any, chunk: Chunk, out: Tensor) -> None:
        if not isinstance(plan, _Merged):
            MEAN.apply(plan, chunk, out)
            return
        plan.read(chunk.start, chunk.stop, out)
        out.mul_(plan.scale).add_(chunk.base())


class _Merged:
    """The merged task vector f, flat: computed block by block when it is read, and the last block kept.

    Where A_k is turned, a block of its rows lies across the tensor: there all are computed at once, and the
    A_k are let go.
    """

    def __init__(self, deltas: TaskMatrices, rows: Rows, scale: float) -> None:
        self.scale = scale
        self._operands, self._last = deltas.operands, (-1, torch.empty(0))
        self._block: Callable[[int], Tensor]
        if deltas.turned:
            whole = torch.empty(
                self._operands.shape, dtype=self._operands.dtype, device=self._operands.device
            )
            for start in range(0, deltas.shape[0], deltas.height):
                block = rows(deltas.rows(start), start)
                whole[:, start : start + len(block)].copy_(block.T)
            self._length, self._block = whole.numel(), lambda first: whole
        else:
            width = deltas.shape[1]
            self._length = deltas.height * width
            self._block = lambda first: rows(deltas.rows(first // width), first // width)

    def read(self, start: int, stop: int, out: Tensor) -> None:
        """Write the elements ``start:stop`` to `out`."""
        for index in range(start // self._length, -(-stop // self._length)):
            first = index * self._length
            last, block = self._last
            if last != index:
                with one_thread_per_operation():
                    block = self._block(first).to(self._operands.dtype).reshape(-1)
                self._last = (index, block)
            begin, end = max(start, first), min(stop, first + self._length)
            out[begin - start : end - start].copy_(block[begin - first : end - first])
