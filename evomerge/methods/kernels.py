"""The shapes of arithmetic that merge methods are made of.

A method's file states its formula: how coefficients follow from parameters (and from a Gram matrix), how
deltas are made sparse, how they are combined. The kernels here run it: whole-tensor reductions first
(`prepare`; what does not depend on the candidate comes from the cache), then one chunk after another
(`apply`). A `FusedKernel` can also be computed by one C function, with the same bits. Elementwise arithmetic is
float32 (float64 if an operand is) as separate multiplications and additions, so that no result depends on chunk
size, thread count or fused instructions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from evomerge.methods.native import BASE, Fused, Sparsity, Term
from evomerge.methods.operands import Chunk, Operands
from evomerge.methods.reductions import Basis, Gram, gram

Values = Mapping[str, Any]
"""A method's parameters, complete: a tuple with one number per input (scope expert), or one scalar."""


class Kernel(Protocol):
    """The arithmetic of a merge method."""

    def prepare(self, operands: Operands, values: Values) -> Any:
        """Do the whole-tensor work for one set of values; returns the plan that `apply` takes."""

    def apply(self, plan: Any, chunk: Chunk, out: Tensor) -> None:
        """Write the merged elements of one chunk to `out`, ``(m,)`` in the arithmetic's dtype."""


@runtime_checkable
class FusedKernel(Protocol):
    """A kernel that a C function computes as well."""

    def fused(self, plan: Any) -> Fused | None:
        """Return what to compute for a plan from `prepare`; None: `apply` has to do it."""


@dataclass(frozen=True)
class Sparse:
    """How the deltas of one tensor are made sparse.

    Attributes:
        scales: factor of the kept entries of each input; 0 means that nothing of that input is kept.
        keep: ``keep(k, delta, start)`` zeroes, in place, what is not kept of input k's delta, a chunk that
            begins at element `start`.
        rules: the same as data, one for each input; None where it is nothing that the C kernels know.
    """

    scales: tuple[float, ...]
    keep: Callable[[int, Tensor, int], None]
    rules: tuple[Sparsity, ...] | None = None


Sparsify = Callable[[Operands, Values], Sparse]


def dense(operands: Operands, values: Values) -> Sparse:
    """Keep every delta as it is."""
    count = len(operands.inputs)
    return Sparse((1.0,) * count, lambda k, delta, start: None, (None,) * count)


@dataclass(frozen=True)
class LinearCombination:
    """Σ c_k θ_k.

    Terms with c_k = 0 are left out, so that a coefficient of 1 alone copies its input bit for bit.

    Attributes:
        coefficients: the formula: values → c.
    """

    coefficients: Callable[[Values], Sequence[float]]

    def prepare(self, operands: Operands, values: Values) -> Sequence[float]:
        return self.coefficients(values)

    def apply(self, plan: Sequence[float], chunk: Chunk, out: Tensor) -> None:
        combine(plan, chunk, out)

    def fused(self, plan: Sequence[float]) -> Fused:
        return fused_combination(plan)


@dataclass(frozen=True)
class GramCombination:
    """Σ c_k θ_k with coefficients that depend on the inputs through their inner products.

    Attributes:
        basis: of which vectors (`reductions.gram`).
        coefficients: the formula: ``(basis vectors' Gram matrix, values) → c``.
    """

    basis: Basis
    coefficients: Callable[[Gram, Values], Sequence[float]]

    def prepare(self, operands: Operands, values: Values) -> Sequence[float]:
        products = operands.cached(f"gram of {self.basis}", lambda: gram(operands, self.basis))
        return self.coefficients(products, values)

    def apply(self, plan: Sequence[float], chunk: Chunk, out: Tensor) -> None:
        combine(plan, chunk, out)

    def fused(self, plan: Sequence[float]) -> Fused:
        return fused_combination(plan)


def fused_combination(coefficients: Sequence[float]) -> Fused:
    """Return what `combine` computes."""
    return Fused("combine", tuple(Term(k, c) for k, c in enumerate(coefficients) if c != 0))


def combine(coefficients: Sequence[float], chunk: Chunk, out: Tensor) -> None:
    """Write Σ c_k θ_k to `out`, inputs in order; no term for c_k = 0."""
    empty = True
    for k, c in enumerate(coefficients):
        if c == 0:
            continue
        if empty:
            torch.mul(chunk.input(k), c, out=out)
            empty = False
        else:
            out.add_(torch.mul(chunk.input(k), c, out=chunk.row("input")))
    if empty:
        out.zero_()


@dataclass(frozen=True)
class DeltaCombination:
    """θ_0 + Σ c_k τ̂_k, where τ̂_k is what `sparsify` keeps of τ_k = θ_k − θ_0.

    The sum is taken over the deltas first and added to θ_0 once. Without a term (all c_k = 0) the base is
    copied bit for bit; of dense deltas, a coefficient of 1 alone copies its input bit for bit.

    Attributes:
        coefficients: the formula: values → c.
        sparsify: how deltas are made sparse.
    """

    coefficients: Callable[[Values], Sequence[float]]
    sparsify: Sparsify = dense

    def prepare(self, operands: Operands, values: Values) -> tuple[Sparse, list[tuple[int, float]]]:
        sparse = self.sparsify(operands, values)
        return sparse, active(self.coefficients(values), sparse)

    def apply(self, plan: tuple[Sparse, list[tuple[int, float]]], chunk: Chunk, out: Tensor) -> None:
        sparse, terms = plan
        if not terms:
            out.copy_(chunk.base())
            return
        if self.sparsify is dense and len(terms) == 1 and terms[0][1] == 1:
            out.copy_(chunk.input(terms[0][0]))
            return
        for i, (k, c) in enumerate(terms):
            delta = chunk.delta(k)
            sparse.keep(k, delta, chunk.start)
            if i == 0:
                torch.mul(delta, c, out=out)
            else:
                out.add_(delta.mul_(c))
        out.add_(chunk.base())

    def fused(self, plan: tuple[Sparse, list[tuple[int, float]]]) -> Fused | None:
        sparse, terms = plan
        if not terms:
            return Fused("combine", (Term(BASE),))
        if self.sparsify is dense and len(terms) == 1 and terms[0][1] == 1:
            return Fused("combine", (Term(terms[0][0]),))
        if sparse.rules is None:
            return None
        return Fused("deltas", (Term(BASE), *(Term(k, c, sparse.rules[k]) for k, c in terms)))


@dataclass(frozen=True)
class DenseAlgebra:
    """Methods that need a tensor as a whole (factorisations, solves): computed at once, then cut into chunks.

    Attributes:
        formula: ``(operands, values) → θ`` in the arithmetic's dtype, of the operands' size in any shape.
    """

    formula: Callable[[Operands, Values], Tensor]

    def prepare(self, operands: Operands, values: Values) -> Tensor:
        return self.formula(operands, values).reshape(-1)

    def apply(self, plan: Tensor, chunk: Chunk, out: Tensor) -> None:
        out.copy_(plan[chunk.start : chunk.stop])


def active(coefficients: Sequence[float], sparse: Sparse) -> list[tuple[int, float]]:
    """Return (k, c_k · scale_k) of the inputs that contribute."""
    scaled = ((k, c * scale) for k, (c, scale) in enumerate(zip(coefficients, sparse.scales, strict=True)))
    return [(k, c) for k, c in scaled if c != 0]
