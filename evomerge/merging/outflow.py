"""Merged tensors one after another, whole, for a model that loads its weights itself."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Mapping

import torch

from evomerge.checkpoints import Checkpoint
from evomerge.merging.execute import CHUNK, execute
from evomerge.merging.plan import MergePlan, plan_merge
from evomerge.methods import TensorCache
from evomerge.recipe import Recipe
from evomerge.statistics.files import Source
from evomerge.statistics.needed import provide

AHEAD = 2
"""Finished tensors that wait to be taken."""


class Outflow:
    """Plans recipes and gives out their tensors, in the order of the plan.

    What does not depend on the candidate (reductions over the parents) is computed once.

    Args:
        checkpoints: the parents, by the names that recipes use.
        chunk, threads: as for `evomerge.merging.execute.execute`.
    """

    def __init__(
        self, checkpoints: Mapping[str, Checkpoint], *, chunk: int = CHUNK, threads: int = 1
    ) -> None:
        self._checkpoints = checkpoints
        self._chunk = chunk
        self._threads = threads
        self._cache = TensorCache()
        self._statistics: dict[str, Source] = {}

    def plan(self, recipe: Recipe) -> MergePlan:
        """Plan a recipe, with the statistics that it needs at hand.

        Raises:
            UserError: the recipe does not fit the parents.
        """
        plan = plan_merge(recipe, self._checkpoints)
        if any(key not in self._statistics for job in plan.jobs for key in job.statistics):
            self._statistics |= provide(recipe, self._checkpoints)
        return plan

    def tensors(self, plan: MergePlan) -> Iterator[tuple[str, torch.Tensor]]:
        """Merge the plan's tensors in a thread of their own, and yield each with its name on disk.

        Each tensor is new memory on the CPU and belongs to the caller; at most `AHEAD` + `threads` exist that
        have not been taken. The merge stops where the iterator is closed.

        Raises:
            CandidateFailed: a merged weight is not finite.
        """
        shapes = {job.name: job.shape for job in plan.jobs}
        outbox = _Outbox()

        def produce() -> None:
            try:
                execute(
                    plan,
                    self._checkpoints,
                    outbox,
                    cache=self._cache,
                    chunk=self._chunk,
                    threads=self._threads,
                    statistics=self._statistics,
                )
                outbox.put(None)
            except _NobodyWaits:
                pass
            except BaseException as error:
                outbox.put(error)

        producer = threading.Thread(target=produce, name="evomerge-outflow", daemon=True)
        producer.start()
        try:
            while (entry := outbox.get()) is not None:
                if isinstance(entry, BaseException):
                    raise entry
                name, flat = entry
                del entry
                yield name, flat.view(shapes[name])
                del flat
        finally:
            outbox.close()
            producer.join()


class _NobodyWaits(Exception):
    """The taker has gone."""


class _Outbox:
    """The sink of an outflow: finished tensors, in a queue with an end."""

    def __init__(self) -> None:
        self._queue: queue.Queue[tuple[str, torch.Tensor] | BaseException | None] = queue.Queue(AHEAD)
        self._closed = threading.Event()

    def pieces(
        self, name: str, numel: int, dtype: torch.dtype, chunk: int
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """See `evomerge.merging.sinks.Sink`."""
        tensor = torch.empty(numel, dtype=dtype)
        for start in range(0, numel, chunk):
            yield start, tensor[start : start + chunk]
        self.put((name, tensor))

    def put(self, entry: tuple[str, torch.Tensor] | BaseException | None) -> None:
        """Wait for a free place; raise `_NobodyWaits` if there will be none (an error is dropped instead)."""
        while not self._closed.is_set():
            try:
                self._queue.put(entry, timeout=0.1)
                return
            except queue.Full:
                continue
        if not isinstance(entry, BaseException):
            raise _NobodyWaits

    def get(self) -> tuple[str, torch.Tensor] | BaseException | None:
        """Wait for the next entry."""
        return self._queue.get()

    def close(self) -> None:
        """Let whoever puts something in go."""
        self._closed.set()
