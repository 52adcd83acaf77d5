"""The Ray executor: one actor per worker, on a local cluster of its own or on one that is running."""

from __future__ import annotations

import math
import os
import signal
import socket
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from evomerge.config import Workers
from evomerge.environment import THREAD_VARIABLES, prepare
from evomerge.errors import EvomergeError, InfrastructureError, UserError
from evomerge.evaluation.items import Item
from evomerge.recipe import Recipe
from evomerge.workers.board import Board
from evomerge.workers.executor import Event, times
from evomerge.workers.queue import take
from evomerge.workers.work import Work, WorkerLost
from evomerge.workers.worker import Worker, WorkerSpec

if TYPE_CHECKING:
    from evomerge.evaluation.suite import Preview

START_TIMEOUT = 600.0
"""Seconds that a worker may take to import, read the parents and build the suite."""

MAX_STARTS = 4
"""How many replacements may be lost while they start, one after another, before the run stops, resumable."""

LISTEN_SECONDS = 1.0

OBJECT_STORE_BYTES = 128 << 20
"""Requests and results are small; weights never travel through Ray."""


@dataclass
class _Slot:
    """One worker: its actor, what it does, what it holds, and how often running it has lost its engine."""

    name: str
    actor: Any
    task: Any = None
    work: Work | None = None
    held: Recipe | None = None
    starting: bool = field(default=True)
    losses: int = 0
    since: float = field(default_factory=time.monotonic)


