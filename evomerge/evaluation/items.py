"""Items, their scores, and the blocks in which they are drawn, scored and cached."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

Split = Literal["search", "validation", "test", "screen"]
"""A set of items. Those of ``screen`` are search items asked once more (see `evomerge.evaluation.screen`)."""

RAW, MAPPED = "raw", "mapped to [0, 1]"
"""What a suite's scores are in: the metrics' own units, or as fitness has them, larger being better."""

SPLITS: tuple[Split, ...] = ("search", "validation", "test")
"""The disjoint sets into which the documents of a task fall."""


@dataclass(frozen=True)
class Item:
    """One question of a task.

    Attributes:
        id: sha256 over the task's config with its metric, the rendered requests and the references.
        task: name of the suite's task.
        split: which set it belongs to.
        index: position among the documents of the task's data split.
    """

    id: str
    task: str
    split: Split
    index: int


@dataclass(frozen=True)
class Part:
    """A task's share of a block: the unit of asking an engine, and of remembering what it scored.

    A part's batches hold nothing else, so that what its items score depends on recipe, part and engine alone.

    Attributes:
        task: name of the suite's task.
        items: item ids, in the order of scoring.
        packing: name and version of the packing, with its token budget: what else fixes the batches.
    """

    task: str
    items: tuple[str, ...]
    packing: str

    @cached_property
    def hash(self) -> str:
        """sha256 over items and packing; the task's name does not matter, what it asks is in the items' ids."""
        return hashlib.sha256(json.dumps([self.items, self.packing]).encode()).hexdigest()


@dataclass(frozen=True)
class Block:
    """A fixed subset of one split, in parts of one task each.

    Attributes:
        split: where the items come from.
        index: number of the block within its split.
        parts: at most one of each task, in the suite's order.
    """

    split: Split
    index: int
    parts: tuple[Part, ...]

    @property
    def items(self) -> tuple[str, ...]:
        """Ids of all its items, in the order of scoring."""
        return tuple(item for part in self.parts for item in part.items)

    @cached_property
    def hash(self) -> str:
        """sha256 over split and parts."""
        text = json.dumps([self.split, [part.hash for part in self.parts]])
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class ItemScore:
    """One item's score by one candidate.

    Attributes:
        item: the item's id.
        task: name of the suite's task.
        raw: the metric's value in its own units.
        value: the same mapped to [0, 1], larger is better.
        truncated: whether the answer was cut at its token limit; None where nothing is generated.
    """

    item: str
    task: str
    raw: float
    value: float
    truncated: bool | None = None


def truncated_share(scores: Iterable[ItemScore]) -> float | None:
    """Return the share of the generated answers that were cut at their token limit; None if none were generated."""
    known = [score.truncated for score in scores if score.truncated is not None]
    return sum(known) / len(known) if known else None


@dataclass(frozen=True)
class PartOutcome:
    """What a part's items earned a recipe.

    Attributes:
        scores: one per item, in the part's order; empty if the recipe failed.
        constant: the answer where all items got the same, ``""`` where answers depend on the item, None where
            that cannot be judged (see `guards`).
        failure: why the recipe cannot be scored (non-finite weights or logits), or None.
    """

    scores: tuple[ItemScore, ...] = ()
    constant: str | None = None
    failure: str | None = None
