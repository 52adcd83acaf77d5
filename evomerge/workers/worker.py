"""One worker: parents, a live model, the suite and an engine, all held from one request to the next."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from evomerge.config import Engine, Splits, Suite
from evomerge.environment import prepare
from evomerge.errors import CandidateFailed, UserError
from evomerge.evaluation.items import SPLITS, Item, Split
from evomerge.recipe import Recipe, Source
from evomerge.workers.work import Outcome, Result, Work

if TYPE_CHECKING:
    from evomerge.checkpoints import Checkpoint
    from evomerge.evaluation.engine import HFEngine
    from evomerge.evaluation.suite import Preview


@dataclass(frozen=True)
class WorkerSpec:
    """Everything that a worker needs to set itself up, on any machine that sees the same files.

    Attributes:
        sources: parents by name, pinned to their content.
        tokenizer: name of the model whose tokenizer is used.
        suite, splits: what is scored.
        engine: how; `device`, `batch_tokens` and `max_length` already decided.
        splits_needed: the item sets to build.
        offline: forbid hub access.
        config_file: named in errors about the suite.
    """

    sources: Mapping[str, Source]
    tokenizer: str
    suite: Suite
    splits: Splits
    engine: Engine
    splits_needed: tuple[Split, ...] = SPLITS
    offline: bool = True
    config_file: str = ""


class Worker:
    """Materialises recipes and scores blocks, one request at a time."""

    def __init__(self, spec: WorkerSpec, name: str = "local") -> None:
        prepare(offline=spec.offline)
        import torch

        from evomerge.checkpoints import load_tokenizer, open_checkpoint
        from evomerge.evaluation.suite import Suite as BuiltSuite
        from evomerge.merging import Materializer

        if spec.engine.device == "cpu":
            torch.set_num_threads(1)
        self.name = name
        self._spec = spec
        self._checkpoints: dict[str, Checkpoint] = {
            name: open_checkpoint(source.source, revision=source.revision, name=name)
            for name, source in spec.sources.items()
        }
        for name, source in spec.sources.items():
            if self._checkpoints[name].sha256 != source.sha256:
                raise UserError(
                    f"{source.source}: this worker sees other weights of '{name}' than the driver; "
                    "let all machines see the same files"
                )
        self._tokenizer = load_tokenizer(self._checkpoints[spec.tokenizer].path)
        self._suite = BuiltSuite.build(
            spec.suite, spec.splits, self._tokenizer, splits_needed=spec.splits_needed, file=spec.config_file
        )
        self._materializer = Materializer(self._checkpoints, device=spec.engine.device)
        self._held = ""
        self._engine: HFEngine | None = None

    def prepare(self, recipe: Recipe) -> str:
        """Materialise a first recipe and return the engine's fingerprint."""
        return self._hold(recipe).fingerprint

    def process_id(self) -> int:
        """Return the id of the process that the worker lives in."""
        return os.getpid()

    def run(self, work: Work) -> Result:
        """Score each recipe of a request on its block.

        Raises:
            MemoryError: the host's or the device's memory is exhausted, whatever torch calls it.
        """
        try:
            outcomes = tuple(self._score(recipe, work) for recipe in work.recipes)
        except RuntimeError as error:
            if _is_out_of_memory(error):
                raise MemoryError(str(error).splitlines()[0]) from None
            raise
        fingerprint = self._engine.fingerprint if self._engine is not None else ""
        return Result(work=work.id, outcomes=outcomes, fingerprint=fingerprint, worker=self.name)

    def preview(self, recipe: Recipe, items: Sequence[Item]) -> list[Preview]:
        """Let a recipe answer single items, and show prompt, answer, extracted value and score."""
        engine = self._hold(recipe)
        return [self._suite.preview(engine, item) for item in items]

    def _score(self, recipe: Recipe, work: Work) -> Outcome:
        started = time.perf_counter()
        merged = started
        try:
            engine = self._hold(recipe)
            merged = time.perf_counter()
            scores = tuple(self._suite.score(engine, work.block))
            failure = None
        except CandidateFailed as reason:
            scores, failure = (), str(reason)
            merged = max(merged, started)
        return Outcome(
            recipe=recipe.hash,
            scores=scores,
            failure=failure,
            merge_seconds=merged - started,
            score_seconds=time.perf_counter() - merged,
        )

    def _hold(self, recipe: Recipe) -> HFEngine:
        """Make the live model be this recipe's, unless it is already."""
        from evomerge.evaluation.engine import HFEngine

        if self._engine is None or self._held != recipe.hash:
            self._held = ""
            model = self._materializer.materialize(recipe)
            if self._engine is None or self._engine.model is not model:
                self._engine = HFEngine(
                    model,
                    self._tokenizer,
                    batch_tokens=int(self._spec.engine.batch_tokens),
                    max_length=int(self._spec.engine.max_length or 0),
                    device=self._spec.engine.device,
                )
            self._held = recipe.hash
        return self._engine


def _is_out_of_memory(error: RuntimeError) -> bool:
    import torch

    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
