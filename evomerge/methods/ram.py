"""Reinforced Agent Merging: average what several experts changed, keep what one alone changed.

Yuan et al. 2026, Behavior knowledge merge in reinforced agentic models (arXiv 2601.13572).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from evomerge.methods.kernels import Values
from evomerge.methods.operands import STRIP, Chunk, Operands
from evomerge.methods.registry import MergeMethod, Parameter, register

EPSILON = Parameter(
    "epsilon",
    "shared",
    "Size of a change above which an expert counts as having changed a weight.",
    1e-5,
    0.0,
)


class Plan(NamedTuple):
    """ε, and for each input the factor of what it alone changed."""

    epsilon: float
    factors: list[float]


@dataclass(frozen=True)
class SharedMean:
    """θ = θ_0 + Σ_k τ_k / c where c ≥ 2 inputs changed the element (|τ_k| > ε), λ_k τ_k where only k did.

    RAM: λ_k = 1. RAM+: λ_k = 1 + r · clip(ρ_k, 0, α), with ρ_k = how many of the elements that k changed others
    changed too, divided by how many k alone changed; both are counted per tensor.

    Attributes:
        boost: whether what one input alone changed is amplified (RAM+).
    """

    boost: bool

    def prepare(self, operands: Operands, values: Values) -> Plan:
        count = len(operands.inputs)
        if not self.boost:
            return Plan(values["epsilon"], [1.0] * count)
        shared, unique = operands.cached(
            f"shared and unique changes above {values['epsilon']}",
            lambda: _count(operands, values["epsilon"]),
        )
        ratios = [s / max(u, 1) for s, u in zip(shared, unique, strict=True)]
        r, alpha = values["r"], values["alpha"]
        return Plan(values["epsilon"], [1 + r * min(ratio, alpha) for ratio in ratios])

    def apply(self, plan: Plan, chunk: Chunk, out: Tensor) -> None:
        total, boosted, number = (chunk.row(name).zero_() for name in ("total", "boosted", "number"))
        for k, factor in enumerate(plan.factors):
            delta = torch.hardshrink(chunk.delta(k), plan.epsilon, out=chunk.row("part"))
            total.add_(delta)
            if self.boost:
                boosted.add_(torch.mul(delta, factor, out=chunk.row("scaled")))
            number.add_(delta.sign_().abs_())
        if self.boost:
            torch.where(number == 1, boosted, total, out=total)
        torch.div(total, number.clamp_(min=1), out=out).add_(chunk.base())


def _count(operands: Operands, epsilon: float) -> tuple[list[int], list[int]]:
    """Return how many elements each input changed that others changed too, and how many it alone changed."""
    count = len(operands.inputs)
    shared, unique = [0] * count, [0] * count
    for chunk in operands.fork().chunks(STRIP):
        changed = torch.stack([chunk.delta(k).abs_() > epsilon for k in range(count)])
        changes = changed.sum(dim=0)
        for k in range(count):
            unique[k] += int((changed[k] & (changes == 1)).sum())
            shared[k] += int((changed[k] & (changes > 1)).sum())
    return shared, unique


PAPER = "Yuan et al. 2026, Behavior knowledge merge in reinforced agentic models (RAM), arXiv 2601.13572"

register(
    MergeMethod(
        name="ram",
        summary="Average the changes that several experts made, keep those that one alone made.",
        paper=PAPER,
        inputs=(1, None),
        base="origin",
        parameters=(EPSILON,),
        kernels={"paper": SharedMean(boost=False), "mergekit": SharedMean(boost=False)},
        differs="Both are the same.",
    )
)
register(
    MergeMethod(
        name="ramplus_tl",
        summary="As ram, with what one expert alone changed amplified by how much it shares with others.",
        paper=PAPER,
        inputs=(1, None),
        base="origin",
        parameters=(
            Parameter("r", "shared", "How strongly the share that is common amplifies.", 0.1),
            Parameter("alpha", "shared", "Bound of the ratio of shared to unique changes.", 0.2, 0.0),
            EPSILON,
        ),
        kernels={"paper": SharedMean(boost=True), "mergekit": SharedMean(boost=True)},
        differs="Both are the same; the ratio is that of each tensor, where the paper has one for the model.",
    )
)
