"""The methods of dense linear algebra in NumPy float64, by singular value decompositions as in the papers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.linalg
import torch

Matrix = np.ndarray


def svd(matrix: Matrix, most: int | None = None, size: float = 0.0) -> tuple[Matrix, Matrix, Matrix]:
    """Return U, S, Vᵀ up to the numerical rank of a matrix, or of the remainder of one of norm `size`."""
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    rank = int((s > 1e-9 * max(s[0], size, 1e-300)).sum())
    rank = rank if most is None else min(rank, most)
    return u[:, :rank], s[:rank], vt[:rank]


def polar(matrix: Matrix) -> Matrix:
    """Return the orthogonal polar factor, on the numerical range; scipy's where that is everything."""
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    if s[-1] > 1e-5 * s[0] and matrix.shape[0] >= matrix.shape[1]:
        return scipy.linalg.polar(matrix)[0]
    kept = s > 1e-5
    return u[:, kept] @ vt[kept]


def tsv_m(deltas: Sequence[Matrix], weights: Sequence[float], rank: float = 1.0) -> Matrix:
    most = max(1, int(rank * min(deltas[0].shape) / len(deltas)))
    triplets = [svd(delta, most) for delta in deltas]
    u = polar(np.hstack([u for u, _, _ in triplets]))
    v = polar(np.vstack([vt for _, _, vt in triplets]).T)
    s = np.concatenate([w * s for w, (_, s, _) in zip(weights, triplets, strict=True)])
    return u * s @ v.T


def iso_c(deltas: Sequence[Matrix], weights: Sequence[float]) -> Matrix:
    u, s, vt = svd(sum(w * d for w, d in zip(weights, deltas, strict=True)))
    return s.mean() * u @ vt


def iso_cts(deltas: Sequence[Matrix], weights: Sequence[float], fraction: float) -> Matrix:
    scaled = [w * d for w, d in zip(weights, deltas, strict=True)]
    q, count = min(deltas[0].shape), len(deltas)
    own = min(round((q - int(q * fraction)) / count), q // count)
    u_c, s_c, vt_c = svd(sum(scaled), q - count * own)
    parts = [svd(d - u_c @ (u_c.T @ d), own, float(np.linalg.norm(d))) for d in scaled]
    u = polar(np.hstack([*(u for u, _, _ in parts), u_c]))
    v = polar(np.vstack([*(vt for _, _, vt in parts), vt_c]).T)
    return np.concatenate([*(s for _, s, _ in parts), s_c]).mean() * u @ v.T


def wudi_loss(tau: torch.Tensor, deltas: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Return the loss as the authors write it, differentiable in `tau`."""
    terms = [
        ((tau - w * d) @ d.T).square().sum() / d.square().sum()
        for w, d in zip(weights, deltas, strict=True)
        if d.any()
    ]
    return torch.stack(terms).sum()


def wudi_steps(
    deltas: Sequence[torch.Tensor], weights: Sequence[float], steps: int, rate: float
) -> torch.Tensor:
    """Descend with torch's Adam through autograd."""
    tau = torch.nn.Parameter(sum(w * d for w, d in zip(weights, deltas, strict=True)))
    optimizer = torch.optim.Adam([tau], lr=rate, weight_decay=0)
    for _ in range(steps):
        optimizer.zero_grad()
        wudi_loss(tau, deltas, weights).backward()
        optimizer.step()
    return tau.detach()


def wudi_minimum(deltas: Sequence[Matrix], weights: Sequence[float], ridge: float = 0.0) -> Matrix:
    """Minimise the loss by least squares on stacked rows, without any Gram matrix; of many minima the smallest.

    (τ − w_k τ_k) τ_kᵀ / ‖τ_k‖ is linear in the rows of τ; the ridge adds √(ρ μ) (τ − Σ w_k τ_k).
    """
    count, width = len(deltas), deltas[0].shape[1]
    norms = [np.linalg.norm(d) for d in deltas]
    shift = np.sqrt(ridge * count / width)
    design = np.vstack([*(d / norm for d, norm in zip(deltas, norms, strict=True)), shift * np.eye(width)])
    total = sum(w * d for w, d in zip(weights, deltas, strict=True))
    targets = [w * d @ d.T / norm for w, d, norm in zip(weights, deltas, norms, strict=True)]
    return np.linalg.lstsq(design, np.hstack([*targets, shift * total]).T, rcond=1e-10)[0].T


def aligned(deltas: Sequence[Matrix]) -> tuple[Matrix, list[Matrix]]:
    """Return U and the S V_kᵀ of KnOTS."""
    u, s, vt = svd(np.hstack(deltas))
    return u, np.split(s[:, None] * vt, len(deltas), axis=1)
