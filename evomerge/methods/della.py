"""DELLA: drop deltas at random, the smaller the likelier (MagPrune), and rescale the rest.

Deep, Bhardwaj and Poria 2024, DELLA-Merging: reducing interference in model merging through magnitude-based
sampling (arXiv 2406.11617), §3.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from evomerge.errors import CandidateFailed
from evomerge.methods import native
from evomerge.methods.dare import DENSITY, mask_key
from evomerge.methods.kernels import DeltaCombination, Sparse, Values
from evomerge.methods.masks import device_hashes, hash_v1
from evomerge.methods.native.loader import library
from evomerge.methods.norms import RESCALE, rescaled
from evomerge.methods.operands import Operands
from evomerge.methods.registry import MergeMethod, Parameter, register
from evomerge.methods.rows import row_layout
from evomerge.methods.task_arithmetic import LAMBDA, NORMALIZE, coefficients
from evomerge.methods.task_arithmetic import WEIGHT as SUM_WEIGHT
from evomerge.methods.ties import (
    DIFFERS,
    ELECT,
    MERGE,
    NORMALIZE_AGREEING,
    DisjointMerge,
    mergekit_rule,
)
from evomerge.methods.ties import WEIGHT as MEAN_WEIGHT

Floats = npt.NDArray[np.float64]

EPSILON = Parameter(
    "epsilon",
    "expert",
    "Half the span of the keep-probabilities: density - epsilon for a row's smallest entry, density + epsilon "
    "for its largest; both must lie between 0 and 1.",
    0.15,
    0.0,
    0.5,
)
SCALING = (
    "paper divides each kept entry by the probability with which it was kept; mergekit, with rescale, scales "
    "all so that the tensor's sum of magnitudes is what it was."
)


def places(magnitudes: npt.NDArray[Any]) -> Floats:
    """Return each entry's place in the ascending order of its row, from 0 to 1; equal ones share the average.

    Args:
        magnitudes: ``(rows, d)``, contiguous. A row of length 1 has its entry at ½.
    """
    rows, d = magnitudes.shape
    if d == 1:
        return np.full((rows, 1), 0.5)
    found = np.empty((rows, d))
    if magnitudes.dtype == np.float32 and library() is not None:
        native.places(magnitudes, found)
        return found
    order = np.argsort(magnitudes, axis=1)
    ordered = np.take_along_axis(magnitudes, order, axis=1)
    begins = ordered[:, 1:] != ordered[:, :-1]
    first, last = np.zeros((rows, d)), np.full((rows, d), d - 1.0)
    first[:, 1:] = np.where(begins, np.arange(1, d), 0)
    last[:, :-1] = np.where(begins, np.arange(d - 1), d - 1)
    np.maximum.accumulate(first, axis=1, out=first)
    last = np.minimum.accumulate(last[:, ::-1], axis=1)[:, ::-1]
    np.put_along_axis(found, order, (first + last) / (2 * (d - 1)), axis=1)
    return found


def magprune(operands: Operands, values: Values) -> tuple[Sparse, Callable[[int, int, int], Floats]]:
    """τ̂_k = m_k ∘ τ_k; entry i is kept with p_i = (density_k - ε_k) + 2 ε_k · (rank_i - 1)/(d - 1).

    rank_i is that of |τ_i| in its row of d entries, ascending from 1; rows are those of the last dimension, a
    vector is one row. Entry i is kept where its hash (`masks.hash_v1`) lies under p_i: masks are independent
    between experts and nested in density.

    Returns:
        The sparsification, and ``(k, start, n) → p`` of n elements from `start` on.

    Raises:
        CandidateFailed: density ± ε leaves (0, 1).
    """
    densities, spans = values["density"], values["epsilon"]
    for density, epsilon in zip(densities, spans, strict=True):
        if 0 < density < 1 and not (density - epsilon > 0 and density + epsilon < 1):
            raise CandidateFailed(
                f"della: density {density:g} and epsilon {epsilon:g} give keep-probabilities from "
                f"{density - epsilon:g} to {density + epsilon:g}; both must lie between 0 and 1"
            )
    key = mask_key(operands)
    width = row_layout(operands).columns
    own = threading.local()

    def probabilities(k: int, start: int, n: int) -> Floats:
        first, stop = start // width * width, -(-(start + n) // width) * width
        known: dict[int, tuple[int, int, Floats]] = own.__dict__.setdefault("places", {})
        if known.get(k, (0, 0))[:2] != (first, stop):
            fork = own.__dict__.setdefault("operands", operands.fork())
            (chunk,) = fork.chunks(stop - first, first, stop)
            rows = chunk.delta(k).abs_().cpu().numpy().reshape(-1, width)
            known[k] = (first, stop, places(rows).reshape(-1))
        found = known[k][2][start - first : start - first + n]
        probability: Floats = (densities[k] - spans[k]) + 2 * spans[k] * found
        return probability

    def keep(k: int, delta: Tensor, start: int) -> None:
        if densities[k] >= 1:
            return
        n = delta.numel()
        limits = probabilities(k, start, n) * 2.0**32
        if delta.device.type != "cpu":
            found = device_hashes(key.seed, key.experts[k], key.tensor, start, n, delta.device)
            delta.mul_((found < torch.from_numpy(limits).to(delta.device)).to(delta.dtype))
            return
        entries, hashes = delta.numpy(), np.empty(n, dtype=np.uint32)
        with np.errstate(invalid="ignore"):
            entries *= hash_v1(key.seed, key.experts[k], key.tensor, start, hashes) < limits

    return Sparse(tuple(float(density > 0) for density in densities), keep), probabilities


def sample(operands: Operands, values: Values) -> Sparse:
    """MagPrune without a rescaling."""
    return magprune(operands, values)[0]


def sample_and_divide(operands: Operands, values: Values) -> Sparse:
    """MagPrune as in the paper: τ̂_i = m_i τ_i / p_i, whose expectation is τ_i."""
    sparse, probabilities = magprune(operands, values)

    def keep(k: int, delta: Tensor, start: int) -> None:
        if values["density"][k] < 1:
            sparse.keep(k, delta, start)
            divisors = torch.from_numpy(probabilities(k, start, delta.numel()))
            delta.div_(divisors.to(device=delta.device, dtype=delta.dtype))

    return Sparse(sparse.scales, keep)


PAPER = "Deep et al. 2024, DELLA-Merging, arXiv 2406.11617"

register(
    MergeMethod(
        name="della",
        summary="TIES election and merge on task vectors whose small entries are likelier to be dropped.",
        paper=PAPER,
        inputs=(1, None),
        base="origin",
        parameters=(
            MEAN_WEIGHT,
            DENSITY,
            EPSILON,
            ELECT,
            MERGE,
            NORMALIZE_AGREEING,
            RESCALE,
            LAMBDA,
        ),
        kernels={
            "paper": DisjointMerge(sample_and_divide),
            "mergekit": DisjointMerge(rescaled(sample), mergekit_rule),
        },
        random=True,
        differs=f"{SCALING} After that, {DIFFERS}",
    )
)
register(
    MergeMethod(
        name="della_linear",
        summary="Task arithmetic on task vectors whose small entries are likelier to be dropped.",
        paper=PAPER,
        inputs=(1, None),
        base="origin",
        parameters=(SUM_WEIGHT, DENSITY, EPSILON, NORMALIZE, RESCALE, LAMBDA),
        kernels={
            "paper": DeltaCombination(coefficients, sample_and_divide),
            "mergekit": DeltaCombination(coefficients, rescaled(sample)),
        },
        random=True,
        differs=SCALING,
    )
)
