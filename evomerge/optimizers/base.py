"""What every optimiser does: ask for a generation of genotypes, be told how they fared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from evomerge.config import OptimizerConfig
from evomerge.spaces.genotype import Coordinate, Genotype


@dataclass(frozen=True)
class Told:
    """How one candidate of a generation fared.

    Attributes:
        genotype: as asked, bit for bit.
        rank: 0 is the best of the generation; ties share a rank; candidates that did not come through the screen
            come behind all others, and failed ones last.
        fitness: larger is better; None for a candidate that failed or did not come through the screen.
        screened: of the latter its score on the screen, in [0, 1], comparable only with other such scores.
    """

    genotype: Genotype
    rank: float
    fitness: float | None
    screened: float | None = None


class Optimizer(Protocol):
    """Proposes genotypes, generation by generation.

    The first candidate of generation 0 is the space's initial genotype. Asks depend on the constructor's
    arguments and on what was told alone: constructed anew, and asked and told the same, an optimiser
    proposes the same numbers bit for bit.

    Attributes:
        population: candidates of a generation.
        parents: how many of a generation's best it learns from; a screen lets through no fewer.
    """

    population: int
    parents: int

    def ask(self, generation: int) -> list[Genotype]:
        """Return `population` genotypes. Generations are asked in order: 0, 1, 2 …"""
        ...

    def tell(self, generation: int, told: Sequence[Told]) -> None:
        """Take in the outcome of the generation asked last, in any order; candidates may be missing."""
        ...

    def mean(self) -> Genotype | None:
        """Return the mean of the search distribution after the last tell; None if there is no such thing."""
        ...


def population_size(config: OptimizerConfig, dimension: int) -> int:
    """Return the number of candidates in a generation.

    ``auto`` is CMA-ES's default 4 + ⌊3 ln d⌋ (Hansen 2016, arXiv 1604.00772, eq. 48), but at least 6.
    """
    if config.population == "auto":
        return max(6, 4 + math.floor(3 * math.log(dimension)))
    return config.population


def in_order_of_asking(asked: Sequence[Genotype], told: Sequence[Told]) -> list[tuple[int, Told]]:
    """Pair each outcome with its candidate's place in the generation, so that arrival order never matters.

    Raises:
        ValueError: an outcome belongs to none of the candidates asked.
    """
    free: dict[Genotype, list[int]] = {}
    for place, genotype in enumerate(asked):
        free.setdefault(genotype, []).append(place)
    pairs = []
    for outcome in sorted(told, key=lambda t: t.rank):
        places = free.get(outcome.genotype)
        if not places:
            raise ValueError(f"told about {outcome.genotype}, which is not among the candidates asked last")
        pairs.append((places.pop(0), outcome))
    return sorted(pairs, key=lambda pair: pair[0])


def initial_of(coordinates: Sequence[Coordinate]) -> Genotype:
    """Return the genotype where the search starts."""
    return tuple(coordinate.initial for coordinate in coordinates)
