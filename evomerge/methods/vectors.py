"""Combinations whose coefficients follow from angles and norms, of a whole tensor or of each row or column."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from evomerge.errors import CandidateFailed
from evomerge.methods.kernels import (
    DeltaCombination,
    Sparse,
    Values,
    active,
    combine,
    dense,
    fused_combination,
)
from evomerge.methods.native import Fused
from evomerge.methods.operands import Chunk, Operands
from evomerge.methods.reductions import Basis, Gram, gram, read_vectors

Axis = Literal["none", "out", "in"]
"""What counts as one vector of a tensor W: all of it, W[i, :] (one output neuron), or W[:, j] (one input)."""

RESOLUTION = 1e-7
"""What a sum of unit vectors must exceed in length for its direction to be known from float64 inner products."""

NEGLIGIBLE = 1e-8
"""Norm, relative to the longest vector's, up to which a vector has no direction."""

_BLOCK = 1 << 17

_TURNED: dict[Axis, Axis] = {"none": "none", "out": "in", "in": "out"}


@dataclass(frozen=True)
class Layout:
    """How a tensor of `rows` · `columns` elements is cut into vectors.

    A tensor with more than two dimensions is a matrix in one of two ways: its vectors along the last
    dimension are the rows of ``out``, those along the first are the columns of ``in``. A tensor with fewer is
    one vector, whatever the axis.
    """

    axis: Axis
    rows: int
    columns: int

    @classmethod
    def of(cls, shape: Sequence[int], axis: Axis) -> Layout:
        """Return the layout of a tensor that is not empty."""
        size = math.prod(shape)
        if axis == "none" or len(shape) < 2:
            return cls("none", 1, size)
        columns = shape[-1] if axis == "out" else size // shape[0]
        return cls(axis, size // columns, columns)

    @property
    def vectors(self) -> int:
        """Number of vectors."""
        return {"none": 1, "out": self.rows, "in": self.columns}[self.axis]

    def blocks(self) -> Iterator[tuple[slice, slice]]:
        """Cut the matrix into pieces that lie together in memory: (rows, columns) of each, in order."""
        height = max(1, _BLOCK // self.columns)
        for row in range(0, self.rows, height):
            for column in range(0, self.columns, _BLOCK):
                yield (
                    slice(row, min(row + height, self.rows)),
                    slice(column, min(column + _BLOCK, self.columns)),
                )

    def spread(self, values: Tensor, start: int, out: Tensor) -> Tensor:
        """Write to `out` the value of the vector that each of the elements from `start` on belongs to.

        Args:
            values: ``(vectors,)``.
            start: first element.
            out: ``(m,)``.
        """
        done = 0
        while done < out.numel():
            row, column = divmod(start + done, self.columns)
            height = (out.numel() - done) // self.columns if column == 0 else 0
            width = self.columns if height else min(self.columns - column, out.numel() - done)
            part = out[done : done + max(1, height) * width].view(-1, width)
            if self.axis == "out":
                part.copy_(values[row : row + max(1, height), None])
            else:
                part.copy_(values[column : column + width])
            done += part.numel()
        return out


def vector_grams(operands: Operands, basis: Basis, layout: Layout) -> Gram:
    """Return the inner products of the K tensors' vectors, ``(vectors, K, K)`` float64.

    Products are added in float64 within a block as a binary tree, block after block: the bits depend on the
    tensor's shape alone.
    """
    count = len(operands.inputs)
    dim = 1 if layout.axis == "out" else 0
    pairs = [(i, j) for i in range(count) for j in range(i, count)]
    device = operands.device
    sums = torch.zeros(len(pairs), layout.vectors, dtype=torch.float64, device=device)
    rows = torch.empty(count + 2, min(operands.size, _BLOCK), dtype=torch.float64, device=device)
    for across, down in layout.blocks():
        height, width = across.stop - across.start, down.stop - down.start
        start = across.start * layout.columns + down.start
        vectors = read_vectors(operands, basis, start, start + height * width, rows)
        product = rows[count + 1, : height * width]
        for total, (i, j) in zip(sums, pairs, strict=True):
            torch.mul(vectors[i], vectors[j], out=product)
            part = total[across] if dim else total[down]
            part.add_(_folded(product.view(height, width), dim))
    matrix = np.empty((layout.vectors, count, count))
    for total, (i, j) in zip(sums.cpu().numpy(), pairs, strict=True):
        matrix[:, i, j] = matrix[:, j, i] = total
    return matrix


def _folded(block: Tensor, dim: int) -> Tensor:
    """Return the sums over one of two dimensions, added pairwise and elementwise; overwrites `block`."""
    width = block.shape[dim]
    while width > 1:
        half = (width + 1) // 2
        block.narrow(dim, 0, width - half).add_(block.narrow(dim, half, width - half))
        width = half
    return block.select(dim, 0)


def lengths(products: Gram) -> tuple[Gram, Gram]:
    """Return the K vectors' norms and their inverses, ``(vectors, K)`` each; 0 for one without direction.

    A vector of norm 0, or under 1e-8 of the longest one's, has no direction.

    Args:
        products: ``(vectors, K, K)``.
    """
    norms = np.sqrt(np.einsum("vkk->vk", products))
    longest = norms.max(axis=1, keepdims=True)
    with np.errstate(divide="ignore"):
        return norms, np.where(norms <= NEGLIGIBLE * longest, 0.0, 1 / norms)


def shares(method: str, weights: Sequence[float]) -> Gram:
    """Return w_k / Σ w_k, ``(K,)``.

    Raises:
        CandidateFailed: the weights cancel out.
    """
    total = sum(weights)
    if abs(total) <= 1e-8 * sum(map(abs, weights)):
        shown = ", ".join(f"{w:g}" for w in weights)
        raise CandidateFailed(f"{method}: the weights {shown} add up to 0 and cannot be normalized")
    return np.array([w / total for w in weights])


@dataclass(frozen=True)
class _Plan:
    """Attributes: layout of the vectors; coefficients ``(K, vectors)``; whether they are of deltas."""

    layout: Layout
    coefficients: Tensor
    deltas: bool
    sparse: Sparse


_DELTAS = DeltaCombination(lambda values: ())


@dataclass(frozen=True)
class VectorCombination:
    """Σ c_k θ_k, or θ_0 + Σ c_k τ_k where there is a base, with coefficients from norms and angles.

    Attributes:
        coefficients: the formula: ``(Gram matrices of the θ_k or τ_k, values) → c``, ``(vectors, K, K)`` and
            ``(vectors, K)``.
        axis: what is one vector, by values.
        as_stored: whether ``out`` and ``in`` mean the last and the first dimension of a layer that is kept
            transposed, too, and not its output neurons and inputs.
    """

    coefficients: Callable[[Gram, Values], Gram]
    axis: Callable[[Values], Axis] = lambda values: "none"
    as_stored: bool = False

    def prepare(self, operands: Operands, values: Values) -> _Plan:
        axis = self.axis(values)
        if operands.transposed and not self.as_stored:
            axis = _TURNED[axis]
        layout = Layout.of(operands.shape, axis)
        deltas = operands.base is not None
        basis: Basis = "deltas" if deltas else "inputs"
        key = f"gram of {basis}" + ("" if layout.axis == "none" else f" by {layout.axis}")
        if layout.axis == "none":
            products = operands.cached(key, lambda: gram(operands, basis))[None]
        else:
            products = operands.cached(key, lambda: vector_grams(operands, basis, layout))
        with np.errstate(all="ignore"):
            found = self.coefficients(products, values)
        coefficients = torch.from_numpy(np.ascontiguousarray(found.T))
        if layout.axis != "none":
            coefficients = coefficients.to(operands.device)
        return _Plan(layout, coefficients, deltas, dense(operands, values))

    def apply(self, plan: _Plan, chunk: Chunk, out: Tensor) -> None:
        if plan.layout.axis == "none":
            whole = plan.coefficients[:, 0].tolist()
            if plan.deltas:
                _DELTAS.apply((plan.sparse, active(whole, plan.sparse)), chunk, out)
            else:
                combine(whole, chunk, out)
            return
        if plan.deltas:
            out.copy_(chunk.base())
        else:
            out.zero_()
        for k, each in enumerate(plan.coefficients):
            if each.any():
                factor = plan.layout.spread(each, chunk.start, chunk.row("factor"))
                part = chunk.delta(k) if plan.deltas else chunk.input(k)
                out.add_(factor.mul_(part))

    def fused(self, plan: _Plan) -> Fused | None:
        if plan.layout.axis != "none":
            return None
        whole = plan.coefficients[:, 0].tolist()
        return (
            _DELTAS.fused((plan.sparse, active(whole, plan.sparse)))
            if plan.deltas
            else fused_combination(whole)
        )
