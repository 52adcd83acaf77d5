"""CatCMA with margin (Hamano et al. 2025, arXiv 2504.07884) by cmaes: numbers, integers and choices together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from cmaes import CatCMAwM
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from evomerge.config import OptimizerConfig
from evomerge.optimizers.base import Told, in_order_of_asking, initial_of, population_size
from evomerge.randomness import generator
from evomerge.spaces.genotype import Coordinate, Genotype
from evomerge.spaces.units import to_unit, to_value


class CatCMA:
    """A Gaussian over numbers and integers beside a categorical distribution over choices, told ranks only.

    - Choices start as likely as their weights say, though never less likely than the margin allows (1 - 0.73
      to the power 1 / number of discrete coordinates), and each stays that likely to the end.
    - cmaes wants to be told of every candidate: one that failed, or that is not told, is the worst of all.
    - A generation in which fewer than half of the candidates are told, or all share one rank, leaves the
      distribution as it is.
    - Linear algebra runs on one thread: more would change the last bits.
    """

    def __init__(self, config: OptimizerConfig, coordinates: Sequence[Coordinate], *, seed: int) -> None:
        self.population = population_size(config, len(coordinates))
        self.parents = self.population // 2
        self._coordinates = tuple(coordinates)
        self._initial = initial_of(coordinates)
        self._places = {kind: _places(coordinates, kind) for kind in ("float", "integer", "choice")}
        self._asked: list[Genotype] = []
        self._solutions: list[CatCMAwM.Solution] = []
        self._told_any = False
        floats, integers, choices = (
            [coordinates[i] for i in self._places[kind]] for kind in ("float", "integer", "choice")
        )
        spaces = (
            [[0.0, 1.0] for _ in floats],
            [_units(c) for c in integers],
            [len(c.choices) for c in choices],
        )
        self._start = np.array([c.initial for c in (*floats, *integers)])
        self._optimizer = CatCMAwM(
            x_space=spaces[0] or None,
            z_space=spaces[1] or None,
            c_space=spaces[2] or None,
            population_size=self.population,
            mean=self._start.copy(),
            sigma=config.sigma,
            cov=np.eye(len(self._start)),
            cat_param=_chances(choices) if choices else None,
            seed=int(generator(seed, "catcma").integers(2**32)),
        )

    def ask(self, generation: int) -> list[Genotype]:
        """Return `population` genotypes; in generation 0 the first is the initial one."""
        with threadpool_limits(1):
            self._solutions = [self._optimizer.ask() for _ in range(self.population)]
        self._asked = [self._genotype(s.x, s.z, s.c) for s in self._solutions]
        if generation == 0:
            self._asked[0], self._solutions[0] = self._initial, self._initial_solution()
        return list(self._asked)

    def tell(self, generation: int, told: Sequence[Told]) -> None:
        """Update the distribution with the ranks of the generation asked last.

        Raises:
            ValueError: an outcome of a genotype that was not asked.
        """
        outcomes = dict(in_order_of_asking(self._asked, told))
        self._told_any = True
        informative = len({(t.fitness is None, t.rank) for t in outcomes.values()}) > 1
        if not informative or len(outcomes) < (self.population + 1) // 2:
            return

        def worth(place: int) -> tuple[bool, bool, float, int]:
            outcome = outcomes.get(place)
            return (
                outcome is None,
                outcome is None or outcome.fitness is None,
                outcome.rank if outcome else 0,
                place,
            )

        order = sorted(range(self.population), key=worth)
        with threadpool_limits(1), np.errstate(all="ignore"):
            self._optimizer.tell([(self._solutions[place], float(i)) for i, place in enumerate(order)])

    def mean(self) -> Genotype | None:
        """Return the Gaussian's mean and the likeliest choices."""
        if not self._told_any:
            return None
        count = len(self._places["float"])
        mean = np.asarray(self._optimizer._mean) if len(self._start) else self._start
        return self._genotype(
            mean[:count], mean[count:], self._optimizer._q if self._places["choice"] else None
        )

    def _genotype(
        self,
        floats: NDArray[np.float64] | None,
        integers: NDArray[np.float64] | None,
        choices: NDArray[np.float64] | NDArray[np.bool_] | None,
    ) -> Genotype:
        numbers = list(self._initial)
        for place, x in zip(self._places["float"], _listed(floats), strict=True):
            numbers[place] = min(max(float(x), 0.0), 1.0)
        for place, z in zip(self._places["integer"], _listed(integers), strict=True):
            numbers[place] = _on_grid(self._coordinates[place], min(max(float(z), 0.0), 1.0))
        for place, row in zip(self._places["choice"], _listed(choices), strict=True):
            numbers[place] = float(np.argmax(row))
        return tuple(numbers)

    def _initial_solution(self) -> CatCMAwM.Solution:
        rows = [(place, len(self._coordinates[place].choices)) for place in self._places["choice"]]
        width = max((count for _, count in rows), default=0)
        choices = np.array([[i == int(self._initial[place]) for i in range(width)] for place, _ in rows])
        return CatCMAwM.Solution(
            x=self._start[: len(self._places["float"])],
            z=self._start[len(self._places["float"]) :],
            c=choices if rows else None,
            _v_raw=self._start.copy(),
        )


def _places(coordinates: Sequence[Coordinate], kind: str) -> list[int]:
    return [place for place, coordinate in enumerate(coordinates) if coordinate.kind == kind]


def _listed(values: NDArray[np.float64] | NDArray[np.bool_] | None) -> Sequence[float]:
    return [] if values is None else list(values)


def _units(coordinate: Coordinate) -> list[float]:
    """Return the places in [0, 1] of an integer coordinate's values."""
    values = range(int(coordinate.low), int(coordinate.high) + 1)
    return [to_unit(float(value), coordinate.low, coordinate.high, coordinate.log) for value in values]


def _on_grid(coordinate: Coordinate, number: float) -> float:
    value = float(to_value(coordinate, number))
    return to_unit(value, coordinate.low, coordinate.high, coordinate.log)


def _chances(choices: Sequence[Coordinate]) -> NDArray[np.float64]:
    """Return each choice's chance at the start, (coordinates, most choices), padded with zeros."""
    table = np.zeros((len(choices), max(len(c.choices) for c in choices)))
    for row, c in zip(table, choices, strict=True):
        row[: len(c.choices)] = c.weights or np.full(len(c.choices), 1 / len(c.choices))
    return table
