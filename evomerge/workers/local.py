"""The in-process executor: one worker, here, without any further process."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from evomerge.evaluation.items import Item
from evomerge.recipe import Recipe
from evomerge.workers.executor import Event
from evomerge.workers.queue import take
from evomerge.workers.work import Work, WorkerLost
from evomerge.workers.worker import Worker, WorkerSpec

if TYPE_CHECKING:
    from evomerge.evaluation.suite import Preview


class LocalExecutor:
    """Does the work in this process, one request at a time, inside `next_event`."""

    workers = 1

    def __init__(self, spec: WorkerSpec) -> None:
        self._spec = spec
        self._worker: Worker | None = None
        self._queue: deque[Work] = deque()
        self._held: Recipe | None = None
        self._listener: Callable[[str, int], None] = lambda work, items: None

    def start(self, recipe: Recipe, tell: Callable[[str], None] = lambda phase: None) -> str:
        """See `Executor.start`."""
        tell("reading models, rendering prompts and trying the engine")
        self._worker = Worker(self._spec, tell=lambda work, items: self._listener(work, items))
        return self._worker.prepare(recipe)

    def watch(self, listener: Callable[[str, int], None]) -> None:
        """See `Executor.watch`."""
        self._listener = listener

    def submit(self, work: Work) -> None:
        """See `Executor.submit`."""
        self._queue.append(work)

    def next_event(self, timeout: float) -> Event | None:
        """See `Executor.next_event`; works on a request at once, whatever the timeout."""
        if not self._queue:
            return None
        assert self._worker is not None, "start() comes first"
        work = take(self._queue, self._held)
        answer = self._worker.run(work)
        self._held = None if isinstance(answer, WorkerLost) else work.recipes[-1]
        return answer

    def preview(self, recipe: Recipe, items: Sequence[Item]) -> list[Preview]:
        """See `Executor.preview`."""
        assert self._worker is not None, "start() comes first"
        self._held = None
        return self._worker.preview(recipe, items)

    def close(self) -> None:
        """See `Executor.close`."""
        self._queue.clear()
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.close()
