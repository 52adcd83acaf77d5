"""MagMax: of each weight, the change of largest magnitude.

Marczak et al. 2024, MagMax: leveraging model merging for seamless continual learning (arXiv 2407.06322), §4.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from evomerge.methods.kernels import Values
from evomerge.methods.operands import Chunk, Operands
from evomerge.methods.registry import MergeMethod, Parameter, register
from evomerge.methods.task_arithmetic import LAMBDA
from evomerge.methods.ties import lead


class Plan(NamedTuple):
    """The inputs that take part with their weights, and λ."""

    terms: list[tuple[int, float]]
    scale: float


@dataclass(frozen=True)
class LargestDelta:
    """θ = θ_0 + λ q_m per element, with q_k = w_k τ_k and m = argmax_k |q_k| (of equal ones the first input)."""

    def prepare(self, operands: Operands, values: Values) -> Plan:
        scale: float = values["lambda"]
        return Plan([(k, w) for k, w in enumerate(values["weight"]) if w != 0 and scale != 0], scale)

    def apply(self, plan: Plan, chunk: Chunk, out: Tensor) -> None:
        if not plan.terms:
            out.copy_(chunk.base())
            return
        rows: dict[str, Tensor] = {}
        for k, weight in plan.terms:
            lead(chunk.delta(k).mul_(weight), rows, chunk)
        torch.mul(rows["lead"], plan.scale, out=out).add_(chunk.base())


register(
    MergeMethod(
        name="magmax",
        summary="Base plus, for each weight, the experts' change of largest magnitude.",
        paper="Marczak et al. 2024, MagMax, arXiv 2407.06322",
        inputs=(1, None),
        base="origin",
        parameters=(
            Parameter(
                "weight", "expert", "Factor of the expert's task vector before the largest is taken.", 1.0
            ),
            replace(LAMBDA, default=0.5),
        ),
        kernels={"paper": LargestDelta()},
    )
)
