"""A genome of layer paths: a short list of edits of the first model's own order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

from evomerge.layers_config import LayerSpace
from evomerge.spaces.genotype import Coordinate, Genotype
from evomerge.spaces.paths import Scales, Step, tidied
from evomerge.spaces.units import to_unit, to_value

Kind = Literal["none", "insert", "repeat", "skip", "swap"]
KINDS: tuple[Kind, ...] = get_args(Kind)

EDITS_AT_START = 1.5
"""Edits that a candidate drawn at the start has on average."""

TRIES = 20
"""How often a mutation is drawn again that leaves the path as it is."""


@dataclass(frozen=True)
class Edit:
    """One edit of the base path, in which layer p of the first model has the place p.

    Attributes:
        kind: ``insert`` layers of a model before a place; ``repeat`` the layers before it; ``skip`` layers from it
            on; ``swap`` them for the same layers of another model.
        at: the place, 1 … L-1: the first layer stays, and so does the last.
        model: whose layers (insert, swap), by its place in the pool.
        layer: the first layer inserted.
        length: how many layers.
        enter: scale of the residual stream that enters the new layers, or the layer after skipped ones.
        leave: scale of the residual stream that enters the layer after inserted or swapped ones.
    """

    kind: Kind
    at: int
    model: int = 0
    layer: int = 0
    length: int = 1
    enter: float = 1.0
    leave: float = 1.0


class Edits:
    """Up to `max_edits` edits; places count the first model's layers, so that edits do not move each other.

    - Edits are applied in order. One that would make the path too long or too short, or let a layer occur more
      often than `repeats` allows, is left out.
    - Of two edits that scale one layer's input the later one holds.
    - At the start each of the genome's slots holds an edit with a chance that makes 1.5 on average.

    Attributes:
        coordinates: for each slot its kind, place, model, layer, length and, where they are searched, two scales.
        initial: no edits.
        longest: layers of the longest path.
    """

    def __init__(self, space: LayerSpace, layers: int) -> None:
        self._layers = layers
        self._models = len(space.pool)
        self._low, self._high = space.lengths(layers)
        self._repeats = space.repeats
        self._scales = Scales(space)
        self._longest = max(2, layers // 2)
        self._kinds = tuple(k for k in KINDS if k != "swap" or self._models > 1)
        chance = min(0.5, EDITS_AT_START / space.max_edits)
        each = chance / (len(self._kinds) - 1)
        self.coordinates: list[Coordinate] = []
        for slot in range(space.max_edits):
            name = f"edit {slot + 1}"
            weights = (1 - chance, *[each] * (len(self._kinds) - 1))
            self.coordinates += [
                Coordinate(f"{name} kind", "choice", 0.0, 1.0, 0.0, choices=self._kinds, weights=weights),
                Coordinate(f"{name} at", "integer", 1.0, layers - 1.0, 0.0),
            ]
            if self._models > 1:
                self.coordinates.append(
                    Coordinate(f"{name} model", "choice", 0.0, 1.0, 0.0, choices=space.pool)
                )
            self.coordinates += [
                Coordinate(f"{name} layer", "integer", 0.0, layers - 1.0, 0.0),
                Coordinate(f"{name} length", "integer", 1.0, float(self._longest), 0.0),
            ]
            if self._scales.searched:
                self.coordinates += [
                    self._scales.coordinate(f"{name} {end} scale") for end in ("enter", "leave")
                ]
        self._width = len(self.coordinates) // space.max_edits
        self._slots = space.max_edits
        self.initial: Genotype = tuple(c.initial for c in self.coordinates)
        inserted = space.max_edits * self._longest
        self.longest = min(self._high, layers + inserted, self._models * layers * space.repeats)

    def steps(self, genotype: Genotype) -> tuple[Step, ...]:
        """Return the path of a genotype."""
        return self._path(self._kept(self._decoded(genotype)))

    def mutate(self, genotype: Genotype, rng: np.random.Generator) -> Genotype:
        """Return the genotype with an edit added (half of the time), altered or taken away; sometimes two."""
        edits = self._kept(self._decoded(genotype))
        before = self._path(edits)
        for _ in range(TRIES):
            changed = self._encoded(self._changed(edits, rng))
            if self.steps(changed) != before:
                break
        return changed

    def _changed(self, edits: Sequence[Edit], rng: np.random.Generator) -> list[Edit]:
        edits = list(edits)
        for _ in range(1 + int(rng.random() < 0.3)):
            what = rng.random()
            if not edits or (what < 0.5 and len(edits) < self._slots):
                edits.insert(int(rng.integers(len(edits) + 1)), self._random_edit(rng))
            elif what < 0.8:
                place = int(rng.integers(len(edits)))
                edits[place] = self._altered(edits[place], rng)
            else:
                del edits[int(rng.integers(len(edits)))]
        return edits

    def cross(self, one: Genotype, other: Genotype, rng: np.random.Generator) -> Genotype:
        """Return a genotype with the edits that both parents have, and each of the others with a chance of 1/2."""
        mine, theirs = (self._kept(self._decoded(parent)) for parent in (one, other))
        edits = [edit for edit in mine if edit in theirs or rng.random() < 0.5]
        edits += [edit for edit in theirs if edit not in mine and rng.random() < 0.5]
        return self._encoded(edits[: self._slots])

    def _decoded(self, genotype: Genotype) -> list[Edit]:
        edits = []
        for start in range(0, len(genotype), self._width):
            place = slice(start, start + self._width)
            pairs = list(zip(self.coordinates[place], genotype[place], strict=True))
            kind = self._kinds[int(pairs[0][1])]
            if kind == "none":
                continue
            at = int(to_value(*pairs[1]))
            model = int(pairs[2][1]) if self._models > 1 else 0
            layer, length = (int(to_value(*pair)) for pair in pairs[2 + (self._models > 1) :][:2])
            scales = (
                [self._scales.value(*pair) for pair in pairs[-2:]] if self._scales.searched else [1.0, 1.0]
            )
            edits.append(self._usual(Edit(kind, at, model, layer, length, *scales)))
        return edits

    def _usual(self, edit: Edit) -> Edit:
        """Return an edit with nothing in it that its kind does not use."""
        if edit.kind == "insert":
            return replace(edit, length=min(edit.length, self._layers - edit.layer))
        if edit.kind == "repeat":
            # What follows the repeated layers is the layer that always followed them.
            return replace(edit, model=0, layer=0, length=min(edit.length, edit.at), leave=1.0)
        length = min(edit.length, self._layers - 1 - edit.at)
        if edit.kind == "skip":
            return replace(edit, model=0, layer=0, length=length, leave=1.0)
        return replace(edit, layer=0, length=length)

    def _encoded(self, edits: Sequence[Edit]) -> Genotype:
        """Return the genotype of the edits that change the path, in order of their places."""
        kept = sorted(self._kept([self._usual(edit) for edit in edits]), key=lambda edit: edit.at)
        numbers = list(self.initial)
        for slot, edit in enumerate(kept):
            place = slot * self._width
            model = [edit.model] if self._models > 1 else []
            scales = [edit.enter, edit.leave] if self._scales.searched else []
            numbers[place] = float(self._kinds.index(edit.kind))
            values = [edit.at, *model, edit.layer, edit.length, *scales]
            for i, value in enumerate(values, start=place + 1):
                c = self.coordinates[i]
                numbers[i] = float(value) if c.kind == "choice" else to_unit(value, c.low, c.high, c.log)
        return tuple(numbers)

    def _kept(self, edits: Sequence[Edit]) -> list[Edit]:
        """Return the edits that may be applied and change something."""
        kept: list[Edit] = []
        path = self._path(kept)
        for edit in edits:
            changed = self._path([*kept, edit])
            if changed != path and self._allows(changed):
                kept.append(edit)
                path = changed
        return kept

    def _allows(self, path: Sequence[Step]) -> bool:
        occurrences = Counter((step.model, step.layer) for step in path)
        return self._low <= len(path) <= self._high and max(occurrences.values()) <= self._repeats

    def _path(self, edits: Sequence[Edit]) -> tuple[Step, ...]:
        source: dict[int, int] = dict.fromkeys(range(self._layers), 0)
        inserted: dict[int, list[Step]] = {}
        scales: dict[int, float] = {}
        for edit in edits:
            span = range(edit.at, edit.at + edit.length)
            if edit.kind in ("insert", "repeat"):
                first = edit.layer if edit.kind == "insert" else edit.at - edit.length
                new = [Step(edit.model, first + i) for i in range(edit.length)]
                inserted.setdefault(edit.at, []).extend([replace(new[0], scale=edit.enter), *new[1:]])
                scales[edit.at] = edit.leave
                continue
            if not span:
                continue
            for place in span:
                if edit.kind == "swap":
                    source[place] = edit.model
                else:
                    source.pop(place, None)
            if edit.kind == "swap":
                scales[span.start] = edit.enter
            scales[span.stop] = edit.leave if edit.kind == "swap" else edit.enter
        steps: list[Step] = []
        carried = 1.0
        for place in range(self._layers):
            steps += inserted.get(place, [])
            scale = scales.get(place, carried)
            carried = scale
            if place in source:
                steps.append(Step(source[place], place, scale))
                carried = 1.0
        return tidied(steps)

    def _random_edit(self, rng: np.random.Generator) -> Edit:
        """Return an edit: short spans mostly, inserted ones mostly at a similar depth, scales near 1."""
        kind = self._kinds[1 + int(rng.integers(len(self._kinds) - 1))]
        at = int(rng.integers(1, self._layers))
        layer = at + int(rng.integers(-2, 3)) if rng.random() < 0.7 else int(rng.integers(self._layers))
        others = kind == "swap"
        return Edit(
            kind,
            at,
            model=int(rng.integers(1 if others else 0, self._models)),
            layer=min(max(layer, 0), self._layers - 1),
            length=min(int(rng.geometric(0.5)), self._longest),
            enter=self._scale(rng),
            leave=self._scale(rng),
        )

    def _scale(self, rng: np.random.Generator) -> float:
        return self._scales.varied(1.0, rng) if self._scales.searched and rng.random() < 0.4 else 1.0

    def _altered(self, edit: Edit, rng: np.random.Generator) -> Edit:
        """Return the edit with one of its parts changed."""
        fields = ["at", "length", *(["layer", "model"] if edit.kind == "insert" else [])]
        if self._scales.searched:
            fields += ["enter", "leave", "enter", "leave"]
        field = fields[int(rng.integers(len(fields)))]
        if field == "enter":
            return replace(edit, enter=self._scales.varied(edit.enter, rng))
        if field == "leave":
            return replace(edit, leave=self._scales.varied(edit.leave, rng))
        if field == "model":
            return replace(edit, model=int(rng.integers(self._models)))
        step = int(rng.choice([-2, -1, 1, 2]))
        if field == "at":
            return replace(edit, at=min(max(edit.at + step, 1), self._layers - 1))
        if field == "layer":
            return replace(edit, layer=min(max(edit.layer + step, 0), self._layers - 1))
        return replace(edit, length=min(max(edit.length + step, 1), self._longest))
