"""Model Breadcrumbs: drop a task vector's smallest entries and its outliers.

Davari and Belilovsky 2024, Model Breadcrumbs: scaling multi-task model merging with sparse masks
(arXiv 2312.06795), §3.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from evomerge.methods.kernels import DeltaCombination, Sparse, Values
from evomerge.methods.native import Band
from evomerge.methods.norms import RESCALE, rescaled
from evomerge.methods.operands import Operands
from evomerge.methods.reductions import order_statistics
from evomerge.methods.registry import MergeMethod, Parameter, register
from evomerge.methods.rows import row_layout, whole_rows
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

DENSITY = Parameter(
    "density",
    "expert",
    "Share of the delta's entries that are kept, of equal ones all.",
    0.2,
    0.0,
    1.0,
    defaults={"mergekit": 1.0},
)
GAMMA = Parameter(
    "gamma",
    "expert",
    "Share of the largest entries that are dropped; fewer where the density could not be reached otherwise.",
    0.1,
    0.0,
    1.0,
    defaults={"mergekit": 0.01},
)
SCOPE = (
    "paper ranks the entries within each row, as the authors' code does, mergekit those of the whole tensor."
)


def kept(n: int, density: float, gamma: float) -> tuple[int, int]:
    """Return the places of the kept ones among n entries in ascending order of |τ|, from (incl.) and to (excl.).

    ⌊γ n⌋ of the largest are dropped, then of the smallest as many as leave ⌊density · n⌋.
    """
    count = math.floor(density * n + 1e-9)
    first = max(0, n - count - math.floor(gamma * n + 1e-9))
    return first, first + count


def crumbs(operands: Operands, values: Values) -> Sparse:
    """Keep what lies between two order statistics of the tensor's |τ_k|, both included."""
    n = operands.size
    bounds: list[tuple[float, float]] = []
    places = [
        kept(n, density, gamma) for density, gamma in zip(values["density"], values["gamma"], strict=True)
    ]
    lows = [(k, n - first) for k, (first, stop) in enumerate(places) if 0 < first < stop]
    highs = [(k, n - stop + 1) for k, (first, stop) in enumerate(places) if first < stop < n]
    found = order_statistics(operands, lows + highs)
    lowest = {k: value for (k, _), value in zip(lows, found[: len(lows)], strict=True)}
    highest = {k: value for (k, _), value in zip(highs, found[len(lows) :], strict=True)}
    for k, (first, stop) in enumerate(places):
        low, high = lowest.get(k, 0.0), highest.get(k, math.inf)
        bounds.append((low, high) if first < stop else (math.inf, 0.0))

    def keep(k: int, delta: Tensor, start: int) -> None:
        low, high = bounds[k]
        if low > 0 or high < math.inf:
            magnitude = delta.abs()
            delta.mul_(((magnitude >= low) & (magnitude <= high)).to(delta.dtype))

    scales = tuple(float(low <= high) for low, high in bounds)
    return Sparse(scales, keep, tuple(Band(low, high) for low, high in bounds))


def crumbs_by_row(operands: Operands, values: Values) -> Sparse:
    """Keep what lies between two order statistics of its row's |τ_k|, both included.

    Rows are those of the last dimension; a vector is one row.
    """
    layout = row_layout(operands)
    width = layout.columns
    bounds: list[tuple[Tensor, Tensor] | None] = []
    scales = []
    for k, (density, gamma) in enumerate(zip(values["density"], values["gamma"], strict=True)):
        first, stop = kept(width, density, gamma)
        whole = first == 0 and stop == width
        scales.append(float(first < stop))
        bounds.append(None if whole or first == stop else _row_bounds(operands, k, first, stop))

    def keep(k: int, delta: Tensor, start: int) -> None:
        found = bounds[k]
        if found is not None:
            magnitude, bound = delta.abs(), torch.empty_like(delta)
            above = magnitude >= layout.spread(found[0], start, bound)
            below = magnitude <= layout.spread(found[1], start, bound)
            delta.mul_((above & below).to(delta.dtype))

    return Sparse(tuple(scales), keep)


def _row_bounds(operands: Operands, k: int, first: int, stop: int) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest |τ_k| that each row keeps, ``(rows,)`` each."""
    lows, highs = [], []
    width = row_layout(operands).columns
    for chunk in whole_rows(operands):
        magnitudes = chunk.delta(k).abs_().cpu().numpy().reshape(-1, width)
        ordered = np.partition(magnitudes, sorted({first, stop - 1}), axis=1)
        lows.append(ordered[:, first].copy())
        highs.append(ordered[:, stop - 1].copy())
    return torch.from_numpy(np.concatenate(lows)), torch.from_numpy(np.concatenate(highs))


PAPER = "Davari and Belilovsky 2024, Model Breadcrumbs, arXiv 2312.06795"

register(
    MergeMethod(
        name="breadcrumbs",
        summary="Task arithmetic on task vectors without their smallest entries and their outliers.",
        paper=PAPER,
        inputs=(1, None),
        base="origin",
        parameters=(SUM_WEIGHT, DENSITY, GAMMA, NORMALIZE, replace(RESCALE, default=False), LAMBDA),
        kernels={
            "paper": DeltaCombination(coefficients, crumbs_by_row),
            "mergekit": DeltaCombination(coefficients, rescaled(crumbs)),
        },
        differs=SCOPE,
    )
)
register(
    MergeMethod(
        name="breadcrumbs_ties",
        summary="TIES election and merge on task vectors without their smallest entries and their outliers.",
        paper=PAPER,
        inputs=(1, None),
        base="origin",
        parameters=(
            MEAN_WEIGHT,
            DENSITY,
            GAMMA,
            ELECT,
            MERGE,
            replace(NORMALIZE_AGREEING, default=False),
            replace(RESCALE, default=False),
            LAMBDA,
        ),
        kernels={
            "paper": DisjointMerge(crumbs_by_row),
            "mergekit": DisjointMerge(rescaled(crumbs), mergekit_rule),
        },
        differs=f"{SCOPE} After that, {DIFFERS}",
    )
)
