"""CMA-ES (Hansen & Ostermeier 2001; Hansen 2016, arXiv 1604.00772) by pycma."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from evomerge.config import OptimizerConfig
from evomerge.errors import UserError
from evomerge.optimizers.base import Told, in_order_of_asking, initial_of, population_size
from evomerge.randomness import generator
from evomerge.spaces.genotype import Coordinate, Genotype


class CMA:
    """CMA-ES on the unit cube, told ranks only.

    - Its numbers come from a generator derived for each generation; pycma's default is numpy's global one.
    - Nothing stops it: the budget is the caller's, and one flat generation would trip pycma's tolerances.
    - A generation in which fewer than half of the candidates are told, or all share one rank, says nothing
      about directions and leaves the distribution as it is.
    - An integer coordinate moves continuously, and `evomerge.spaces` rounds it; its standard deviation is
      kept above a fifth of a step, so that it can still leave the integer it sits on (Hansen 2011, INRIA
      RR-7751).
    - A choice of two is a number above or below 1/2, as in EvoLLM's indicators: the distribution starts so far
      from 1/2 that each choice is as likely as its weight says.
    - In one dimension, which pycma does not support, a second coordinate without effect goes along.
    - Linear algebra runs on one thread: more would change the last bits.
    """

    def __init__(self, config: OptimizerConfig, coordinates: Sequence[Coordinate], *, seed: int) -> None:
        """Start at the coordinates' initial values.

        Raises:
            UserError: a choice of more than two among the coordinates.
        """
        for coordinate in coordinates:
            if coordinate.kind == "choice" and len(coordinate.choices) != 2:
                raise UserError(
                    f"optimizer.type: cma cannot search the choice {coordinate.name}; use tpe or random"
                )
        self._binary = np.array([c.kind == "choice" for c in coordinates])
        self.population = population_size(config, len(coordinates))
        self._seed = seed
        self._initial = initial_of(coordinates)
        self._padding = 1 if len(coordinates) == 1 else 0
        self._normals: np.random.Generator | None = None
        self._asked: list[Genotype] = []
        self._points: list[NDArray[np.float64]] = []
        self._told_any = False
        # 1 / (high - low) is the step of an integer in [0, 1] of its range.
        deviations = [0.2 / (c.high - c.low) if c.kind == "integer" else 0.0 for c in coordinates]
        mean = [_start_of(c, config.sigma) for c in coordinates]
        self._es = self._start(mean, config.sigma, [*deviations, *([0.0] * self._padding)])
        self.parents = int(self._es.sp.weights.mu)

    def _start(self, mean: list[float], sigma: float, smallest_deviations: list[float]) -> Any:
        never = {"tolfun": 0, "tolfunhist": 0, "tolfunrel": 0, "tolx": 0, "tolflatfitness": math.inf}
        never |= {"tolstagnation": math.inf, "tolxstagnation": False, "tolupsigma": math.inf}
        never |= {"tolconditioncov": math.inf, "maxiter": math.inf, "maxfevals": math.inf}
        options = {
            "bounds": [0, 1],
            "popsize": self.population,
            "CMA_mirrors": 0,
            "minstd": smallest_deviations,
            "seed": np.nan,
            "randn": self._randn,
            "verbose": -10,
            "verb_log": 0,
            "verb_disp": 0,
            **never,
        }
        with _quiet():
            import cma

            return cma.CMAEvolutionStrategy([*mean, *([0.5] * self._padding)], sigma, options)

    def _randn(self, *shape: int) -> Any:
        assert self._normals is not None, "numbers are drawn while asking only"
        return self._normals.standard_normal(shape)

    def ask(self, generation: int) -> list[Genotype]:
        """Return `population` genotypes; in generation 0 the first is the initial one, exactly."""
        self._normals = generator(self._seed, "cma", generation)
        with _quiet():
            if generation == 0:
                self._es.inject([self._es.mean.copy()], force=True)
            self._points = self._es.ask()
        self._normals = None
        self._asked = [self._genotype(point) for point in self._points]
        if generation == 0:
            self._asked[0] = self._initial
        return list(self._asked)

    def tell(self, generation: int, told: Sequence[Told]) -> None:
        """Update the distribution with the ranks of the generation asked last.

        Raises:
            ValueError: an outcome of a genotype that was not asked.
        """
        outcomes = in_order_of_asking(self._asked, told)
        self._told_any = True
        ranked = sorted(outcomes, key=lambda pair: (pair[1].fitness is None, pair[1].rank, pair[0]))
        informative = len({(t.fitness is None, t.rank) for _, t in outcomes}) > 1
        if not informative or len(ranked) < max(3, math.ceil(self.population / 2)):
            return
        with _quiet():
            self._es.tell(
                [self._points[place] for place, _ in ranked], [float(i) for i in range(len(ranked))]
            )

    def mean(self) -> Genotype | None:
        """Return the distribution's mean inside the bounds: the estimate of the optimum under noise."""
        return self._genotype(self._es.result.xfavorite) if self._told_any else None

    def _genotype(self, point: NDArray[np.float64]) -> Genotype:
        used = np.clip(point[: len(point) - self._padding], 0.0, 1.0)
        return tuple(float(x) for x in np.where(self._binary, used > 0.5, used))


def _start_of(coordinate: Coordinate, sigma: float) -> float:
    if coordinate.kind != "choice":
        return coordinate.initial
    chance = coordinate.weights[1] if coordinate.weights else 0.5
    return min(max(0.5 + sigma * NormalDist().inv_cdf(min(max(chance, 1e-9), 1 - 1e-9)), 0.0), 1.0)


@contextmanager
def _quiet() -> Iterator[None]:
    """One BLAS thread, no warnings."""
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
