"""WUDI-Merging: the merged task vector that interferes least with the rows of every task vector.

Cheng et al. 2025, Whoever started the interference should end it: guiding data-free model merging via task
vectors (arXiv 2503.08099).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from evomerge.methods.kernels import Values
from evomerge.methods.matrices import WEIGHT, Factors, MatrixMerge, Rows, TaskMatrices, gram, weighted
from evomerge.methods.operands import Operands
from evomerge.methods.registry import MergeMethod, Parameter, register
from evomerge.methods.task_arithmetic import LAMBDA

BETAS, EPSILON = (0.9, 0.999), 1e-8
"""Adam's customary constants (Kingma & Ba 2015, arXiv 1412.6980), which the authors use."""


def wudi(deltas: TaskMatrices, values: Values) -> Rows:
    """τ that minimises Σ_k ‖(τ − w_k τ_k) τ_kᵀ‖² / ‖τ_k‖², for τ_k ``(out, in)``.

    With G_k = τ_kᵀ τ_k / ‖τ_k‖², C = Σ G_k and B = Σ w_k τ_k G_k the gradient is 2 (τ C − B): one product of
    matrices a step instead of 2 K. A τ_k of 0 contributes nothing.
    """
    scales = [1 / norm if norm > 0 else 0.0 for norm in deltas.norms]

    def grams() -> Factors:
        each = range(len(scales))
        return Factors(tuple(gram(block[k] * scales[k] for block in deltas.blocks()) for k in each))

    found = deltas.cached("wudi", grams).parts
    return (descend if values["solver"] == "adam" else solve)(deltas, found, values)


def descend(deltas: TaskMatrices, grams: Sequence[Tensor], values: Values) -> Rows:
    """Take `steps` steps of Adam from Σ w_k τ_k, as the authors do.

    They end well before the minimum: the start acts as a regulariser. Every row descends on its own.
    """
    dtype = deltas.operands.dtype
    curvature = torch.stack(list(grams)).sum(0)
    inward = None if deltas.basis is None else deltas.basis.to(dtype)
    outward = deltas.expand(curvature).to(dtype)
    pulls = [w * g for w, g in zip(deltas.weights, grams, strict=True)]
    (first, second), rate = BETAS, values["learning_rate"]

    def rows(block: Sequence[Tensor], start: int) -> Tensor:
        tau = deltas.expand(deltas.total(block)).to(dtype)
        target = deltas.expand(weighted(block, pulls)).to(dtype)
        mean, square = torch.zeros_like(tau), torch.zeros_like(tau)
        for step in range(1, int(values["steps"]) + 1):
            gradient = ((tau if inward is None else tau @ inward) @ outward).sub_(target).mul_(2)
            mean.mul_(first).add_(gradient, alpha=1 - first)
            square.mul_(second).add_(gradient.square_(), alpha=1 - second)
            size = torch.sqrt(square, out=gradient).div_((1 - second**step) ** 0.5).add_(EPSILON)
            tau.sub_(torch.div(mean, size, out=size), alpha=rate / (1 - first**step))
        return tau

    return rows


def solve(deltas: TaskMatrices, grams: Sequence[Tensor], values: Values) -> Rows:
    """Go to the minimum of the loss plus ρ μ ‖τ − Σ w_k τ_k‖²: τ = Σ w_k τ_k (G_k + ρ μ) (C + ρ μ)⁻¹.

    ρ is the `ridge`, μ the mean of C's diagonal. It is RegMean with the G_k as the inputs' Gram matrices.
    Without ridge the inverse is taken on C's numerical range, which holds all rows of all τ_k.
    """
    curvature = torch.stack(list(grams)).sum(0)
    shift = values["ridge"] * float(curvature.trace()) / deltas.shape[1]
    if shift > 0:
        squares, vectors = torch.linalg.eigh(curvature)
        inverse = vectors / (squares.clamp(min=0) + shift) @ vectors.T
    else:
        noise = max((deltas.noise / norm for norm in deltas.norms if norm > 0), default=0.0)
        vectors, singular = deltas.spectrum(curvature, noise=noise)
        inverse = vectors / singular.square() @ vectors.T
    transforms = [
        w * (g @ inverse).add_(inverse, alpha=shift) for w, g in zip(deltas.weights, grams, strict=True)
    ]
    return lambda block, start: deltas.expand(weighted(block, transforms))


def inputs_last(operands: Operands, experts: int) -> bool:
    """Have the columns on the input side of the layer."""
    return operands.transposed


register(
    MergeMethod(
        name="wudi",
        summary="The task vector that disturbs every expert's own directions least, found from the experts alone.",
        paper="Cheng et al. 2025, Whoever started the interference should end it (WUDI-Merging), arXiv 2503.08099",
        inputs=(1, None),
        base="origin",
        parameters=(
            WEIGHT,
            Parameter(
                "solver",
                "shared",
                "adam walks from the sum of the task vectors, closed_form goes to the minimum.",
                "adam",
                kind="choice",
                choices=("adam", "closed_form"),
            ),
            Parameter("steps", "shared", "Steps of adam.", 300.0, 0.0, kind="int"),
            Parameter("learning_rate", "shared", "Step size of adam, in units of the weights.", 1e-5, 0.0),
            Parameter(
                "ridge",
                "shared",
                "Pull of closed_form towards the sum of the task vectors, relative to the mean curvature.",
                0.0,
                0.0,
            ),
            LAMBDA,
        ),
        kernels={"paper": MatrixMerge(wudi, inputs_last)},
    )
)
