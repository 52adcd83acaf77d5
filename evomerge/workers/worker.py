"""One worker: parents, a live model, the suite and an engine, all held from one request to the next."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from evomerge.config import Engine as EngineConfig
from evomerge.engines import NO_LAYERS, LayerEvaluations
from evomerge.environment import prepare
from evomerge.errors import CandidateFailed, InfrastructureError, UserError
from evomerge.evaluation.items import SPLITS, Item, Part, PartOutcome, Split
from evomerge.losses import free_memory, loss
from evomerge.recipe import Recipe, Source
from evomerge.suite_config import Splits, Suite
from evomerge.workers.work import Result, Scored, Work, WorkerLost

if TYPE_CHECKING:
    from evomerge.checkpoints import Checkpoint
    from evomerge.engines import Host
    from evomerge.evaluation.requests import Engine
    from evomerge.evaluation.suite import Preview


TELL_SECONDS = 0.5


@dataclass(frozen=True)
class WorkerSpec:
    """Everything that a worker needs to set itself up, on any machine that sees the same files.

    Attributes:
        sources: parents by name, pinned to their content.
        suite, splits: what is scored.
        engine: how; `device`, `batch_tokens` and `max_length` already decided.
        splits_needed: the item sets to build.
        threads: of one operation on the CPU, and tensors that are merged at the same time.
        offline: forbid hub access.
        config_file: named in errors about the suite.
    """

    sources: Mapping[str, Source]
    suite: Suite
    splits: Splits
    engine: EngineConfig
    splits_needed: tuple[Split, ...] = SPLITS
    threads: int = 1
    offline: bool = True
    config_file: str = ""


class Worker:
    """Materialises recipes and scores blocks, one request at a time.

    Construction costs nothing; `prepare` comes first and sets everything up.

    Args:
        spec: what it needs.
        name: for the log.
        tell: called with a request's id and how many of its items are answered, at most every `TELL_SECONDS`.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        name: str = "local",
        tell: Callable[[str, int], None] = lambda work, items: None,
    ) -> None:
        self.name = name
        self._spec = spec
        self._tell = tell
        self._bench: _Bench | None = None

    def prepare(self, recipe: Recipe) -> str:
        """Open the parents, build the suite, materialise a first recipe; return the engine's fingerprint.

        The tokenizer of the first recipe's output serves for all.

        Raises:
            UserError: the files are not what the driver saw, or the first recipe cannot be scored at all.
            InfrastructureError: the engine does not start, or not in the memory there is.
        """
        try:
            self._bench = _Bench(self._spec, recipe)
            return self._bench.hold(recipe).fingerprint
        except CandidateFailed as reason:
            raise UserError(
                f"{next(iter(self._spec.sources.values())).source}: cannot be scored: {reason}"
            ) from None
        except Exception as error:
            lost = loss(error)
            if lost is None:
                raise
            raise InfrastructureError(f"worker {self.name} cannot start its engine: {lost}") from None

    def process_id(self) -> int:
        """Return the id of the process that the worker lives in."""
        return os.getpid()

    def run(self, work: Work) -> Result | WorkerLost:
        """Score each recipe of a request on the parts that it wants.

        Where the engine is lost on the way, it is let go with all that it held, and the next request gets a
        new one.
        """
        bench = self._ready()
        try:
            told = _Told(work.id, self._tell)
            outcomes = tuple(_score(bench, recipe, work, told) for recipe in work.recipes)
            return Result(work=work.id, outcomes=outcomes, fingerprint=bench.fingerprint, worker=self.name)
        except Exception as error:
            lost = loss(error)
            if lost is None:
                raise
        # Out here, where the error no longer holds on to what filled the memory.
        bench.drop_engine()
        return WorkerLost(work=work.id, reason=lost, worker=self.name)

    def preview(self, recipe: Recipe, items: Sequence[Item]) -> list[Preview]:
        """Let a recipe answer single items, and show prompt, answer, extracted value and score.

        Raises:
            InfrastructureError: the engine was lost, and a new one too.
        """
        bench = self._ready()
        for _ in range(2):
            try:
                engine = bench.hold(recipe)
                return [bench.suite.preview(engine, item) for item in items]
            except Exception as error:
                lost = loss(error)
                if lost is None:
                    raise
            bench.drop_engine()
        raise InfrastructureError(f"worker {self.name} lost its engine twice, the last time: {lost}")

    def close(self) -> None:
        """Let the engine and its memory go: the process may live on. May be called twice."""
        bench, self._bench = self._bench, None
        if bench is not None:
            bench.drop_engine()

    def _ready(self) -> _Bench:
        if self._bench is None:
            raise RuntimeError("a worker must be prepared before it is asked for anything")
        return self._bench


