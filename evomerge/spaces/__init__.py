"""Search spaces: genotypes in, recipes out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from evomerge.config import Config
from evomerge.recipe import Source
from evomerge.spaces.baselines import baseline_recipes, undefined_baselines
from evomerge.spaces.coefficients import CoefficientSpace
from evomerge.spaces.describe import describe_recipe
from evomerge.spaces.genotype import Coordinate, Genotype, Variation
from evomerge.spaces.path_space import PathSpace
from evomerge.spaces.space import SearchSpace

__all__ = [
    "CoefficientSpace",
    "Coordinate",
    "Genotype",
    "PathSpace",
    "SearchSpace",
    "Variation",
    "baseline_recipes",
    "describe_recipe",
    "space_for",
    "undefined_baselines",
]


def space_for(
    config: Config, num_layers: int, sources: Mapping[str, Source], *, file: Path | str | None = None
) -> SearchSpace:
    """Return the search space that a config describes, the first if there are two.

    Args and errors are those of `CoefficientSpace` and `PathSpace`.
    """
    if config.coefficients is None:
        return PathSpace(config, num_layers=num_layers, sources=sources, file=file)
    return CoefficientSpace(config, num_layers=num_layers, sources=sources, file=file)
