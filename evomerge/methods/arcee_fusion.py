"""Arcee Fusion: take over what matters most of another model's changes.

Arcee AI 2024, as published in mergekit (method ``arcee_fusion``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from evomerge.methods.kernels import Values
from evomerge.methods.operands import STRIP, Chunk, Operands
from evomerge.methods.registry import MergeMethod, register
from evomerge.methods.rows import row_layout, whole_rows
from evomerge.methods.selection import ascending
from evomerge.methods.vectors import Layout

Floats = npt.NDArray[np.float64]

FLOOR = 1e-8
"""Added to probabilities before their ratio is taken."""


class Plan(NamedTuple):
    """The rows, the divergence of each ``(rows,)``, and the importance from which on changes are taken over."""

    layout: Layout
    divergences: Tensor
    threshold: float


@dataclass(frozen=True)
class ImportantDelta:
    """θ = θ_0 + m ∘ τ; m keeps where |τ| · KL(softmax(θ_1) ‖ softmax(θ_0)) ≥ median + 1.5 (Q3 − Q1).

    The divergence is that of the element's row along the last dimension; a vector is one row. The quartiles
    are those of all importances of the tensor, exactly: the element at place ⌊q (n − 1)⌋ in ascending order.
    """

    def prepare(self, operands: Operands, values: Values) -> Plan:
        return operands.cached("importance", lambda: _plan(operands))

    def apply(self, plan: Plan, chunk: Chunk, out: Tensor) -> None:
        importance = _importance(plan.layout, plan.divergences, chunk)
        out.copy_(chunk.delta(0)).mul_((importance >= plan.threshold).to(out.dtype)).add_(chunk.base())


def _plan(operands: Operands) -> Plan:
    layout = row_layout(operands)
    divergences = torch.cat(list(_divergences(operands, layout.columns))).to(operands.dtype)

    def importances() -> Iterator[Tensor]:
        return (_importance(layout, divergences, chunk) for chunk in operands.fork().chunks(STRIP))

    places = [int(q * (operands.size - 1)) for q in (0.25, 0.5, 0.75)]
    first, median, third = ascending(importances, places)
    return Plan(layout, divergences, median + 1.5 * (third - first))


def _importance(layout: Layout, divergences: Tensor, chunk: Chunk) -> Tensor:
    factor = layout.spread(divergences, chunk.start, chunk.row("factor"))
    return factor.mul_(chunk.delta(0).abs_())


def _divergences(operands: Operands, width: int) -> Iterator[Tensor]:
    """Yield the rows' KL divergences in float64."""
    for chunk in whole_rows(operands):
        p, q = (
            _softmax(x.reshape(-1, width).double().cpu().numpy()) + FLOOR
            for x in (chunk.input(0), chunk.base())
        )
        with np.errstate(invalid="ignore"):
            found = np.maximum((p * np.log(p / q)).sum(axis=1), 0.0)
        yield torch.from_numpy(found)


def _softmax(x: Floats) -> Floats:
    with np.errstate(invalid="ignore"):
        powers: Floats = np.exp(x - x.max(axis=1, keepdims=True))
    powers /= powers.sum(axis=1, keepdims=True)
    return powers


register(
    MergeMethod(
        name="arcee_fusion",
        summary="The base plus those of the input's changes that matter most, by size and by row divergence.",
        paper="Arcee AI 2024, Arcee Fusion, as published in mergekit",
        inputs=(1, 1),
        base="origin",
        parameters=(),
        kernels={"paper": ImportantDelta(), "mergekit": ImportantDelta()},
        differs="Both are the same; the quartiles are exact, where mergekit draws a sample of large tensors.",
    )
)
