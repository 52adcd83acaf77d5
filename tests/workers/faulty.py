"""Workers whose engine is lost now and then, in whatever process they live."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import evomerge.engines
from evomerge.errors import EngineLost
from evomerge.recipe import Recipe
from evomerge.workers.worker import Worker

PLAN = "EVOMERGE_TEST_LOSSES"
"""Environment variable: a folder in which the file ``N`` names the error of the N-th call of any engine."""

ERRORS = {
    "crash": lambda: EngineLost("the engine process died"),
    "host memory": lambda: RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 8 bytes"),
    "device memory": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "python": lambda: MemoryError("no room"),
}


def plan_losses(folder: Path, losses: dict[int, str]) -> None:
    """Let the calls with these numbers, from 1, fail."""
    folder.mkdir(exist_ok=True)
    for number, kind in losses.items():
        (folder / f"loss-{number}").write_text(kind)


def next_call(folder: Path) -> int:
    """Return the number of this call among those of all processes."""
    number = 1
    while True:
        try:
            os.close(os.open(folder / f"call-{number}", os.O_CREAT | os.O_EXCL))
            return number
        except FileExistsError:
            number += 1


class FaultyHost:
    """A host whose engines fail as planned; remembers how many were opened."""

    opened = 0
    closed = 0

    def __init__(self, host: Any, folder: Path) -> None:
        FaultyHost.opened += 1
        self._host, self._folder = host, folder

    def hold(self, recipe: Recipe, branches: Sequence[int] = ()) -> Any:
        engine = self._host.hold(recipe, branches)
        # Out of its process's way only while this worker lives: each call looks for its plan.
        engine.loglikelihood = lambda requests: self._answer(type(engine), engine, requests)
        return engine

    @property
    def layer_evaluations(self) -> Any:
        return self._host.layer_evaluations

    def close(self) -> None:
        FaultyHost.closed += 1
        self._host.close()
        raise RuntimeError("a dead engine cannot be closed")

    def _answer(self, kind: Any, engine: Any, requests: Sequence[Any]) -> Any:
        plan = self._folder / f"loss-{next_call(self._folder)}"
        if plan.exists():
            raise ERRORS[plan.read_text()]()
        return kind.loglikelihood(engine, requests)


def open_faulty(*arguments: Any, **options: Any) -> FaultyHost:
    """Take the place of `evomerge.engines.open_host`."""
    from evomerge.engines.host import open_host

    return FaultyHost(open_host(*arguments, **options), Path(os.environ[PLAN]))


class FaultyWorker(Worker):
    """A worker whose hosts are faulty ones."""

    def prepare(self, recipe: Recipe) -> str:
        """See `Worker.prepare`."""
        evomerge.engines.open_host = open_faulty
        return super().prepare(recipe)
