"""NearSwap: move each weight towards another model's, by no more than a threshold.

alchemonaut 2024, QuartetAnemoi-70B-t0.0001 (model card on the Hugging Face hub).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from evomerge.methods.kernels import Values
from evomerge.methods.operands import Chunk, Operands
from evomerge.methods.registry import MergeMethod, Parameter, register


@dataclass(frozen=True)
class ClampedDelta:
    """θ = θ_0 + clamp(θ_1 − θ_0, −t, t): the card's w θ_1 + (1−w) θ_0 with w = min(1, t/|θ_1 − θ_0|)."""

    def prepare(self, operands: Operands, values: Values) -> float:
        return float(values["t"])

    def apply(self, plan: float, chunk: Chunk, out: Tensor) -> None:
        delta = chunk.delta(0)
        torch.clamp(delta, -plan, plan, out=out).add_(chunk.base())
        # An infinite weight would pass as a step of t; this makes it NaN.
        out.add_(delta.mul_(0))


register(
    MergeMethod(
        name="nearswap",
        summary="The base, with each weight moved towards the input's by at most t.",
        paper="alchemonaut 2024, QuartetAnemoi-70B-t0.0001, model card on the Hugging Face hub",
        inputs=(1, 1),
        base="origin",
        parameters=(
            Parameter(
                "t", "shared", "Largest change of a weight; closer weights become the input's.", low=0.0
            ),
        ),
        kernels={"paper": ClampedDelta(), "mergekit": ClampedDelta()},
        differs="Both are the same, but for differences under 1e-6, which mergekit treats as 1e-6.",
    )
)
