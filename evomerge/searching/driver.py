"""The driver: generations until the budget is spent, then selection. Starting and resuming are one path."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomerge.config import Budget
from evomerge.errors import EvomergeError, UserError
from evomerge.evaluation.score_cache import ScoreCache, scores_folder
from evomerge.layers_config import MERGED
from evomerge.merging.identity import Identities
from evomerge.recipe import Recipe
from evomerge.searching import selection
from evomerge.searching.agreement import record_fingerprint, record_setup
from evomerge.searching.budget import Allowance
from evomerge.searching.generations import Generations
from evomerge.searching.phases import Phase, plan_phases
from evomerge.searching.plan import selection_items
from evomerge.searching.preview import write_preview
from evomerge.searching.progress import Display, State
from evomerge.searching.reporter import Reporter
from evomerge.searching.results import write_results
from evomerge.searching.rundir import LOG, RECIPE, write_atomically
from evomerge.searching.scheduler import Scheduler
from evomerge.searching.store import Store
from evomerge.workers.executor import Executor

if TYPE_CHECKING:
    from evomerge.searching.setup import Setup
    from evomerge.spaces import SearchSpace

COEFFICIENTS_ROUND = -1
"""Number of the selection between two phases; those at the end of a run count from 0."""


class Driver:
    """Drives one run from wherever its database says it is.

    Args:
        folder: the run directory.
        store: its open database.
        setup: what the config amounts to; must agree with what the database recorded.
        executor: not started yet.
        budget: the ceilings that hold now (a resumed run may raise them).
        display: shows progress.
        yes: go on although a task's answers cannot be extracted in the preview.
    """

    def __init__(
        self,
        folder: Path,
        store: Store,
        setup: Setup,
        executor: Executor,
        *,
        budget: Budget,
        display: Display,
        yes: bool = False,
    ) -> None:
        self._folder = folder
        self._store = store
        self._setup = setup
        self._executor = executor
        self._space = setup.space
        self._yes = yes
        self._ended: int | None = store.meta("first_phase_generations")
        self._budget = budget
        self._phases = plan_phases(setup, budget, first=self._ended)
        counts = [phase.candidates for phase in self._phases]
        total = None if None in counts else sum(count for count in counts if count is not None)
        self._reporter = Reporter(folder, display, total=total, workers=lambda: executor.workers)

    def run(self) -> None:
        """Run to the end: generations, selection, results.

        Raises:
            UserError: the run's files no longer are what they were; the preview found a useless task.
            InfrastructureError: workers or disk failed for good; the run can be resumed.
            KeyboardInterrupt: as raised by the signal handler; the run can be resumed.
        """
        started = time.monotonic()
        earlier = float(self._store.meta("wall_seconds", 0.0))

        def spent() -> float:
            return earlier + time.monotonic() - started

        state: State = "failed"
        try:
            record_setup(self._store, self._setup, self._folder)
            self._reporter.show(state="starting")
            fingerprint = self._executor.start(
                self._setup.baselines["base"],
                lambda phase: self._reporter.show(phase=f"starting workers: {phase}"),
            )
            record_fingerprint(self._store, fingerprint, self._folder)
            reporter = self._reporter
            scheduler = Scheduler(
                self._store,
                self._executor,
                fingerprint,
                reporter.on_event,
                reporter.on_progress,
                cache=ScoreCache(
                    scores_folder(self._setup.config.cache.scores),
                    fingerprint,
                    reporter.say,
                    unshared=self._setup.suite.unshared,
                ),
                identity=Identities(self._setup.checkpoints).of,
            )
            self._preview()
            counts = self._store.counts()
            reporter.start_clock(
                item_evaluations=counts["item_evaluations"],
                cached=counts["cached_item_evaluations"],
                layers=self._store.layer_evaluations(),
            )
            generations = self._search(self._phases[0], scheduler, spent)
            if len(self._phases) == 2:
                generations = self._search_paths(generations, scheduler, spent)
            self._select(generations, scheduler)
            self._store.set_meta(wall_seconds=spent())
            self._finish(scheduler)
            state = "done"
        except KeyboardInterrupt:
            state = "stopped"
            raise
        finally:
            self._leave(state, spent())

    def _preview(self) -> None:
        if self._store.meta("previewed"):
            return
        self._reporter.show(phase="preview: what base and initial answer to a few items")
        useless = write_preview(self._folder, self._setup, self._executor, self._reporter)
        if useless and not self._yes:
            raise UserError(
                f"nothing can be extracted from the answers to {', '.join(useless)} (see "
                f"{self._folder / 'preview.md'}); mend the task and start a new run, or go on with "
                f"'evomerge resume {self._folder} --yes'"
            )
        self._store.set_meta(previewed=True)

    def _search(self, phase: Phase, scheduler: Scheduler, spent: Callable[[], float]) -> Generations:
        """Run the generations of the only or the first phase."""
        later = 0
        for other in self._phases[1:]:
            later += (other.generations or 0) * other.price
        generations = Generations(
            self._folder,
            self._store,
            self._setup,
            phase.space,
            phase.optimizer,
            scheduler,
            self._reporter,
            items_later=later,
        )
        generations.run(Allowance(phase.generations, phase.hours, spent, ended=self._ended))
        return generations

    def _search_paths(
        self, before: Generations, scheduler: Scheduler, spent: Callable[[], float]
    ) -> Generations:
        """Put the winner of the first phase into the pool, and run the generations of the second."""
        setup, first = self._setup, before.count
        assert setup.paths is not None, "there are two phases"
        phase = plan_phases(setup, self._budget, first=first)[1]
        self._reporter.enter(
            "selecting",
            "validation of the coefficients",
            items_after=None if phase.generations is None else phase.generations * phase.price,
        )
        name, merged = self._elect(
            COEFFICIENTS_ROUND,
            before,
            phase_space=setup.space,
            scheduler=scheduler,
            first_phase_generations=first,
        )
        self._reporter.say(
            f"The winner of the coefficients ({name}) joins the pool of layer paths as '{MERGED}'."
        )
        self._setup = replace(setup, baselines={**setup.baselines, MERGED: merged})
        self._space = setup.paths.with_merged(merged)
        generations = Generations(
            self._folder,
            self._store,
            self._setup,
            self._space,
            phase.optimizer,
            scheduler,
            self._reporter,
            first=first,
        )
        count = None if phase.generations is None else first + phase.generations
        generations.run(Allowance(count, phase.hours, spent, first=first))
        return generations

    def _elect(
        self,
        round_: int,
        generations: Generations,
        *,
        phase_space: SearchSpace,
        scheduler: Scheduler,
        **facts: Any,
    ) -> tuple[str, Recipe]:
        """Return name and recipe of a round's winner on the validation items.

        Args:
            round_: its number; what is recorded of it already holds.
            generations: where the short list comes from.
            phase_space: what they searched.
            scheduler: of the run.
            facts: recorded together with the frozen short list.
        """
        validation = self._setup.blocks["validation"]
        if not self._store.short_list(round_):
            entries = selection.short_list(
                baselines=self._setup.baselines,
                means=generations.means,
                decode=phase_space.decode,
                shrunk=generations.shrunk(),
                recipe_of=generations.recipe_of,
                first=generations.first,
            )
            with self._store.transaction():
                self._store.add_short_list(round_, entries)
                self._store.set_meta(**facts)
        short = [(name, self._store.recipe(digest)) for name, digest, _ in self._store.short_list(round_)]
        scheduler.complete([recipe for _, recipe in short], validation)
        if self._store.winner(round_) is None:
            name, recipe = selection.choose(
                short,
                self._setup.baselines,
                lambda recipe: scheduler.table(recipe, validation),
                self._setup.suite.weights,
            )
            self._store.set_winner(round_, recipe.hash, name)
        digest, name = self._store.winner(round_) or ("", "")
        return name, self._store.recipe(digest)

    def _select(self, generations: Generations, scheduler: Scheduler) -> None:
        """Validate the short list, name the winner, and open the test items for it and the baselines.

        A round is one selection; a run that is prolonged after its short list was frozen gets another round.
        """
        blocks, reporter = self._setup.blocks, self._reporter
        told = len(self._store.candidates())
        round_ = int(self._store.meta("round", 0))
        if told > int(self._store.meta("selected_from", told)):
            round_ += 1
        cost = selection_items(self._setup)
        reporter.enter("selecting", "validation", items_after=cost["search"] + cost["test"])
        _, winner = self._elect(
            round_,
            generations,
            phase_space=self._space,
            scheduler=scheduler,
            round=round_,
            selected_from=told,
        )
        reporter.enter("selecting", "winner on all search items", items_after=cost["test"])
        scheduler.complete([winner], blocks["search"])
        openings = self._store.open_test(round_, "final comparison")
        if openings > 1:
            reporter.say(f"The test items have now been opened {openings} times; results.json says so.")
        reporter.enter("selecting", "test", items_after=0)
        scheduler.complete([winner, *self._setup.baselines.values()], blocks["test"])

    def _finish(self, scheduler: Scheduler) -> None:
        write_results(self._folder, self._store, self._setup, scheduler)
        digest, name = self._store.winner() or ("", "")
        header = f"# status: winner ({name})\n"
        write_atomically(self._folder / RECIPE, header + self._store.recipe(digest).to_yaml())

    def _leave(self, state: State, spent: float) -> None:
        """Write what can be written of how the run stands, without hiding the error that ended it."""

        def record() -> None:
            self._store.set_meta(wall_seconds=spent)
            self._store.event(state)

        def log() -> None:
            lines = [json.dumps(event) for event in self._store.events()]
            write_atomically(self._folder / LOG, "\n".join(lines) + "\n")

        for write in (record, log, lambda: self._reporter.show(state=state, phase=state)):
            try:
                write()
            except EvomergeError:
                if state == "done":
                    raise
