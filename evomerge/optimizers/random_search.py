"""Random search: every candidate is drawn anew; the yardstick for the others."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from evomerge.config import OptimizerConfig
from evomerge.optimizers.base import Told, initial_of, population_size
from evomerge.randomness import generator
from evomerge.spaces.genotype import Coordinate, Genotype
from evomerge.spaces.units import to_unit


class RandomSearch:
    """Independent draws from the space, after its initial genotype: uniform ones, choices by their weights."""

    def __init__(self, config: OptimizerConfig, coordinates: Sequence[Coordinate], *, seed: int) -> None:
        self.population = population_size(config, len(coordinates))
        self.parents = 1
        self._coordinates = tuple(coordinates)
        self._seed = seed

    def ask(self, generation: int) -> list[Genotype]:
        """Return `population` genotypes; they depend on seed and generation alone."""
        rng = generator(self._seed, "random search", generation)
        drawn = [
            tuple(_draw(coordinate, rng) for coordinate in self._coordinates) for _ in range(self.population)
        ]
        return [initial_of(self._coordinates), *drawn[1:]] if generation == 0 else drawn

    def tell(self, generation: int, told: Sequence[Told]) -> None:
        """Learn nothing."""

    def mean(self) -> Genotype | None:
        """Return None: nothing converges."""
        return None


def _draw(coordinate: Coordinate, rng: np.random.Generator) -> float:
    if coordinate.kind == "integer" and not coordinate.log:
        low, high = int(coordinate.low), int(coordinate.high)
        return to_unit(float(rng.integers(low, high + 1)), low, high, log=False)
    if coordinate.kind != "choice":
        return float(rng.random())
    if not coordinate.weights:
        return float(rng.integers(len(coordinate.choices)))
    return float(np.searchsorted(np.cumsum(coordinate.weights[:-1]), rng.random(), side="right"))
