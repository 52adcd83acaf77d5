"""TIES: trim, elect sign, disjoint merge.

Yadav et al. 2023, TIES-Merging: resolving interference when merging models (arXiv 2306.01708), §3.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from evomerge.methods.kernels import Sparse, Sparsify, Values, active
from evomerge.methods.operands import STRIP, Chunk, Operands
from evomerge.methods.reductions import kth_magnitude
from evomerge.methods.registry import MergeMethod, Parameter, register
from evomerge.methods.task_arithmetic import LAMBDA

WEIGHT = Parameter(
    "weight", "expert", "Factor of the expert's trimmed task vector, in the election and in the mean.", 1.0
)


def trim(operands: Operands, values: Values) -> Sparse:
    """Step 1, per tensor: keep the |τ_k| that reach the ⌊density · n⌋-th largest (at least the first).

    Entries equal to that value are all kept, so that the result depends on no order.
    """
    n = operands.size
    below = []
    for k, density in enumerate(values["density"]):
        rank = max(1, math.floor(density * n + 1e-9))
        least = torch.tensor(kth_magnitude(operands, k, rank) if rank < n else 0.0, dtype=operands.dtype)
        below.append(torch.nextafter(least, torch.tensor(-1.0, dtype=operands.dtype)).item())

    def keep(k: int, delta: Tensor, start: int) -> None:
        if below[k] >= 0:
            torch.hardshrink(delta, below[k], out=delta)

    return Sparse((1.0,) * len(operands.inputs), keep)


_ROWS = ("positive", "negative", "positives", "negatives")


@dataclass(frozen=True)
class _Plan:
    sparse: Sparse
    terms: list[tuple[int, float]]
    scale: float
    majority: Callable[[], int]


@dataclass(frozen=True)
class DisjointMean:
    """Steps 2 and 3 on q_k = w_k τ̂_k: θ = θ_0 + λ mean of the q_k that have the elected sign.

    The elected sign of an element is the sign of Σ_k q_k; where positive and negative mass are equal, it is
    the tensor's majority: the sign of the sum of all elected signs, as in the authors' code (if that is 0
    too, the element stays at θ_0). The mean divides by the number of q_k with the elected sign; weights do
    not enter the divisor, so that the scale of the weights is the scale of the merged delta, and negative
    weights are as good as positive ones. With all w_k = 1 this is the paper's rule. An expert with w_k = 0
    neither votes nor counts.

    Attributes:
        sparsify: step 1.
    """

    sparsify: Sparsify

    def prepare(self, operands: Operands, values: Values) -> _Plan:
        scale: float = values["lambda"]
        if scale == 0 or not any(values["weight"]):
            return _Plan(Sparse((), lambda k, delta, start: None), [], scale, lambda: 0)
        sparse = self.sparsify(operands, values)
        terms = active(values["weight"], sparse)

        @cache
        def majority() -> int:
            votes = 0
            for chunk in operands.fork().chunks(STRIP):
                positive, negative, *_ = _masses(sparse, terms, chunk)
                votes += int(positive.add_(negative).sign_().to(torch.int32).sum())
            return (votes > 0) - (votes < 0)

        return _Plan(sparse, terms, scale, majority)

    def apply(self, plan: _Plan, chunk: Chunk, out: Tensor) -> None:
        if not plan.terms:
            out.copy_(chunk.base())
            return
        positive, negative, positives, negatives = _masses(plan.sparse, plan.terms, chunk)
        elected = torch.add(positive, negative, out=chunk.row("input")).sign_()
        tied = torch.sign(positive, out=chunk.row("part"))
        tied.sub_(torch.abs(elected, out=out)).clamp_(min=0)
        if tied.max() > 0:
            elected.add_(tied.mul_(plan.majority()))
        # Arithmetic on signs instead of torch.where, which branches on every element.
        positive.div_(positives.clamp_(min=1)).mul_(torch.clamp(elected, min=0, out=out))
        negative.div_(negatives.clamp_(max=-1)).mul_(elected.clamp_(max=0))
        torch.add(positive, negative, out=out)
        out.mul_(plan.scale).add_(chunk.base())


def _masses(sparse: Sparse, terms: list[tuple[int, float]], chunk: Chunk) -> tuple[Tensor, ...]:
    """Return Σ of the positive q_k, Σ of the negative ones, and how many there are of each, ``(m,)`` each.

    The number of negative ones is itself negative.
    """
    positive, negative, positives, negatives = (chunk.row(name) for name in _ROWS)
    for i, (k, c) in enumerate(terms):
        q = chunk.delta(k)
        sparse.keep(k, q, chunk.start)
        if c != 1:
            q.mul_(c)
        if i == 0:
            torch.clamp(q, min=0, out=positive)
            torch.sub(q, positive, out=negative)
            torch.sign(positive, out=positives)
            torch.sign(negative, out=negatives)
        else:
            part = torch.clamp(q, min=0, out=chunk.row("part"))
            q.sub_(part)
            positive.add_(part)
            negative.add_(q)
            positives.add_(part.sign_())
            negatives.add_(q.sign_())
    return positive, negative, positives, negatives


register(
    MergeMethod(
        name="ties",
        summary="Keep each task vector's largest entries, elect a sign per element, average what agrees.",
        paper="Yadav et al. 2023, TIES-Merging, arXiv 2306.01708",
        inputs=(1, None),
        base="origin",
        parameters=(
            WEIGHT,
            Parameter(
                "density", "expert", "Share of each tensor's delta that survives the trim.", 0.2, 0.0, 1.0
            ),
            LAMBDA,
        ),
        kernels={"paper": DisjointMean(trim)},
    )
)
