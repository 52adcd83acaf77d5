"""Optimisers: genotypes out, ranks and fitness in. One algorithm, one file."""

from __future__ import annotations

from collections.abc import Sequence

from evomerge.config import OptimizerConfig
from evomerge.errors import UserError
from evomerge.optimizers.base import Optimizer, Told, population_size
from evomerge.spaces.genotype import Coordinate, Variation

__all__ = ["Optimizer", "Told", "make_optimizer", "population_size"]


def make_optimizer(
    config: OptimizerConfig,
    coordinates: Sequence[Coordinate],
    *,
    seed: int,
    variation: Variation | None = None,
) -> Optimizer:
    """Return the optimiser that a config names.

    Args:
        config: the config's `optimizer`.
        coordinates: of the search space, at least one.
        seed: the run's seed.
        variation: how the space changes genotypes; `edits` needs one.

    Raises:
        UserError: the optimiser cannot search these coordinates.
    """
    if config.type == "cma":
        from evomerge.optimizers.cma import CMA

        return CMA(config, coordinates, seed=seed)
    if config.type == "catcma":
        from evomerge.optimizers.catcma import CatCMA

        return CatCMA(config, coordinates, seed=seed)
    if config.type == "edits":
        from evomerge.optimizers.edits import EditEA

        if variation is None:
            raise UserError("optimizer.type: edits changes layer paths; use cma, catcma, tpe or random")
        return EditEA(config, coordinates, seed=seed, variation=variation)
    if config.type == "tpe":
        from evomerge.optimizers.optuna_tpe import TPE

        return TPE(config, coordinates, seed=seed)
    from evomerge.optimizers.random_search import RandomSearch

    return RandomSearch(config, coordinates, seed=seed)
