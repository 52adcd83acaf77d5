"""What travels between the scheduler and the workers: plain, frozen data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from evomerge.engines import NO_LAYERS, LayerEvaluations
from evomerge.evaluation.items import Block, ItemScore, Part, PartOutcome
from evomerge.recipe import Recipe


@dataclass(frozen=True)
class Work:
    """A request: score some recipes on parts of one block.

    Attributes:
        id: unique in the run; a retry keeps it.
        recipes: pinned recipes, to be materialised one after another.
        block: the items.
        parts: numbers of the block's parts that are wanted, ascending; None: all.
        branches: after how many hops the layer paths of waiting requests leave this one's; see `take`.
        kind: what is wanted of them.
    """

    id: str
    recipes: tuple[Recipe, ...]
    block: Block
    parts: tuple[int, ...] | None = None
    branches: tuple[int, ...] = ()
    kind: Literal["score"] = "score"

    @property
    def wanted(self) -> tuple[Part, ...]:
        """The parts that are wanted."""
        if self.parts is None:
            return self.block.parts
        return tuple(self.block.parts[number] for number in self.parts)


@dataclass(frozen=True)
class Scored:
    """One recipe's outcomes on the wanted parts of a block.

    Attributes:
        recipe: the recipe's hash.
        parts: in order, up to the first one that failed.
        merge_seconds, score_seconds: where the time went.
        layers: what its layers took, and what they would have taken alone.
    """

    recipe: str
    parts: tuple[PartOutcome, ...]
    merge_seconds: float = 0.0
    score_seconds: float = 0.0
    layers: LayerEvaluations = NO_LAYERS


@dataclass(frozen=True)
class Outcome:
    """One recipe's outcome on one block, as it is recorded.

    Attributes:
        recipe: the recipe's hash.
        scores: one per item in the block's order; empty if the candidate failed.
        failure: why the candidate failed (non-finite weights, degenerate answers …), or None.
        cached: how many of the items were not asked, because an earlier run had asked them.
        merge_seconds, score_seconds: where the time went.
        layers: as in `Scored`.
    """

    recipe: str
    scores: tuple[ItemScore, ...]
    failure: str | None = None
    cached: int = 0
    merge_seconds: float = 0.0
    score_seconds: float = 0.0
    layers: LayerEvaluations = NO_LAYERS


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
    outcomes: tuple[Scored, ...]
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
