"""KnOTS: merge LoRA experts in the basis that their updates share.

Stoica et al. 2025, Model merging with SVD to tie the KnOTS (arXiv 2410.19735).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from evomerge.methods.chunks import merge_chunks
from evomerge.methods.kernels import Values
from evomerge.methods.matrices import WEIGHT, Factors, MatrixMerge, Rows, TaskMatrices, gram
from evomerge.methods.operands import Operands
from evomerge.methods.registry import MergeMethod, Parameter, register
from evomerge.methods.task_arithmetic import LAMBDA


def knots(deltas: TaskMatrices, values: Values) -> Rows:
    """[τ_1 | … | τ_K] = U S [V_1ᵀ | … | V_Kᵀ], τ_k ``(out, in)``; the P_k = S V_kᵀ are merged, τ = U P.

    `inner` names the elementwise method for the P_k; task_arithmetic on them is task_arithmetic on the τ_k.
    All of the numerical rank is kept. Where no two singular values are equal the result does not depend on
    how the decomposition is found; signs of singular vectors cancel.
    """
    return _aligned_outputs(deltas, values) if deltas.outputs else _aligned_tall(deltas, values)


def _aligned_outputs(deltas: TaskMatrices, values: Values) -> Rows:
    """From Σ τ_k τ_kᵀ = U S² Uᵀ: P_k = Uᵀ τ_k. Here A_k = τ_kᵀ, so that P_kᵀ = A_k U."""
    dtype = deltas.operands.dtype

    def factors() -> Factors:
        u, _ = deltas.spectrum(gram(a for block in deltas.blocks() for a in block))
        parts: list[list[Tensor]] = [[] for _ in deltas.weights]
        for block in deltas.blocks():
            for part, a in zip(parts, block, strict=True):
                part.append((a @ u).to(dtype))
        return Factors((deltas.expand(u.T).to(dtype), *(torch.cat(part) for part in parts)))

    u, *aligned = deltas.cached("knots", factors).parts
    merged = merge_aligned(deltas, aligned, values)
    return lambda block, start: merged[start : start + len(block[0])] @ u


def _aligned_tall(deltas: TaskMatrices, values: Values) -> Rows:
    """From the Gram matrix of Z = [τ_1 | … | τ_K], where it has more rows than columns: U = Z V S⁻¹."""
    v, s = deltas.spectrum(gram(torch.cat(block, dim=1) for block in deltas.blocks()))
    aligned = [deltas.expand((part * s).T).to(deltas.operands.dtype) for part in v.chunk(len(deltas.weights))]
    merged = (v / s) @ merge_aligned(deltas, aligned, values).double()
    return lambda block, start: torch.cat(list(block), dim=1) @ merged


def merge_aligned(deltas: TaskMatrices, aligned: Sequence[Tensor], values: Values) -> Tensor:
    """Merge the P_k elementwise, by the method that `inner` names."""
    merged = torch.empty_like(aligned[0])
    flat, masks = merged.reshape(-1), deltas.operands.masks
    own = {"weight": deltas.weights}
    if values["inner"] != "task_arithmetic":
        own["density"] = tuple(values["density"][k] for k in deltas.experts)
    if masks is not None:
        masks = replace(masks, experts=tuple(masks.experts[k] for k in deltas.experts))
    for start, part in merge_chunks(values["inner"], torch.zeros_like(merged), aligned, own, masks=masks):
        flat[start : start + len(part)].copy_(part)
    return merged


def shorter_side(operands: Operands, experts: int) -> bool:
    """Have the columns on the output side, unless Z ``(out, K · in)`` has more rows than columns."""
    outputs, inputs = operands.shape[::-1] if operands.transposed else operands.shape
    return (outputs <= experts * inputs) != operands.transposed


register(
    MergeMethod(
        name="knots",
        summary="LoRA experts (or others of low rank) aligned by a common decomposition, then merged elementwise.",
        paper="Stoica et al. 2025, Model merging with SVD to tie the KnOTS, arXiv 2410.19735",
        inputs=(1, None),
        base="origin",
        parameters=(
            WEIGHT,
            Parameter(
                "inner",
                "shared",
                "Method that merges the aligned parts.",
                "ties",
                kind="choice",
                choices=("ties", "dare_ties", "dare_linear", "task_arithmetic"),
            ),
            Parameter(
                "density",
                "expert",
                "Share of each expert's aligned part that is kept (ties), or kept with this probability (dare).",
                0.2,
                0.0,
                1.0,
            ),
            LAMBDA,
        ),
        kernels={"paper": MatrixMerge(knots, shorter_side)},
        random=True,
    )
)
