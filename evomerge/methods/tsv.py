"""TSV-Merge: singular vectors of all tasks, decorrelated.

Gargiulo et al. 2025, Task singular vectors: reducing task interference in model merging (arXiv 2412.00081).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from evomerge.methods.kernels import Values
from evomerge.methods.matrices import WEIGHT, Factors, MatrixMerge, Rows, TaskMatrices, gram, inverse_root
from evomerge.methods.registry import MergeMethod, Parameter, register
from evomerge.methods.task_arithmetic import LAMBDA


def tsv_m(deltas: TaskMatrices, values: Values) -> Rows:
    """TSV-Merge: τ = U⊥ diag(w_k S_k) V⊥ᵀ from the first r singular triplets of every τ_k.

    r = ⌊rank · min(m, n) / K⌋, at least 1 and at most the numerical rank of τ_k. U⊥ is the polar factor of
    U = [U_1 … U_K], V⊥ that of V, each on its numerical range: directions that experts share are kept once,
    and K identical experts give that expert.
    """
    q, count = min(deltas.shape), len(deltas.weights)
    most = min(q, max(1, math.floor(values["rank"] * q / count + 1e-9)))

    def factors() -> Factors:
        triplets = [deltas.spectrum(gram(block[k] for block in deltas.blocks()), most) for k in range(count)]
        xs = [v / s for v, s in triplets]
        right = torch.cat([v for v, _ in triplets], dim=1)
        orthogonal = inverse_root(gram(_directions(block, xs) for block in deltas.blocks()))
        return Factors((*xs, *(s for _, s in triplets), orthogonal, inverse_root(right.T @ right) @ right.T))

    parts = deltas.cached(f"tsv_m up to rank {most}", factors).parts
    xs, singular, (orthogonal, right) = parts[:count], parts[count : 2 * count], parts[2 * count :]
    scaled = torch.cat([w * s for w, s in zip(deltas.weights, singular, strict=True)])
    spread = orthogonal * scaled @ right
    return lambda block, start: deltas.expand(_directions(block, xs) @ spread)


def _directions(block: Sequence[Tensor], xs: Sequence[Tensor]) -> Tensor:
    """Return rows of U: U_k = τ_k V_k S_k⁻¹ side by side."""
    return torch.cat([a @ x for a, x in zip(block, xs, strict=True)], dim=1)


register(
    MergeMethod(
        name="tsv_m",
        summary="The strongest singular directions of every task vector, made orthogonal to each other.",
        paper="Gargiulo et al. 2025, Task singular vectors, arXiv 2412.00081",
        inputs=(1, None),
        base="origin",
        parameters=(
            WEIGHT,
            Parameter(
                "rank",
                "shared",
                "Directions kept of each of K experts, as a multiple of min(rows, columns)/K; K keeps all.",
                1.0,
                0.0,
            ),
            LAMBDA,
        ),
        kernels={"paper": MatrixMerge(tsv_m)},
    )
)
