"""The scheduler: completes tables of recipes × blocks, whatever happens to the workers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from evomerge.errors import InfrastructureError
from evomerge.evaluation.items import Block, ItemScore
from evomerge.recipe import Recipe
from evomerge.searching.store import Store
from evomerge.workers.executor import Executor
from evomerge.workers.work import Result, Work, WorkerLost

MAX_ATTEMPTS = 4
"""How often a request is tried before the run stops, resumable."""

POLL_SECONDS = 0.25


class Scheduler:
    """Asks the executor for what the store does not know yet, and records every answer as it comes.

    Args:
        store: the run's database.
        executor: started workers.
        fingerprint: of their engine; an answer of another one stops the run.
        on_event: called after each recorded result and at least every `POLL_SECONDS` while waiting.
        on_progress: called with (items answered, items in all) of a table before its first request, and before
            each `on_event` that brings a result.
    """

    def __init__(
        self,
        store: Store,
        executor: Executor,
        fingerprint: str,
        on_event: Callable[[Result | None], None] = lambda _: None,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self._store = store
        self._executor = executor
        self._fingerprint = fingerprint
        self._on_event = on_event
        self._on_progress = on_progress

    def complete(self, recipes: Sequence[Recipe], blocks: Sequence[Block]) -> None:
        """Return when every recipe has an outcome on every block.

        Raises:
            InfrastructureError: a request was lost `MAX_ATTEMPTS` times. The other requests are waited for and
                recorded first, unless one of them is lost too.
        """
        waiting: dict[str, Work] = {}
        unique = {recipe.hash: recipe for recipe in recipes}.values()
        for recipe in unique:
            known = self._store.results(recipe.hash)
            for block in blocks:
                if block.hash not in known:
                    work = Work(id=f"{recipe.hash[:16]}-{block.hash[:16]}", recipes=(recipe,), block=block)
                    waiting[work.id] = work
        total = len(unique) * sum(len(block.items) for block in blocks)
        done = total - sum(len(work.block.items) for work in waiting.values())
        self._on_progress(done, total)
        for work in waiting.values():
            self._executor.submit(work)
        attempts: dict[str, int] = {}
        given_up: WorkerLost | None = None
        while waiting:
            event = self._executor.next_event(POLL_SECONDS)
            if isinstance(event, Result) and event.work in waiting:
                work = waiting.pop(event.work)
                self._record(event, work)
                done += len(work.block.items)
                self._on_progress(done, total)
                self._on_event(event)
                continue
            if isinstance(event, WorkerLost):
                self._record_loss(event)
                if event.work in waiting:
                    attempts[event.work] = attempts.get(event.work, 0) + 1
                    if given_up is not None:
                        break
                    if attempts[event.work] < MAX_ATTEMPTS:
                        self._executor.submit(waiting[event.work])
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

    def _record(self, result: Result, work: Work) -> None:
        if result.fingerprint != self._fingerprint and any(not o.failure for o in result.outcomes):
            raise InfrastructureError(
                f"worker {result.worker} scored with another engine fingerprint; its scores cannot be compared"
            )
        with self._store.transaction():
            for outcome in result.outcomes:
                self._store.add_result(outcome, work.block.hash, result.worker)

    def _record_loss(self, lost: WorkerLost) -> None:
        with self._store.transaction():
            self._store.add_attempt(lost.work, lost.worker, lost.reason)
            self._store.event("worker_lost", worker=lost.worker, work=lost.work, reason=lost.reason)
