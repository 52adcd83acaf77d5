"""Optimisers and genomes of layer paths on a synthetic landscape. Prints a table; see the README."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

import numpy as np

from evomerge.config import OptimizerConfig
from evomerge.layers_config import LayerSpace
from evomerge.optimizers import Told, make_optimizer
from evomerge.searching.ranking import rank
from evomerge.spaces.edits import Edits
from evomerge.spaces.indicators import Indicators
from evomerge.spaces.paths import Step, jumps

LAYERS, ITEMS, MODELS = 12, 96, 2
MARKS = (300, 600, 1500)
CASES = [
    ("edits", "edits", "auto", "sparse"),
    ("edits", "catcma", 24, "sparse"),
    ("edits", "random", 24, "sparse"),
    ("indicators", "edits", "auto", "sparse"),
    ("indicators", "catcma", 24, "sparse"),
    ("indicators", "cma", "auto", "sparse"),
    ("indicators", "cma", 32, "paper"),
    ("indicators", "random", 24, "sparse"),
]
"""Genome, optimiser, population, start."""


@dataclass(frozen=True)
class Landscape:
    """What a path is worth.

    Attributes:
        good: (model, layer, place in the first model's order) → what inserting that layer there adds.
        bad: layers of the first model that are better dropped.
        scale: (model, layer) → the best scale for a jump to it.
    """

    good: dict[tuple[int, int, int], float]
    bad: set[int]
    scale: dict[tuple[int, int], float]


def landscape(seed: int) -> Landscape:
    """Return ten good insertions near their own depth, two bad layers, and log-normal best scales."""
    rng = np.random.default_rng(seed)
    good = {}
    for _ in range(10):
        model, layer = int(rng.integers(MODELS)), int(rng.integers(1, LAYERS - 1))
        place = int(np.clip(layer + rng.integers(-2, 3), 1, LAYERS - 1))
        good[model, layer, place] = rng.uniform(0.3, 1.2)
    bad = {int(x) for x in rng.choice(np.arange(1, LAYERS - 1), 2, replace=False)}
    scale = {(m, i): float(np.exp(rng.normal(0, 0.2))) for m in range(MODELS) for i in range(LAYERS)}
    return Landscape(good, bad, scale)


def accuracy(steps: tuple[Step, ...], land: Landscape, *, scaled: bool) -> float:
    """Return the true accuracy of a path; that of the first model is 0.389."""
    worth, place = 0.0, 0
    kept: set[int] = set()
    used: set[tuple[int, int]] = set()
    before: Step | None = None
    for step in steps:
        key = (step.model, step.layer)
        if step.model == 0 and step.layer not in kept and step.layer >= place:
            kept.add(step.layer)
            place = step.layer + 1
        else:
            gain = land.good.get((*key, place))
            worth += gain if gain and key not in used else -0.25
            used.add(key)
        if jumps(before, step):
            assert before is not None
            worth -= 0.1 + 0.03 * abs(step.layer - (before.layer + 1))
            if scaled:
                worth -= 0.5 * abs(math.log(step.scale / land.scale[key]))
        before = step
    for layer in set(range(LAYERS)) - kept:
        worth += 0.6 if layer in land.bad else -0.8
    return 1 / (1 + math.exp(0.45 - worth))


def search(case: tuple[str, str, str | int, str], seed: int, *, scaled: bool) -> list[float]:
    """Return the true accuracy of what the optimiser would return, after each of `MARKS` candidates."""
    name, kind, population, start = case
    scale = {"range": [0.5, 2.0]} if scaled else 1.0
    space = LayerSpace(pool=("a", "b"), repeats=2, genome=name, scale=scale, start=start)
    genome = Edits(space, LAYERS) if name == "edits" else Indicators(space, LAYERS)
    land = landscape(seed)
    config = OptimizerConfig(type=kind, population=population)
    optimizer = make_optimizer(config, genome.coordinates, seed=seed, variation=genome)
    rng = np.random.default_rng(seed + 77)
    found: list[float] = []
    generation = asked = 0
    while len(found) < len(MARKS):
        genotypes = optimizer.ask(generation)
        difficulty = rng.normal(0, 1.0, ITEMS)
        scores: dict[tuple[Step, ...], float] = {}
        for genotype in genotypes:
            steps = genome.steps(genotype)
            if steps not in scores:
                p = accuracy(steps, land, scaled=scaled)
                chances = 1 / (1 + np.exp(-(1.2 * math.log(p / (1 - p)) + difficulty)))
                scores[steps] = float(np.mean(rng.random(ITEMS) < chances))
        fitness = [scores[genome.steps(genotype)] for genotype in genotypes]
        told = [Told(g, r, f) for g, r, f in zip(genotypes, rank(fitness), fitness, strict=True)]
        optimizer.tell(generation, told)
        generation += 1
        asked += len(genotypes)
        mean = optimizer.mean() or genotypes[int(np.argmax(fitness))]
        while len(found) < len(MARKS) and asked >= MARKS[len(found)]:
            found.append(accuracy(genome.steps(mean), land, scaled=scaled))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=8)
    seeds = range(parser.parse_args().seeds)
    for scaled in (False, True):
        starts = [
            accuracy(tuple(Step(0, i) for i in range(LAYERS)), landscape(s), scaled=scaled) for s in seeds
        ]
        print(f"\nscales: {'searched' if scaled else '1'}; the first model: {np.mean(starts):.3f}\n")
        print("| genome | optimiser | population | start |", *(f"{mark} |" for mark in MARKS))
        print("|" + "---|" * (4 + len(MARKS)))
        for case in CASES:
            results = np.array([search(case, seed, scaled=scaled) for seed in seeds])
            errors = results.std(axis=0, ddof=1) / math.sqrt(len(results))
            cells = [f"{m:.3f} ± {e:.3f} |" for m, e in zip(results.mean(axis=0), errors, strict=True)]
            print("|", *(f"{part} |" for part in case), *cells, flush=True)


if __name__ == "__main__":
    main()
