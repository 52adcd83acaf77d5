"""The scheduler: completes tables of recipes × blocks, whatever happens to the workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from evomerge.engines import NO_LAYERS, LayerEvaluations
from evomerge.errors import CandidateFailed, InfrastructureError
from evomerge.evaluation.blocks import put_together
from evomerge.evaluation.items import Block, ItemScore, PartOutcome
from evomerge.evaluation.score_cache import ScoreCache
from evomerge.recipe import Recipe
from evomerge.searching.store import Store
from evomerge.workers.executor import Executor
from evomerge.workers.work import Outcome, Result, Scored, Work, WorkerLost

MAX_ATTEMPTS = 4
"""How often a request is tried before the run stops, resumable."""

POLL_SECONDS = 0.25


@dataclass(frozen=True)
class Recorded:
    """What a new entry of the store brought.

    Attributes:
        items: that were scored.
        cached: how many of them an earlier run had scored.
        layers: what the layers took.
    """

    items: int
    cached: int = 0
    layers: LayerEvaluations = NO_LAYERS


class Scheduler:
    """Asks for what the store does not know yet, and records every answer as it comes.

    What an earlier run has scored is taken from the cache; the executor gets the rest.

    Args:
        store: the run's database.
        executor: started workers.
        fingerprint: of their engine; an answer of another one stops the run.
        on_event: called after each recorded result and at least every `POLL_SECONDS` while waiting.
        on_progress: called with (items answered, items in all, items answered in requests that are not done) of
            a table before its first request, and before each `on_event` that brings anything new.
        cache: what earlier runs have scored with this engine; none by default.
        identity: names a recipe in the cache; its hash by default.
    """

    def __init__(
        self,
        store: Store,
        executor: Executor,
        fingerprint: str,
        on_event: Callable[[Recorded | None], None] = lambda _: None,
        on_progress: Callable[[int, int, int], None] = lambda done, total, open_: None,
        *,
        cache: ScoreCache | None = None,
        identity: Callable[[Recipe], str] = lambda recipe: recipe.hash,
    ) -> None:
        self._store = store
        self._executor = executor
        self._fingerprint = fingerprint
        self._on_event = on_event
        self._on_progress = on_progress
        self._cache = cache or ScoreCache(None, fingerprint)
        self._identity = identity

    def complete(self, recipes: Sequence[Recipe], blocks: Sequence[Block]) -> None:
        """Return when every recipe has an outcome on every block.

        Raises:
            InfrastructureError: a request was lost `MAX_ATTEMPTS` times. The other requests are waited for and
                recorded first, unless one of them is lost too.
        """
        unique = {recipe.hash: recipe for recipe in recipes}.values()
        total = len(unique) * sum(len(block.items) for block in blocks)
        missing: list[tuple[Recipe, Block]] = []
        for recipe in unique:
            known = self._store.results(recipe.hash)
            missing += [(recipe, block) for block in blocks if block.hash not in known]
        done = total - sum(len(block.items) for _, block in missing)
        self._on_progress(done, total, 0)
        waiting: dict[str, _Request] = {}
        for request in self._requests(missing):
            if request.wanted:
                waiting[request.work.id] = request
                continue
            recorded = self._record(request, Scored(request.work.recipes[0].hash, ()), "cache")
            done += len(request.work.block.items)
            self._on_progress(done, total, 0)
            self._on_event(recorded)
        under_way: dict[str, int] = {}

        def hear(work: str, items: int) -> None:
            if work in waiting:
                under_way[work] = items
                answered = sum(under_way.values())
                self._on_progress(done + answered, total, answered)
                self._on_event(None)

        self._executor.watch(hear)
        for request in waiting.values():
            self._executor.submit(request.work)
        attempts: dict[str, int] = {}
        given_up: WorkerLost | None = None
        while waiting:
            event = self._executor.next_event(POLL_SECONDS)
            if isinstance(event, Result) and event.work in waiting:
                request = waiting.pop(event.work)
                under_way.pop(event.work, None)
                recorded = self._take(event, request)
                done += len(request.work.block.items)
                answered = sum(under_way.values())
                self._on_progress(done + answered, total, answered)
                self._on_event(recorded)
                continue
            if isinstance(event, WorkerLost):
                self._record_loss(event)
                under_way.pop(event.work, None)
                if event.work in waiting:
                    attempts[event.work] = attempts.get(event.work, 0) + 1
                    if given_up is not None:
                        break
                    if attempts[event.work] < MAX_ATTEMPTS:
                        self._executor.submit(waiting[event.work].work)
                    else:
                        given_up = event
                        del waiting[event.work]
            self._on_event(None)
        if given_up is not None:
            raise InfrastructureError(
                f"a request was lost {MAX_ATTEMPTS} times with its worker, the last time: {given_up.reason}"
            )

    def table(self, recipe: Recipe, blocks: Sequence[Block]) -> dict[str, dict[str, ItemScore]] | str:
        """Return task → item id → score over complete blocks, or the reason why the candidate failed."""
        failures = self._store.results(recipe.hash)
        table: dict[str, dict[str, ItemScore]] = {}
        for block in blocks:
            failure = failures[block.hash]
            if failure is not None:
                return failure
            for score in self._store.scores(recipe.hash, block.hash):
                table.setdefault(score.task, {})[score.item] = score
        return table

    def _requests(self, missing: Sequence[tuple[Recipe, Block]]) -> Iterator[_Request]:
        """Yield a request for each recipe and block, without those parts whose outcome is known."""
        by_recipe: dict[str, tuple[Recipe, list[Block]]] = {}
        for recipe, block in missing:
            by_recipe.setdefault(recipe.hash, (recipe, []))[1].append(block)
        for recipe, blocks in by_recipe.values():
            identity = self._identity(recipe)
            known = self._cache.known(identity, (part for block in blocks for part in block.parts))
            for block in blocks:
                yield _Request.of(recipe, block, identity, known)

    def _take(self, result: Result, request: _Request) -> Recorded:
        """Record the answer to a request, and keep it for other runs."""
        (scored,) = result.outcomes
        if result.fingerprint != self._fingerprint and any(part.failure is None for part in scored.parts):
            raise InfrastructureError(
                f"worker {result.worker} scored with another engine fingerprint; its scores cannot be compared"
            )
        recorded = self._record(request, scored, result.worker)
        self._cache.add(request.identity, zip(request.work.wanted, scored.parts, strict=False))
        return recorded

    def _record(self, request: _Request, scored: Scored, worker: str) -> Recorded:
        block, new = request.work.block, scored.parts
        scores: tuple[ItemScore, ...] = ()
        failure = None
        try:
            scores = put_together(block, request.outcomes(new), check_degenerate=block.split == "search")
        except CandidateFailed as reason:
            failure = str(reason)
        cached = 0 if failure else len(scores) - sum(len(part.scores) for part in new)
        outcome = Outcome(
            scored.recipe,
            scores,
            failure,
            cached,
            scored.merge_seconds,
            scored.score_seconds,
            scored.layers,
        )
        with self._store.transaction():
            self._store.add_result(outcome, block.hash, worker)
        return Recorded(len(scores), cached, scored.layers)

    def _record_loss(self, lost: WorkerLost) -> None:
        with self._store.transaction():
            self._store.add_attempt(lost.work, lost.worker, lost.reason)
            self._store.event("worker_lost", worker=lost.worker, work=lost.work, reason=lost.reason)


@dataclass(frozen=True)
class _Request:
    """A recipe on a block: what is asked, and what is known without asking.

    Attributes:
        work: asks for the parts in `wanted`.
        identity: the recipe's name in the cache.
        known: outcome of each part of the block that need not be asked, by its number.
        wanted: numbers of the parts that have to be.
    """

    work: Work
    identity: str
    known: Mapping[int, PartOutcome]
    wanted: tuple[int, ...]

    @classmethod
    def of(cls, recipe: Recipe, block: Block, identity: str, outcomes: Mapping[str, PartOutcome]) -> _Request:
        """Return the request that completes what is known: nothing behind a part that failed is of interest."""
        known: dict[int, PartOutcome] = {}
        wanted: list[int] = []
        for number, part in enumerate(block.parts):
            outcome = outcomes.get(part.hash)
            if outcome is None:
                wanted.append(number)
                continue
            known[number] = outcome
            if outcome.failure is not None:
                break
        work = Work(
            id=f"{recipe.hash[:16]}-{block.hash[:16]}",
            recipes=(recipe,),
            block=block,
            parts=tuple(wanted),
        )
        return cls(work, identity, known, tuple(wanted))

    def outcomes(self, new: Sequence[PartOutcome]) -> list[PartOutcome]:
        """Return the outcomes of the block's parts in order, up to the first one that failed."""
        by_number = {**self.known, **dict(zip(self.wanted, new, strict=False))}
        ordered = []
        for number in range(len(self.work.block.parts)):
            ordered.append(by_number[number])
            if ordered[-1].failure is not None:
                break
        return ordered
