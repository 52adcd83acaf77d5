"""Tree-structured Parzen estimator (Bergstra et al. 2011; Watanabe 2023, arXiv 2304.11127) by Optuna."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from evomerge.config import OptimizerConfig
from evomerge.optimizers.base import Told, in_order_of_asking, initial_of, population_size
from evomerge.randomness import generator
from evomerge.spaces.genotype import Coordinate, Genotype
from evomerge.spaces.units import to_unit, to_value


class TPE:
    """TPE over floats, integers and choices, told fitness values; for mixed spaces and small budgets.

    The study lives in memory. Each generation gets a sampler with a seed of its own, so that a replay needs
    no sampler state. Candidates of a generation that have no value yet count as bad ones (constant liar),
    which spreads a generation. Failed candidates stay in the model, behind all others: Optuna's ``PRUNED``
    without an intermediate value; its ``FAIL`` would drop them and propose their neighbourhood again.
    Candidates that did not come through a screen are ``PRUNED`` with their score there, which places them, in
    its order, between scored and failed ones.
    """

    def __init__(self, config: OptimizerConfig, coordinates: Sequence[Coordinate], *, seed: int) -> None:
        self.population = population_size(config, len(coordinates))
        self.parents = 1
        self._coordinates = {f"x{i}": coordinate for i, coordinate in enumerate(coordinates)}
        self._initial = initial_of(coordinates)
        self._seed = seed
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._study = optuna.create_study(direction="maximize", sampler=self._sampler(0))
        self._distributions = {name: _distribution(c) for name, c in self._coordinates.items()}
        self._study.enqueue_trial(
            {name: _to_param(c, c.initial) for name, c in self._coordinates.items()}, skip_if_exists=False
        )
        self._asked: list[Genotype] = []
        self._trials: list[Any] = []

    def _sampler(self, generation: int) -> Any:
        seed = int(generator(self._seed, "tpe", generation).integers(2**32))
        return optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True)

    def ask(self, generation: int) -> list[Genotype]:
        """Return `population` genotypes; in generation 0 the first is the initial one."""
        self._study.sampler = self._sampler(generation)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._trials = [self._study.ask(self._distributions) for _ in range(self.population)]
        self._asked = [
            tuple(_from_param(c, trial.params[name]) for name, c in self._coordinates.items())
            for trial in self._trials
        ]
        if generation == 0:
            self._asked[0] = self._initial
        return list(self._asked)

    def tell(self, generation: int, told: Sequence[Told]) -> None:
        """Add the outcomes of the generation asked last to the study; missing ones are forgotten.

        Raises:
            ValueError: an outcome of a genotype that was not asked.
        """
        outcomes = dict(in_order_of_asking(self._asked, told))
        for place, trial in enumerate(self._trials):
            if place not in outcomes:
                self._study.tell(trial, state=TrialState.FAIL)
                continue
            outcome = outcomes[place]
            if outcome.fitness is not None:
                self._study.tell(trial, outcome.fitness)
                continue
            if outcome.screened is not None:
                trial.report(outcome.screened, step=0)
            self._study.tell(trial, state=TrialState.PRUNED)

    def mean(self) -> Genotype | None:
        """Return None: the estimator has no single centre."""
        return None


def _distribution(coordinate: Coordinate) -> Any:
    if coordinate.kind == "choice":
        return CategoricalDistribution(tuple(range(len(coordinate.choices))))
    if coordinate.kind == "integer":
        return IntDistribution(int(coordinate.low), int(coordinate.high), log=coordinate.log)
    return FloatDistribution(0.0, 1.0)


def _to_param(coordinate: Coordinate, number: float) -> float | int:
    if coordinate.kind == "choice":
        return int(number)
    return int(to_value(coordinate, number)) if coordinate.kind == "integer" else number


def _from_param(coordinate: Coordinate, param: float | int) -> float:
    if coordinate.kind == "integer":
        return to_unit(float(param), coordinate.low, coordinate.high, coordinate.log)
    return float(param)
