"""Sums over a whole tensor in float64, in an order that nothing but the tensor's size decides."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from evomerge.methods.kernels import Sparse, Sparsify, Values
from evomerge.methods.operands import Operands
from evomerge.methods.reductions import LANES, absolute_sums, fold_lanes
from evomerge.methods.registry import Parameter

RESCALE = Parameter(
    "rescale",
    "shared",
    "Scale each sparse task vector so that the sum of its magnitudes is that of the whole one, per tensor.",
    True,
    kind="bool",
    dialects=("mergekit",),
)


def totals(chunks: Iterable[Iterable[Tensor]], count: int) -> list[float]:
    """Return the sums of several vectors' elements, which come in chunks.

    Element i belongs to lane i mod 2¹³; each lane adds in order of i, and the lanes are then added pairwise
    in a binary tree.

    Args:
        chunks: the same range of elements of every vector, flat, one range after the other; the length of each
            but the last is a multiple of 2¹³.
        count: number of vectors.
    """
    sums = torch.zeros(count, LANES, dtype=torch.float64)
    wide = torch.empty(LANES, dtype=torch.float64)
    for chunk in chunks:
        for lanes, vector in zip(sums, chunk, strict=True):
            for part in torch.split(vector, LANES):
                lanes[: part.numel()].add_(wide[: part.numel()].copy_(part))
    return [float(number) for number in fold_lanes(sums)]


def rescaled(sparsify: Sparsify) -> Sparsify:
    """Wrap a sparsification: with `rescale`, τ̂_k · Σ|τ_k| / Σ|τ̂_k| in place of τ̂_k.

    Task vectors that are kept whole (density 1) or of which nothing is left stay as they are.
    """

    def with_norms_restored(operands: Operands, values: Values) -> Sparse:
        sparse = sparsify(operands, values)
        if not values["rescale"]:
            return sparse
        scales = list(sparse.scales)
        for k, density in enumerate(values["density"]):
            if scales[k] == 0 or density >= 1:
                continue
            whole, left = absolute_sums(operands, k, sparse)
            if left > 0:
                scales[k] *= whole / left
        return replace(sparse, scales=tuple(scales))

    return with_norms_restored
