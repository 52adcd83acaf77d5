"""What travels between the scheduler and the workers: plain, frozen data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from evomerge.evaluation.items import Block, ItemScore
from evomerge.recipe import Recipe


@dataclass(frozen=True)
class Work:
    """A request: score some recipes on one block.

    Attributes:
        id: unique in the run; a retry keeps it.
        recipes: pinned recipes, to be materialised one after another.
        block: the items.
        kind: what is wanted of the block.
    """

    id: str
    recipes: tuple[Recipe, ...]
    block: Block
    kind: Literal["score"] = "score"


@dataclass(frozen=True)
class Outcome:
    """One recipe's outcome on one block.

    Attributes:
        recipe: the recipe's hash.
        scores: one per item in the block's order; empty if the candidate failed.
        failure: why the candidate failed (non-finite weights, degenerate answers …), or None.
        merge_seconds, score_seconds: where the time went.
    """

    recipe: str
    scores: tuple[ItemScore, ...]
    failure: str | None = None
    merge_seconds: float = 0.0
    score_seconds: float = 0.0


@dataclass(frozen=True)
class Result:
    """The answer to one `Work`.

    Attributes:
        work: id of the request.
        outcomes: one for each of the request's recipes, in order.
        fingerprint: of the engine that scored; scores of different fingerprints are never compared.
        worker: name of the worker, for the log.
    """

    work: str
    outcomes: tuple[Outcome, ...]
    fingerprint: str
    worker: str


@dataclass(frozen=True)
class WorkerLost:
    """A worker died or ran out of memory while it held a request. Never becomes fitness.

    Attributes:
        work: id of the request it held.
        reason: one sentence.
        worker: name of the worker.
    """

    work: str
    reason: str
    worker: str
