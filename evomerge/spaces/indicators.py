"""EvoLLM's genome of layer paths (Akiba et al. 2024, arXiv 2403.13187): which slots of a layout are switched on."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from evomerge.layers_config import LayerSpace
from evomerge.spaces.genotype import Coordinate, Genotype
from evomerge.spaces.paths import Scales, Step, jumps, tidied
from evomerge.spaces.units import to_unit

ADDED, DROPPED = 1.0, 0.5
"""Layers that a sparse start adds and drops on average."""

PAPER_KEPT = 0.977
"""The chance of a layer of the first model where the search starts as in the paper: its indicator lies at 2σ."""


class Indicators:
    """All layers of the pool in order, model after model, `repeats` times: T = M · r slots, each on or off.

    - The first slot, and after all slots the last layer of the first model, are always on.
    - Scales: one for each layer of the pool, applied whenever a path jumps there (a scaling matrix W of rank
      one: W_ij = s_j on jumps, 1 elsewhere).
    - A path that is too long loses what it has besides the first model's first repetition, the last slot first;
      one that is too short gets back layers of that repetition, the first one first.
    - A sparse start switches on one of the other slots on average, and off half a layer of the first model.

    Attributes:
        coordinates: one choice (off, on) for each free slot, then one scale for each layer of the pool.
        initial: the first model's layers in order.
        longest: layers of the longest path.
    """

    def __init__(self, space: LayerSpace, layers: int) -> None:
        self._layers = layers
        self._low, self._high = space.lengths(layers)
        self._scales = Scales(space)
        models = len(space.pool)
        layout = [
            (repeat, m, layer)
            for repeat in range(space.repeats)
            for m in range(models)
            for layer in range(layers)
        ]
        self._slots = layout[1:]
        # The forced end is a layer of its own behind all slots.
        self._base = [(r, m) == (0, 0) and layer < layers - 1 for r, m, layer in self._slots]
        others = self._base.count(False)
        add = 0.5 if space.start == "paper" else min(0.5, ADDED / max(1, others))
        keep = PAPER_KEPT if space.start == "paper" else 1 - min(0.5, DROPPED / (layers - 2))
        names = [f"{space.pool[m]} {layer}" + (f" #{r + 1}" if r else "") for r, m, layer in self._slots]
        self.coordinates: list[Coordinate] = [
            Coordinate(name, "choice", 0.0, 1.0, float(base), choices=(False, True), weights=(1 - p, p))
            for name, base in zip(names, self._base, strict=True)
            for p in [keep if base else add]
        ]
        if self._scales.searched:
            self.coordinates += [
                self._scales.coordinate(f"scale into {model} {layer}")
                for model in space.pool
                for layer in range(layers)
            ]
        self.initial: Genotype = tuple(c.initial for c in self.coordinates)
        self.longest = min(self._high, len(self._slots) + 2)

    def steps(self, genotype: Genotype) -> tuple[Step, ...]:
        """Return the path of a genotype."""
        on = self._repaired([bool(number) for number in genotype[: len(self._slots)]])
        chosen = [
            (0, 0),
            *((m, layer) for (_, m, layer), is_on in zip(self._slots, on, strict=True) if is_on),
        ]
        chosen.append((0, self._layers - 1))
        return tidied([Step(m, layer, self._scale(genotype, m, layer)) for m, layer in chosen])

    def _repaired(self, on: list[bool]) -> list[bool]:
        for place in reversed(range(len(on))):
            if sum(on) + 2 > self._high and on[place] and not self._base[place]:
                on[place] = False
        for place in range(len(on)):
            if sum(on) + 2 < self._low and self._base[place]:
                on[place] = True
        return on

    def _scale(self, genotype: Genotype, model: int, layer: int) -> float:
        if not self._scales.searched:
            return 1.0
        place = self._scale_place(model, layer)
        return self._scales.value(self.coordinates[place], genotype[place])

    def _scale_place(self, model: int, layer: int) -> int:
        return len(self._slots) + model * self._layers + layer

    def mutate(self, genotype: Genotype, rng: np.random.Generator) -> Genotype:
        """Return the genotype with one slot, a run of slots, or a scale changed; a second change now and then."""
        changed = list(genotype)
        for _ in range(1 + int(rng.random() < 0.3)):
            if self._scales.searched and rng.random() < 0.3:
                self._change_scale(changed, rng)
            else:
                self._change_slots(changed, rng)
        return tuple(changed)

    def _change_slots(self, genotype: list[float], rng: np.random.Generator) -> None:
        """Switch a run of slots of one model off, or on: half of the time each, single slots most often."""
        wanted = float(rng.random() < 0.5)
        places = [i for i in range(len(self._slots)) if genotype[i] != wanted]
        if not places:
            return
        first = places[int(rng.integers(len(places)))]
        length = min(int(rng.geometric(0.6)), self._layers)
        for place in range(first, min(first + length, len(self._slots))):
            if self._slots[place][:2] == self._slots[first][:2]:
                genotype[place] = wanted

    def _change_scale(self, genotype: list[float], rng: np.random.Generator) -> None:
        path = self.steps(tuple(genotype))
        entered = [step for before, step in pairwise(path) if jumps(before, step)]
        if entered:
            step = entered[int(rng.integers(len(entered)))]
            place = self._scale_place(step.model, step.layer)
            coordinate = self.coordinates[place]
            scale = self._scales.varied(self._scales.value(coordinate, genotype[place]), rng)
            genotype[place] = to_unit(scale, coordinate.low, coordinate.high, coordinate.log)

    def cross(self, one: Genotype, other: Genotype, rng: np.random.Generator) -> Genotype:
        """Return a genotype with each number of either parent."""
        take: Sequence[bool] = (rng.random(len(one)) < 0.5).tolist()
        return tuple(b if t else a for a, b, t in zip(one, other, take, strict=True))
