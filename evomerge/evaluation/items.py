"""Items, their scores, and the blocks in which they are drawn, scored and cached."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Split = Literal["search", "validation", "test"]
SPLITS: tuple[Split, ...] = ("search", "validation", "test")


@dataclass(frozen=True)
class Item:
    """One question of a task.

    Attributes:
        id: sha256 over the task's config with its metric, the rendered requests and the references.
        task: name of the suite's task.
        split: which of the three disjoint sets it belongs to.
        index: position among the documents of the task's data split.
    """

    id: str
    task: str
    split: Split
    index: int


@dataclass(frozen=True)
class Block:
    """A fixed subset of one split, with a frozen batch packing.

    Attributes:
        split: where the items come from.
        index: number of the block within its split.
        items: item ids, in the order of scoring.
        packing: name and version of the packing, with its token budget: what else fixes the batches.
    """

    split: Split
    index: int
    items: tuple[str, ...]
    packing: str

    @property
    def hash(self) -> str:
        """sha256 over items and packing."""
        text = json.dumps([self.split, list(self.items), self.packing])
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
