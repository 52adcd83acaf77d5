"""Problems with known optima, and the loop that runs an optimiser on them.

As a script: runs the optimisers of `CASES` in this process and prints the asks, every float with all its digits.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import numpy as np

from evomerge.config import OptimizerConfig
from evomerge.layers_config import LayerSpace
from evomerge.optimizers import Optimizer, Told, make_optimizer
from evomerge.spaces.edits import Edits
from evomerge.spaces.genotype import Coordinate, Genotype
from evomerge.spaces.indicators import Indicators

Fitness = Callable[[Genotype], float | None]

CASES = [
    ("cma", "40"),
    ("cma", "1"),
    ("cma", "indicators"),
    ("catcma", "40"),
    ("catcma", "mixed"),
    ("catcma", "indicators"),
    ("edits", "indicators"),
    ("edits", "edits"),
    ("tpe", "mixed"),
    ("random", "mixed"),
    ("random", "indicators"),
]
"""Optimisers with their spaces: a number of floats, `mixed`, or a genome of layer paths."""

Genome = Indicators | Edits


def floats(dimension: int, initial: float = 0.5) -> list[Coordinate]:
    return [Coordinate(f"x{i}", "float", -1.0, 2.0, initial) for i in range(dimension)]


def mixed() -> list[Coordinate]:
    return [
        Coordinate("weight", "float", -1.0, 2.0, 0.25),
        Coordinate("steps", "integer", 2.0, 10.0, 0.125),
        Coordinate("width", "integer", 1.0, 64.0, 0.5, log=True),
        Coordinate("rule", "choice", 0.0, 1.0, 2.0, choices=("x", "y", "z")),
    ]


def genome(name: str, layers: int = 6, **options: object) -> Genome:
    defaults = {"pool": ("a", "b"), "scale": {"range": [0.5, 2.0]}}
    space = LayerSpace(genome=name, **{**defaults, **options})
    return Edits(space, layers) if name == "edits" else Indicators(space, layers)


def space_of(name: str) -> list[Coordinate] | Genome:
    if name in ("indicators", "edits"):
        return genome(name)
    return mixed() if name == "mixed" else floats(int(name))


def make(kind: str, space: Sequence[Coordinate] | Genome, seed: int = 0, **options: object) -> Optimizer:
    variation = space if isinstance(space, Genome) else None
    coordinates = space.coordinates if isinstance(space, Genome) else space
    config = OptimizerConfig(type=kind, **options)
    return make_optimizer(config, coordinates, seed=seed, variation=variation)


def sphere(genotype: Genotype) -> float:
    target = np.linspace(0.2, 0.9, len(genotype))
    return -float(np.sum((np.array(genotype) - target) ** 2))


def ellipsoid(genotype: Genotype) -> float:
    target = np.linspace(0.2, 0.9, len(genotype))
    return -float(10 ** np.linspace(0, 2, len(genotype)) @ (np.array(genotype) - target) ** 2)


def tell_of(generation: Sequence[Genotype], fitness: Fitness) -> list[Told]:
    values = [fitness(genotype) for genotype in generation]
    order = sorted({v for v in values if v is not None}, reverse=True)
    ranks = [len(generation) if v is None else order.index(v) for v in values]
    return [Told(g, float(r), v) for g, r, v in zip(generation, ranks, values, strict=True)]


def run(optimizer: Optimizer, fitness: Fitness, candidates: int) -> list[list[Genotype]]:
    """Return the asks, generation by generation."""
    asks: list[list[Genotype]] = []
    while sum(map(len, asks)) < candidates:
        asks.append(optimizer.ask(len(asks)))
        optimizer.tell(len(asks) - 1, tell_of(asks[-1], fitness))
    return asks


def noisy(genotype: Genotype) -> float | None:
    """Rugged, with ties and failures: exercises every branch of a tell."""
    if sum(genotype) % 1 > 0.8:
        return None
    return round(sphere(tuple(min(x, 1.0) for x in genotype)), 1)


if __name__ == "__main__":
    print(json.dumps([run(make(kind, space_of(space), seed=5), noisy, 90) for kind, space in CASES]))
