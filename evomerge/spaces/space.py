"""What every search space does: genotypes in, recipes out."""

from __future__ import annotations

from typing import Protocol

from evomerge.recipe import Recipe
from evomerge.spaces.genotype import Coordinate, Genotype, Variation


class SearchSpace(Protocol):
    """Maps genotypes to recipes.

    Attributes:
        coordinates: the searched numbers.
        initial: the genotype where the search starts.
        anchor: a recipe that is known to work; what is clearly worse on the first items is asked no further. None:
            everybody is asked everything.
        variation: how genotypes are changed whose numbers mean something together only; None: number by number.
    """

    coordinates: tuple[Coordinate, ...]
    initial: Genotype
    variation: Variation | None
    anchor: Recipe | None

    @property
    def dimension(self) -> int:
        """Number of coordinates."""
        ...

    def decode(self, genotype: Genotype) -> Recipe:
        """Return the recipe of a genotype.

        Raises:
            ValueError: wrong length, or a number outside its coordinate's domain.
        """
        ...

    def penalty(self, recipe: Recipe) -> float:
        """Return what a recipe's fitness is reduced by before candidates are ranked."""
        ...
