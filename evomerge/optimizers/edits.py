"""A (μ + λ) evolutionary algorithm on genotypes that their space knows how to change."""

from __future__ import annotations

from collections.abc import Hashable, Sequence, Set

import numpy as np

from evomerge.config import OptimizerConfig
from evomerge.optimizers.base import Told, in_order_of_asking, initial_of
from evomerge.randomness import generator
from evomerge.spaces.genotype import Coordinate, Genotype, Variation

POPULATION = 24
"""Candidates of a generation, parents included, unless the config says otherwise."""

PARENTS = 4
"""One candidate in so many may be a parent of the next generation."""

CROSSED = 0.3
"""Share of the offspring that have two parents; all are mutated."""

TRIES = 20
"""How often a child is drawn again that the generation has already."""


class EditEA:
    """Keeps the best quarter of all candidates, and fills each generation with mutated copies of them.

    - Parents are asked again in each generation, so that they meet their children on the same items: a lucky
      score does not stay.
    - The best have the lowest ranks; of equal ones those that were asked first, parents before children. Failed
      candidates never become parents.
    - Each child mutates a parent drawn uniformly, or what crossing makes of two.
    - The numbers of a generation come from a generator of its own.
    """

    def __init__(
        self, config: OptimizerConfig, coordinates: Sequence[Coordinate], *, seed: int, variation: Variation
    ) -> None:
        self.population = POPULATION if config.population == "auto" else config.population
        self.parents = max(1, self.population // PARENTS)
        self._seed = seed
        self._variation = variation
        self._initial = initial_of(coordinates)
        self._parents: list[Genotype] = [self._initial]
        self._asked: list[Genotype] = []
        self._told_any = False

    def ask(self, generation: int) -> list[Genotype]:
        """Return the parents, then their children; in generation 0 the first is the initial genotype."""
        rng = generator(self._seed, "edits", generation)
        asked = list(self._parents)
        taken = {self._variation.steps(parent) for parent in asked}
        while len(asked) < self.population:
            asked.append(self._child(taken, rng))
            taken.add(self._variation.steps(asked[-1]))
        self._asked = asked
        return list(asked)

    def tell(self, generation: int, told: Sequence[Told]) -> None:
        """Choose the next parents among the candidates of the generation asked last.

        Raises:
            ValueError: an outcome of a genotype that was not asked.
        """
        outcomes = in_order_of_asking(self._asked, told)
        self._told_any = True
        scored = [(outcome.rank, place) for place, outcome in outcomes if outcome.fitness is not None]
        best: dict[Hashable, Genotype] = {}
        for _, place in sorted(scored):
            best.setdefault(self._variation.steps(self._asked[place]), self._asked[place])
        if best:
            self._parents = list(best.values())[: self.parents]

    def mean(self) -> Genotype | None:
        """Return the best parent."""
        return self._parents[0] if self._told_any else None

    def _child(self, taken: Set[Hashable], rng: np.random.Generator) -> Genotype:
        for _ in range(TRIES):
            parent = self._parents[int(rng.integers(len(self._parents)))]
            if len(self._parents) > 1 and rng.random() < CROSSED:
                other = self._parents[int(rng.integers(len(self._parents)))]
                parent = self._variation.cross(parent, other, rng)
            child = self._variation.mutate(parent, rng)
            if self._variation.steps(child) not in taken:
                break
        return child
