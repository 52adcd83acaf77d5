"""Layer paths as searches know them: steps through the layers of a pool of models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from evomerge.layers_config import LayerSpace, ScaleRange
from evomerge.spaces.genotype import Coordinate
from evomerge.spaces.units import to_unit, to_value

LARGEST_PRODUCT = 8.0
"""The product of all scales up to a layer stays in [1/8, 8]: beyond, the norms' epsilon shows in folded weights."""


@dataclass(frozen=True)
class Step:
    """One layer of a path.

    Attributes:
        model: its place in the pool.
        layer: which layer of it.
        scale: what multiplies the residual stream that enters it.
    """

    model: int
    layer: int
    scale: float = 1.0


def jumps(before: Step | None, step: Step) -> bool:
    """Whether a path leaves a model's own order here; the first step does not."""
    return before is not None and (before.model, before.layer + 1) != (step.model, step.layer)


def tidied(steps: Sequence[Step]) -> tuple[Step, ...]:
    """Return the path with scale 1 where it does not jump, and where the product of all scales would be extreme."""
    path: list[Step] = []
    product = 1.0
    for step in steps:
        fits = 1 / LARGEST_PRODUCT <= product * step.scale <= LARGEST_PRODUCT
        keeps = jumps(path[-1] if path else None, step) and fits
        path.append(step if keeps else replace(step, scale=1.0))
        product *= path[-1].scale
    return tuple(path)


class Scales:
    """The scales that a space may choose from: 1 + k · step, searched on a logarithmic scale.

    Attributes:
        searched: whether there is a choice.
    """

    def __init__(self, space: LayerSpace) -> None:
        self._range = space.scale if isinstance(space.scale, ScaleRange) else None
        self.searched = self._range is not None

    def coordinate(self, name: str) -> Coordinate:
        """Return a coordinate that starts at 1."""
        assert self._range is not None
        low, high = self._range.range
        return Coordinate(name, "float", low, high, to_unit(1.0, low, high, True), log=True)

    def value(self, coordinate: Coordinate, number: float) -> float:
        """Return the scale that a genotype's number stands for."""
        return self._rounded(float(to_value(coordinate, number)))

    def varied(self, scale: float, rng: np.random.Generator) -> float:
        """Return another scale: half of the time up to three steps away, else up to a factor of about 1.5."""
        assert self._range is not None
        if rng.random() < 0.5:
            return self._rounded(scale + self._range.step * float(rng.choice([-3, -2, -1, 1, 2, 3])))
        return self._rounded(scale * math.exp(0.2 * float(rng.standard_normal())))

    def _rounded(self, value: float) -> float:
        assert self._range is not None
        (low, high), step = self._range.range, self._range.step
        least, most = math.ceil((low - 1) / step - 1e-9), math.floor((high - 1) / step + 1e-9)
        return round(1 + min(max(round((value - 1) / step), least), most) * step, 9)
