"""Linear layers that answer, on each model's own inputs, as that model's layer does.

Jin et al. 2023, Dataless knowledge fusion by merging weights of language models (arXiv 2212.09849), §3, and
Nguyen et al. 2025, RegMean++ (arXiv 2508.03121), whose Gram matrices come from the merged model's layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evomerge.errors import CandidateFailed
from evomerge.methods.kernels import Values, combine, fused_combination
from evomerge.methods.native import Fused
from evomerge.methods.operands import Chunk, Operands
from evomerge.methods.registry import MergeMethod, Needs, Parameter, register
from evomerge.methods.statistics import WEIGHT, Statistic, shares, statistics_of


@dataclass(frozen=True)
class RegressionMean:
    """W = argmin Σ_k w_k ‖X_k Wᵀ − X_k W_kᵀ‖² / tokens_k for a linear layer; elsewhere the weighted mean."""

    def prepare(self, operands: Operands, values: Values) -> Sequence[float] | Tensor:
        statistics = statistics_of(operands)
        weights = shares(values)
        if statistics is None or max(weights) == 1:
            return weights
        return solve(operands, statistics, values).reshape(-1)

    def apply(self, plan: Sequence[float] | Tensor, chunk: Chunk, out: Tensor) -> None:
        if isinstance(plan, Tensor):
            out.copy_(plan[chunk.start : chunk.stop])
        else:
            combine(plan, chunk, out)

    def fused(self, plan: Sequence[float] | Tensor) -> Fused | None:
        return None if isinstance(plan, Tensor) else fused_combination(plan)


def solve(operands: Operands, statistics: Sequence[Statistic], values: Values) -> Tensor:
    """W = W̄ + (Σ w_k (W_k − W̄) Ĝ_k) (Σ w_k Ĝ_k)⁻¹ with Ĝ_k = α G_k + (1−α) diag(G_k) + ρ I (equation 2).

    W̄ is the weighted mean; written this way, equal W_k and equal Ĝ_k give it without rounding errors of the
    solve, and so do directions that no input has. G_k = X_kᵀX_k / tokens, so that no model counts more for
    having more data. ρ is `ridge` times the mean of the diagonal of Σ w_k G_k. Solved in float64 by Cholesky.

    Args:
        operands: W_k ``(d_out, d_in)``, or ``(d_in, d_out)`` where they are transposed.
        statistics: G_k, ``(d_in, d_in)``, flattened.
        values: `weight`, `alpha`, `ridge`.

    Raises:
        CandidateFailed: Σ w_k Ĝ_k is not positive definite (no tokens, or α = 1 and ridge = 0).
    """
    terms = [(k, share) for k, share in enumerate(shares(values)) if share > 0]
    mean = sum(share * weight(operands, k) for k, share in terms)
    assert isinstance(mean, Tensor)
    d = mean.shape[1]
    total = torch.zeros(d, d, dtype=torch.float64, device=mean.device)
    for k, share in terms:
        total.add_(gram(statistics[k], d, values["alpha"], mean.device), alpha=share)
    ridge = values["ridge"] * float(total.diagonal().mean())
    total.diagonal().add_(ridge)
    if not math.isfinite(ridge) or ridge < 0:
        raise CandidateFailed("a Gram matrix has values that are not finite")
    right = torch.zeros_like(mean)
    for k, share in terms:
        matrix = gram(statistics[k], d, values["alpha"], mean.device)
        matrix.diagonal().add_(ridge)
        right.addmm_(weight(operands, k).sub_(mean), matrix, alpha=share)
    factor, info = torch.linalg.cholesky_ex(total)
    if int(info):
        raise CandidateFailed(
            "the sum of the Gram matrices is not positive definite; give alpha below 1, a larger ridge or more data"
        )
    merged = mean.add_(torch.cholesky_solve(right.T, factor).T)
    return (merged.T if operands.transposed else merged).contiguous()


def weight(operands: Operands, k: int) -> Tensor:
    """Return W_k ``(d_out, d_in)`` in float64, freshly allocated."""
    whole = operands.whole(k).double()
    return whole.T.contiguous() if operands.transposed else whole


def gram(statistic: Statistic, d: int, alpha: float, device: torch.device | str = "cpu") -> Tensor:
    """Return α G + (1−α) diag(G) ``(d, d)`` in float64, freshly allocated."""
    if statistic.values.numel() != d * d:
        raise ValueError(f"a Gram matrix of {statistic.values.numel()} elements for {d} inputs of a layer")
    matrix = statistic.values[0 : d * d].to(device, torch.float64, copy=True).reshape(d, d)
    diagonal = matrix.diagonal().clone()
    matrix.mul_(alpha)
    matrix.diagonal().copy_(diagonal)
    return matrix


def _method(name: str, summary: str, paper: str, needs: Needs) -> MergeMethod:
    return MergeMethod(
        name=name,
        summary=summary,
        paper=paper,
        inputs=(1, None),
        base="unused",
        parameters=(
            WEIGHT,
            Parameter(
                "alpha",
                "shared",
                "Factor of the Gram matrices' off-diagonal elements; 1 solves the plain regression, 0 weighs "
                "each column by its inputs' energy.",
                0.9,
                0.0,
                1.0,
            ),
            Parameter(
                "ridge",
                "shared",
                "Pull towards the weighted mean, in units of the Gram matrices' mean diagonal; decides where "
                "the data has no say.",
                1e-6,
                0.0,
            ),
        ),
        kernels={"paper": RegressionMean()},
        needs=needs,
    )


register(
    _method(
        "regmean",
        "Linear layers by least squares on each model's own layer inputs; all else by weighted mean.",
        "Jin et al. 2023, Dataless knowledge fusion by merging weights of language models, arXiv 2212.09849; "
        "alpha as in its code for models other than RoBERTa",
        "gram",
    )
)
register(
    _method(
        "regmean++",
        "regmean, layer after layer, with the layer inputs that the already merged layers below give.",
        "Nguyen et al. 2025, RegMean++, arXiv 2508.03121",
        "merged gram",
    )
)
