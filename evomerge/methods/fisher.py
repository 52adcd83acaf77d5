"""Average of weights, each weighted by its Fisher information.

Matena & Raffel 2022, Merging models with Fisher-weighted averaging (arXiv 2111.09832), §3.3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from evomerge.methods.kernels import Values
from evomerge.methods.operands import Chunk, Operands
from evomerge.methods.registry import MergeMethod, Parameter, register
from evomerge.methods.statistics import WEIGHT, shares, statistics_of

_LEAST = 1e-30
"""Smallest floor, so that weights without any information have a mean."""


@dataclass(frozen=True)
class _Term:
    k: int
    share: float
    information: Tensor
    scale: float


@dataclass(frozen=True)
class FisherMean:
    """θ = Σ λ_k F̂_k θ_k / Σ λ_k F̂_k elementwise, F̂_k = max(F_k / u_k, floor) (equation 6).

    u_k is the root mean square of F_k over all weights of model k if `normalize`, which up to a factor that
    all models share is the paper's division by ‖F_k‖; without it, one u for all: that of all models
    together. The floor, in these units, gives weights that no data speaks of their λ-weighted mean.

    It is computed as θ_1 + Σ λ_k F̂_k (θ_k − θ_1) / Σ λ_k F̂_k, so that equal inputs are kept bit for bit.
    """

    def prepare(self, operands: Operands, values: Values) -> tuple[list[_Term], float]:
        statistics = statistics_of(operands)
        if statistics is None:
            raise ValueError("fisher needs the diagonal Fisher information of every input")
        for statistic in statistics:
            if statistic.values.numel() != operands.size:
                raise ValueError(
                    f"a Fisher information of {statistic.values.numel()} weights for {operands.size}"
                )
        common = math.sqrt(math.fsum(s.unit**2 for s in statistics) / len(statistics))
        units = [statistic.unit if values["normalize"] else common for statistic in statistics]
        terms = [
            _Term(k, share, statistic.values, 1 / unit if unit > 0 else 0.0)
            for k, (share, statistic, unit) in enumerate(zip(shares(values), statistics, units, strict=True))
            if share > 0
        ]
        return terms, max(values["floor"], _LEAST)

    def apply(self, plan: tuple[list[_Term], float], chunk: Chunk, out: Tensor) -> None:
        terms, floor = plan
        first = chunk.row("first").copy_(chunk.input(terms[0].k))
        if len(terms) == 1:
            out.copy_(first)
            return
        out.zero_()
        total = chunk.row("total").zero_()
        for term in terms:
            weight = chunk.row("weight").copy_(term.information[chunk.start : chunk.stop])
            weight.mul_(term.scale).clamp_(min=floor).mul_(term.share)
            total.add_(weight)
            out.add_(torch.sub(chunk.input(term.k), first, out=chunk.row("step")).mul_(weight))
        out.div_(total).add_(first)


register(
    MergeMethod(
        name="fisher",
        summary="Average in which each weight counts as much as its model's data says that it matters.",
        paper="Matena & Raffel 2022, Merging models with Fisher-weighted averaging, arXiv 2111.09832",
        inputs=(1, None),
        base="unused",
        parameters=(
            WEIGHT,
            Parameter(
                "floor",
                "shared",
                "Least information of a weight, in units of the root mean square over the model.",
                1e-6,
                0.0,
            ),
            Parameter(
                "normalize",
                "shared",
                "Measure each model's information in its own unit, so that no model counts more only because "
                "its gradients are larger.",
                True,
                kind="bool",
            ),
        ),
        kernels={"paper": FisherMean()},
        needs="fisher",
    )
)
