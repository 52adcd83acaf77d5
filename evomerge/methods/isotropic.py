"""Isotropic merging: flatten the spectrum of the merged task vector.

Marczak et al. 2025, No task left behind: isotropic model merging with common and task-specific subspaces
(arXiv 2502.04959).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from evomerge.methods.kernels import Values
from evomerge.methods.matrices import (
    WEIGHT,
    Factors,
    MatrixMerge,
    Rows,
    TaskMatrices,
    gram,
    inverse_root,
    weighted,
)
from evomerge.methods.registry import MergeMethod, Parameter, register
from evomerge.methods.task_arithmetic import LAMBDA

PAPER = "Marczak et al. 2025, No task left behind: isotropic model merging, arXiv 2502.04959"


def iso_c(deltas: TaskMatrices, values: Values) -> Rows:
    """M = Σ w_k τ_k = U S Vᵀ becomes σ̄ U Vᵀ, with σ̄ the mean of S (§4).

    U Vᵀ = M V S⁻¹ Vᵀ. The triplets are those of M's numerical rank: the authors' code takes min(m, n) of
    them, where the vectors of singular values that are 0 are whatever the decomposition returns.
    """
    deltas, factor = deltas.evened()

    def flattened() -> Tensor:
        v, s = deltas.spectrum(gram(deltas.sums()))
        return v * (s.mean() / s) @ v.T

    flat = deltas.cached("iso_c", flattened, weighted=True)
    return lambda block, start: deltas.expand(deltas.total(block) @ flat).mul_(factor)


def iso_cts(deltas: TaskMatrices, values: Values) -> Rows:
    """The c strongest directions of M = Σ w_k τ_k, and t directions of each expert beside them (§4).

    With q = min(m, n) and f the `common_space_fraction`: t = round((q − ⌊f q⌋) / K), c = q − K t. U_c S_c V_cᵀ
    is M up to rank c, U_k S_k V_kᵀ the residual (I − U_c U_cᵀ) w_k τ_k up to rank t, both within the numerical
    rank; U_c is on the output side. All U side by side, and all V, are made orthogonal by their polar factors;
    every singular value becomes the mean of all S.
    """
    deltas, factor = deltas.evened()
    count, q = len(deltas.weights), min(deltas.shape)
    own = min(round((q - int(values["common_space_fraction"] * q + 1e-9)) / count), q // count)

    def transforms() -> Factors:
        v_c, s_c = deltas.spectrum(gram(deltas.sums()), q - count * own)
        x_c = v_c / s_c
        common = [torch.zeros_like(x_c.T) for _ in range(count)]
        for block in () if deltas.outputs else deltas.blocks():
            u_c = deltas.total(block) @ x_c
            for projected, a in zip(common, block, strict=True):
                projected.addmm_(u_c.T, a)
        shadows = [x_c @ projected for projected in common]

        def residual(block: Sequence[Tensor], k: int) -> Tensor:
            if deltas.outputs:
                return block[k] - block[k] @ v_c @ v_c.T
            return block[k] - deltas.total(block) @ shadows[k]

        rights, singular, lefts = [v_c], [s_c], [[w * x_c] for w in deltas.weights]
        for k, w in enumerate(deltas.weights):
            products = gram(residual(block, k) for block in deltas.blocks())
            v, s = deltas.spectrum(products, own, size=deltas.norms[k])
            rights.append(v if w > 0 else -v)
            singular.append(abs(w) * s)
            for j, other in enumerate(deltas.weights):
                part = -other * (shadows[k] @ (v / s))
                lefts[j].append(part + v / s if j == k else part)
        left = [torch.cat(parts, dim=1) for parts in lefts]
        right = torch.cat(rights, dim=1)
        orthogonal = inverse_root(gram(weighted(block, left) for block in deltas.blocks()))
        spread = torch.cat(singular).mean() * orthogonal @ inverse_root(right.T @ right) @ right.T
        return Factors(tuple(x @ spread for x in left))

    parts = deltas.cached(f"iso_cts with {own} of each", transforms, weighted=True).parts
    return lambda block, start: deltas.expand(weighted(block, parts)).mul_(factor)


register(
    MergeMethod(
        name="iso_c",
        summary="Sum of the task vectors with all singular values made equal, matrix by matrix.",
        paper=PAPER,
        inputs=(1, None),
        base="origin",
        parameters=(WEIGHT, LAMBDA),
        kernels={"paper": MatrixMerge(iso_c)},
    )
)
register(
    MergeMethod(
        name="iso_cts",
        summary="iso_c whose weakest directions give way to directions of each expert alone.",
        paper=PAPER,
        inputs=(1, None),
        base="origin",
        parameters=(
            WEIGHT,
            Parameter(
                "common_space_fraction",
                "shared",
                "Share of each matrix's directions that the sum of the task vectors keeps.",
                0.8,
                0.0,
                1.0,
            ),
            LAMBDA,
        ),
        kernels={"paper": MatrixMerge(iso_cts)},
    )
)
