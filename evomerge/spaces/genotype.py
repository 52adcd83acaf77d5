"""Genotypes: points of a search space as the optimisers see them."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

Genotype = tuple[float, ...]
"""One number per coordinate: in [0, 1] of the coordinate's range, or the index of a choice."""


@dataclass(frozen=True)
class Coordinate:
    """One searched number.

    Attributes:
        name: readable, e.g. ``weight[arithmetic]@1/2``.
        kind: ``float``, ``integer`` (steps of 1 in the range) or ``choice``.
        low, high: the range in the parameter's own units (0 and 1 for a choice).
        log: whether [0, 1] covers the range on a logarithmic scale.
        choices: the values of a choice.
        weights: how likely each choice is where a search starts; empty: all alike.
        initial: where the search starts, as a genotype's number.
    """

    name: str
    kind: Literal["float", "integer", "choice"]
    low: float
    high: float
    initial: float
    log: bool = False
    choices: tuple[float | bool | str, ...] = ()
    weights: tuple[float, ...] = ()


def check_length(genotype: Genotype, dimension: int) -> None:
    """Refuse a genotype of another length than the space's dimension.

    Raises:
        ValueError: with both lengths.
    """
    if len(genotype) != dimension:
        raise ValueError(f"a genotype of this space has {dimension} numbers, not {len(genotype)}")


class Variation(Protocol):
    """How a space changes genotypes where their numbers mean something together only."""

    def mutate(self, genotype: Genotype, rng: np.random.Generator) -> Genotype:
        """Return a genotype that differs a little."""
        ...

    def cross(self, one: Genotype, other: Genotype, rng: np.random.Generator) -> Genotype:
        """Return a genotype that has something of both."""
        ...

    def steps(self, genotype: Genotype) -> Hashable:
        """Return what a genotype stands for: the same of two that are one recipe."""
        ...
