"""SCE: select, calculate, erase.

Wan et al. 2024, FuseChat: knowledge fusion of chat models (arXiv 2408.07990), §3.3.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from evomerge.methods.kernels import Sparse, Values
from evomerge.methods.norms import totals
from evomerge.methods.operands import STRIP, Chunk, Operands
from evomerge.methods.registry import MergeMethod, Parameter, register
from evomerge.methods.selection import ascending
from evomerge.methods.ties import Plan, Rule, Term, merge_disjoint, plan_disjoint

RULE = Rule(elect="sum", merge="weighted", tie="positive")


@dataclass(frozen=True)
class SelectCalculateErase:
    """θ = θ_0 + Σ_k w_k τ_k / Σ_k w_k, over the k whose τ_k has the sign of Σ_k τ_k.

    Select: the elements whose variance over the τ_k reaches the ⌊select_topk · N⌋-th largest of the N that are
    not 0; equal ones are all selected. Calculate: w_k ∝ Σ τ_k² over the selected elements; equal weights if all
    these are 0. Erase: what has the minority's sign (+ where the sum is 0).

    Attributes:
        masking: whether the merge leaves the other elements at θ_0, or selects for the weights alone.
    """

    masking: bool

    def prepare(self, operands: Operands, values: Values) -> tuple[Plan, float]:
        count, topk = len(operands.inputs), values["select_topk"]
        least = 0.0 if topk >= 1 else _variance_to_reach(operands, topk)
        energies = totals(_selected_squares(operands, least), count)
        weights = [e / sum(energies) for e in energies] if any(energies) else [1 / count] * count
        terms = [Term(k, 1.0, w, w) for k, w in enumerate(weights)]
        return plan_disjoint(operands, Sparse((1.0,) * count, _keep_all), terms, RULE, 1.0), least

    def apply(self, plan: tuple[Plan, float], chunk: Chunk, out: Tensor) -> None:
        merge, least = plan
        if self.masking and least > 0:
            selected = (_variance(chunk, len(merge.terms)) >= least).to(out.dtype)

            def keep(k: int, delta: Tensor, start: int) -> None:
                delta.mul_(selected)

            merge = replace(merge, sparse=Sparse(merge.sparse.scales, keep))
        merge_disjoint(merge, chunk, out)


def _keep_all(k: int, delta: Tensor, start: int) -> None:
    pass


def _variance(chunk: Chunk, count: int) -> Tensor:
    """Return K times the variance of each element's τ_1 … τ_K; 0 where they are equal."""
    first = chunk.row("first").copy_(chunk.delta(0))
    squares, sums = chunk.row("squares").zero_(), chunk.row("sums").zero_()
    for k in range(1, count):
        difference = chunk.delta(k).sub_(first)
        sums.add_(difference)
        squares.add_(difference.square_())
    return squares.sub_(sums.square_().div_(count)).clamp_(min=0)


def _variance_to_reach(operands: Operands, topk: float) -> float:
    """Return K times the smallest variance that is selected; infinite if none is."""
    count = len(operands.inputs)

    def variances() -> Iterator[Tensor]:
        return (_variance(chunk, count) for chunk in operands.fork().chunks(STRIP))

    varying = sum(int(torch.count_nonzero(variance)) for variance in variances())
    rank = math.floor(topk * varying + 1e-9)
    return ascending(variances, [operands.size - rank])[0] if rank else math.inf


def _selected_squares(operands: Operands, least: float) -> Iterator[Iterator[Tensor]]:
    """Yield, for each chunk, every input's τ_k² where the element is selected and 0 elsewhere."""
    count = len(operands.inputs)
    for chunk in operands.fork().chunks(STRIP):
        if least > 0:
            selected = (_variance(chunk, count) >= least).to(operands.dtype)
            yield (chunk.delta(k).square_().mul_(selected) for k in range(count))
        else:
            yield (chunk.delta(k).square_() for k in range(count))


register(
    MergeMethod(
        name="sce",
        summary="Weighted mean of the task vectors' entries of the elected sign; weights from what varies most.",
        paper="Wan et al. 2024, FuseChat, arXiv 2408.07990",
        inputs=(1, None),
        base="origin",
        parameters=(
            Parameter(
                "select_topk",
                "shared",
                "Share of the elements, among those on which the experts differ, that is selected.",
                0.1,
                0.0,
                1.0,
                defaults={"mergekit": 1.0},
            ),
        ),
        kernels={
            "paper": SelectCalculateErase(masking=False),
            "mergekit": SelectCalculateErase(masking=True),
        },
        differs="paper uses the selection for the experts' weights alone; mergekit merges nothing else.",
    )
)