class _Bench:
    """What a prepared worker holds: the suite, and a host with parents, one live model and its engine."""

    def __init__(self, spec: WorkerSpec, recipe: Recipe) -> None:
        prepare(offline=spec.offline)
        import torch

        from evomerge.engines import open_host
        from evomerge.evaluation.suite import Suite as BuiltSuite
        from evomerge.merging import output_tokenizer

        if spec.engine.device == "cpu":
            torch.set_num_threads(spec.threads)
        checkpoints = _open(spec.sources)
        tokenizer = output_tokenizer(recipe, checkpoints)
        self._open: Callable[[], Host] = lambda: open_host(
            spec.engine, checkpoints, tokenizer, threads=spec.threads
        )
        self._host: Host | None = None
        self.fingerprint = ""
        self.suite = BuiltSuite.build(
            spec.suite, spec.splits, tokenizer, splits_needed=spec.splits_needed, file=spec.config_file
        )

    def hold(self, recipe: Recipe, branches: Sequence[int] = ()) -> Engine:
        """Return the engine with this recipe's weights; a new one after `drop_engine`."""
        if self._host is None:
            self._host = self._open()
        engine = self._host.hold(recipe, branches)
        self.fingerprint = engine.fingerprint
        return engine

    @property
    def layer_evaluations(self) -> LayerEvaluations:
        """Those of the host so far."""
        return NO_LAYERS if self._host is None else self._host.layer_evaluations

    def drop_engine(self) -> None:
        """Let engine, live model and all that was computed for them go."""
        host, self._host = self._host, None
        if host is not None:
            # What has crashed may fail to close, too.
            with contextlib.suppress(Exception):
                host.close()
        del host
        free_memory()


def _open(sources: Mapping[str, Source]) -> dict[str, Checkpoint]:
    """Open the parents and check that they are the ones that the driver saw."""
    from evomerge.merging import open_sources

    opened = open_sources(sources, {})
    for name, source in sources.items():
        if opened[name].sha256 != source.sha256:
            raise UserError(
                f"{source.adapter or source.source}: this worker sees other weights of '{name}' than the driver; "
                "let all machines see the same files"
            )
    return opened


class _Told:
    """Tells now and then how many items of a request are answered."""

    def __init__(self, work: str, tell: Callable[[str, int], None]) -> None:
        self._work, self._tell = work, tell
        self._done = 0
        self._last = time.monotonic()

    def part(self, items: int) -> None:
        """Note about how many items of the present part are answered."""
        now = time.monotonic()
        if now - self._last >= TELL_SECONDS:
            self._last = now
            # Progress is not worth failing for.
            with contextlib.suppress(Exception):
                self._tell(self._work, self._done + items)

    def finish(self, part: Part) -> None:
        """Note that a part is done."""
        self._done += len(part.items)
        self.part(0)


def _score(bench: _Bench, recipe: Recipe, work: Work, told: _Told) -> Scored:
    """Score one of a request's recipes on the parts that it wants, up to the first on which it fails."""
    before = bench.layer_evaluations
    started = merged = time.perf_counter()
    outcomes: list[PartOutcome] = []
    try:
        engine = bench.hold(recipe, work.branches)
        merged = time.perf_counter()
        before = bench.layer_evaluations
        for part in work.wanted:
            outcomes.append(bench.suite.score_part(engine, part, told.part))
            told.finish(part)
            if outcomes[-1].failure is not None:
                break
    except CandidateFailed as reason:
        outcomes.append(PartOutcome(failure=str(reason)))
    after = bench.layer_evaluations
    return Scored(
        recipe=recipe.hash,
        parts=tuple(outcomes),
        merge_seconds=merged - started,
        score_seconds=time.perf_counter() - merged,
        layers=LayerEvaluations(after.computed - before.computed, after.saved - before.saved),
    )
