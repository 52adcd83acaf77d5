"""Optimisers: genotypes out, ranks and fitness in. One algorithm, one file."""

from __future__ import annotations

from collections.abc import Sequence

from evomerge.config import OptimizerConfig
from evomerge.optimizers.base import Optimizer, Told, population_size
from evomerge.spaces.genotype import Coordinate

__all__ = ["Optimizer", "Told", "make_optimizer", "population_size"]


def make_optimizer(config: OptimizerConfig, coordinates: Sequence[Coordinate], *, seed: int) -> Optimizer:
    """Return the optimiser that a config names.

    Args:
        config: the config's `optimizer`.
        coordinates: of the search space, at least one.
        seed: the run's seed.

    Raises:
        UserError: the optimiser cannot search these coordinates.
    """
    if config.type == "cma":
        from evomerge.optimizers.cma import CMA

        return CMA(config, coordinates, seed=seed)
    if config.type == "tpe":
        from evomerge.optimizers.optuna_tpe import TPE

        return TPE(config, coordinates, seed=seed)
    from evomerge.optimizers.random_search import RandomSearch

    return RandomSearch(config, coordinates, seed=seed)