class RayExecutor:
    """A pool of Ray actors behind one queue; a lost actor is replaced and its request reported."""

    def __init__(self, spec: WorkerSpec, workers: Workers) -> None:
        self._spec = spec
        self._config = workers
        self._slots: list[_Slot] = []
        self._queue: deque[Work] = deque()
        self._first: Recipe | None = None
        self._started = 0
        self._failed_starts = 0
        self._fingerprint = ""
        self._gpus = 0.0
        self._connected = False
        self._board = Board(uuid.uuid4().hex)
        self._listener: Callable[[str, int], None] = lambda work, items: None
        self._listened = 0.0

    @property
    def workers(self) -> int:
        """See `Executor.workers`."""
        return sum(not slot.starting for slot in self._slots)

    def start(self, recipe: Recipe, tell: Callable[[str], None] = lambda phase: None) -> str:
        """See `Executor.start`."""
        tell("starting Ray")
        prepare(offline=self._spec.offline)
        import ray

        self._first = recipe
        self._gpus = self._gpus_per_worker()
        self._connect()
        count = self._count()
        self._slots = [self._spawn() for _ in range(count)]
        prints: list[str] = []
        for slot in self._slots:
            tell(f"{len(prints)} of {count} workers are ready")
            try:
                prints.append(str(ray.get(slot.task, timeout=START_TIMEOUT)))
            except ray.exceptions.RayTaskError as error:
                raise _cause(error) from None
            except ray.exceptions.GetTimeoutError:
                raise InfrastructureError(self._no_room(slot.name)) from None
            except ray.exceptions.RayError as error:
                raise InfrastructureError(f"worker {slot.name} did not start: {_first_line(error)}") from None
            slot.task, slot.starting, slot.held = None, False, recipe
        if len(set(prints)) > 1:
            raise InfrastructureError(
                "the workers' engines differ, so their scores could not be compared; give them machines of one "
                f"kind with the same versions: {sorted(set(prints))}"
            )
        self._fingerprint = prints[0]
        return self._fingerprint

    def watch(self, listener: Callable[[str, int], None]) -> None:
        """See `Executor.watch`."""
        self._listener = listener

    def submit(self, work: Work) -> None:
        """See `Executor.submit`."""
        self._queue.append(work)

    def next_event(self, timeout: float) -> Event | None:
        """See `Executor.next_event`."""
        import ray

        self._assign()
        tasks = {slot.task: slot for slot in self._slots if slot.task is not None}
        if not tasks:
            time.sleep(min(timeout, 0.05))
            return None
        ready, _ = ray.wait(list(tasks), num_returns=1, timeout=timeout)
        if not ready:
            self._check_room()
            self._listen()
            return None
        slot = tasks[ready[0]]
        return self._collect(slot)

    def preview(self, recipe: Recipe, items: Sequence[Item]) -> list[Preview]:
        """See `Executor.preview`."""
        import ray

        slot = self._slots[0]
        slot.held = recipe
        try:
            return list(ray.get(slot.actor.preview.remote(recipe, list(items))))
        except ray.exceptions.RayTaskError as error:
            raise _cause(error) from None
        except ray.exceptions.RayError as error:
            raise InfrastructureError(f"worker {slot.name} was lost: {_first_line(error)}") from None

    def close(self) -> None:
        """See `Executor.close`."""
        import ray

        self._queue.clear()
        for slot in self._slots:
            ray.kill(slot.actor)
        if self._slots:
            self._board.clear()
        self._slots = []
        if self._connected:
            ray.shutdown()
            self._connected = False

    def _listen(self) -> None:
        """Pass on, once a second, how far the workers are."""
        if time.monotonic() - self._listened < LISTEN_SECONDS:
            return
        self._listened = time.monotonic()
        for slot in self._slots:
            if slot.work is not None:
                items = self._board.read(slot.work.id)
                if items:
                    self._listener(slot.work.id, items)

    def _connect(self) -> None:
        import ray

        if ray.is_initialized():
            return
        common = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}
        # Ray puts its own handler in the place of the one that makes SIGTERM stop a search like Ctrl-C.
        terminate = signal.getsignal(signal.SIGTERM)
        try:
            if self._config.address:
                _knock(self._config.address)
                ray.init(address=self._config.address, **common)
            else:
                count = self._config.count
                cpus = _cores() if count == "auto" else math.ceil(int(count) * self._config.cpus - 1e-9)
                ray.init(
                    address="local",
                    num_cpus=cpus,
                    include_dashboard=False,
                    object_store_memory=OBJECT_STORE_BYTES,
                    **common,
                )
        except (ConnectionError, OSError, RuntimeError, ValueError, TimeoutError) as error:
            if not self._config.address:
                raise InfrastructureError(f"Ray does not start: {_first_line(error)}") from None
            token = (
                ""
                if "RAY_AUTH_MODE" in os.environ
                else "; if that cluster uses tokens, set RAY_AUTH_MODE=token"
            )
            raise InfrastructureError(
                f"no Ray cluster can be reached at workers.address {self._config.address}: "
                f"{_first_line(error)}{token}"
            ) from None
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, terminate or signal.SIG_DFL)
        self._connected = True

    def _count(self) -> int:
        import ray

        resources = ray.cluster_resources()
        gpus = resources.get("GPU", 0)
        if self._config.count != "auto":
            count = int(self._config.count)
        else:
            count = times(self._config.cpus, resources.get("CPU", 1))
            if self._gpus:
                count = min(count, times(self._gpus, gpus))
            count = max(1, count)
        # A cluster may still grow.
        if not self._config.address and count * self._gpus > gpus + 1e-9:
            raise UserError(
                f"workers: {count} with {self._gpus:g} GPUs each, but Ray finds {gpus:g} on this machine; lower "
                "workers.count or workers.gpus, or write engine.device: cpu"
            )
        return count

    def _gpus_per_worker(self) -> float:
        if self._spec.engine.device == "cpu":
            return 0.0
        return 1.0 if self._config.gpus == "auto" else float(self._config.gpus)

    def _spawn(self) -> _Slot:
        import ray

        name = f"worker-{self._started}"
        self._started += 1
        threads = str(self._config.threads)
        actor = (
            ray.remote(Worker)
            .options(
                num_cpus=self._config.cpus,
                num_gpus=self._gpus,
                max_restarts=0,
                runtime_env={"env_vars": dict.fromkeys(THREAD_VARIABLES, threads)},
            )
            .remote(self._spec, name, self._board.tell)
        )
        return _Slot(name=name, actor=actor, task=actor.prepare.remote(self._first))

    def _no_room(self, name: str) -> str:
        import ray

        free = ray.available_resources()
        return (
            f"worker {name} did not start in {START_TIMEOUT:.0f} s; it needs {self._config.cpus:g} CPUs and "
            f"{self._gpus:g} GPUs, and the cluster has {free.get('CPU', 0):g} CPUs and {free.get('GPU', 0):g} GPUs "
            "free; lower workers.count, or free the cluster"
        )

    def _check_room(self) -> None:
        """Stop waiting for the replacement of the last worker, where it gets no place."""
        waiting = [slot for slot in self._slots if time.monotonic() - slot.since > START_TIMEOUT]
        if all(slot.starting for slot in self._slots) and len(waiting) == len(self._slots):
            raise InfrastructureError(self._no_room(waiting[0].name))

    def _assign(self) -> None:
        for slot in self._slots:
            if slot.task is None and self._queue:
                elsewhere = [other.held for other in self._slots if other is not slot and other.held]
                slot.work = take(self._queue, slot.held, elsewhere)
                slot.held = slot.work.recipes[-1]
                slot.task = slot.actor.run.remote(slot.work)

    def _collect(self, slot: _Slot) -> Event | None:
        """Take a finished task's answer; a lost worker is replaced by a fresh one."""
        import ray

        work, task, starting = slot.work, slot.task, slot.starting
        slot.work, slot.task, slot.starting = None, None, False
        try:
            answer = ray.get(task)
        except ray.exceptions.RayTaskError as error:
            raise _cause(error) from None
        except ray.exceptions.RayError as error:
            reason = _first_line(error)
            self._slots[self._slots.index(slot)] = self._spawn()
            if work is None:
                self._failed_starts += 1
                if self._failed_starts >= MAX_STARTS:
                    raise InfrastructureError(
                        f"replacements for a lost worker do not start, {MAX_STARTS} of them in a row: {reason}"
                    ) from None
                return None
            return WorkerLost(work=work.id, reason=reason, worker=slot.name)
        if starting:
            assert self._first is not None
            self._failed_starts = 0
            slot.held = self._first
            if answer != self._fingerprint:
                raise InfrastructureError("a replaced worker came up with another engine fingerprint")
            self._assign()
            return None
        if isinstance(answer, WorkerLost):
            slot.held = None
            slot.losses += 1
            if slot.losses > 1:
                # A new engine in the old process was lost as well.
                ray.kill(slot.actor)
                self._slots[self._slots.index(slot)] = self._spawn()
        else:
            slot.losses = 0
        return answer  # type: ignore[no-any-return]


def _knock(address: str) -> None:
    """Raise OSError at once if nobody listens at ``host:port``; Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit() and "://" not in address:
        socket.create_connection((host, int(port)), timeout=10).close()


def _cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cause(error: Any) -> Exception:
    """The exception that was raised in the worker; our own kinds keep their type and message."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, EvomergeError):
        kind = next((k for k in (UserError, InfrastructureError) if isinstance(cause, k)), type(cause))
        return kind(str(cause.args[0]) if cause.args else "")
    return InfrastructureError(f"a worker failed: {type(cause).__name__}: {cause}") if cause else error


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]
