"""Starting, resuming and reading runs: the Python face of a search."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomerge.config import Budget, Config, TwoSpaces, load_config
from evomerge.environment import prepare
from evomerge.errors import InfrastructureError, Stopped, UserError
from evomerge.recipe import Recipe, load_recipe
from evomerge.schema import read_text, validate
from evomerge.searching.progress import Closing, Display, Silent, Status
from evomerge.searching.rundir import (
    CONFIG,
    DATABASE,
    RECIPE,
    RESULTS,
    create_run,
    load_resolved,
    open_run,
    read_status,
    refuse_taken,
)
from evomerge.searching.store import CandidateRow, Store
from evomerge.signals import stopped_by_signals

if TYPE_CHECKING:
    import pandas

    from evomerge.searching.setup import Setup
    from evomerge.workers.executor import Executor


class Run:
    """A run directory, for reading.

    Args:
        path: the directory.

    Raises:
        UserError: it is not a run.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        read_status(self.path)

    @property
    def status(self) -> dict[str, Any]:
        """The status as last written by the driver; ``state`` is ``interrupted`` if the driver died."""
        return read_status(self.path)

    @property
    def config(self) -> Config:
        """The normalised config."""
        return load_resolved(self.path)

    @property
    def recipe(self) -> Recipe:
        """The winner's recipe; the incumbent's while the search has not ended."""
        if not (self.path / RECIPE).exists():
            raise UserError(f"{self.path}: has no recipe yet: no generation is complete")
        return load_recipe(self.path / RECIPE)

    @property
    def results(self) -> dict[str, Any]:
        """What results.json holds."""
        path = self.path / RESULTS
        if not path.exists():
            raise UserError(f"{self.path}: has no results yet; finish it with 'evomerge resume {self.path}'")
        return dict(json.loads(path.read_text(encoding="utf-8")))

    def candidate(self, number: int) -> Recipe:
        """Return the recipe of one candidate by its number."""
        with self._store() as store:
            rows = {row.id: row for row in store.candidates()}
            if not rows:
                raise UserError(f"{self.path}: has no candidates yet")
            if number not in rows:
                raise UserError(f"{self.path}: there is no candidate {number}; they are 0 to {len(rows) - 1}")
            return store.recipe(rows[number].recipe)

    def candidate_rows(self) -> list[CandidateRow]:
        """Return all candidates, in order."""
        with self._store() as store:
            return store.candidates()

    def candidates(self) -> pandas.DataFrame:
        """Return one row per candidate: generation, genotype, recipe hash, status, fitness, rank."""
        return self._frame(
            "SELECT id, generation, position, status, fitness, rank, reason, recipe, genotype "
            "FROM candidates ORDER BY id"
        )

    def items(self) -> pandas.DataFrame:
        """Return one row per item: id, task, split, position."""
        return self._frame("SELECT id, task, split, position FROM items ORDER BY split, task, position")

    def scores(self) -> pandas.DataFrame:
        """Return one row per scored item of a recipe: recipe, block, item, task, raw, value, truncated."""
        return self._frame(
            "SELECT recipe, block, item, task, raw, value, truncated FROM scores ORDER BY recipe, block, item"
        )

    def export(self, out: Path | str, *, candidate: int | None = None, **options: Any) -> Path:
        """Write the winner (or one candidate) as a Hugging Face folder; options as for `evomerge.merge`."""
        from evomerge.merging import merge

        recipe = self.recipe if candidate is None else self.candidate(candidate)
        return merge(recipe, out, **options)

    @contextmanager
    def _store(self) -> Iterator[Store]:
        store = open_run(self.path)
        try:
            yield store
        finally:
            store.close()

    def _frame(self, sql: str) -> pandas.DataFrame:
        try:
            import pandas
        except ImportError:
            raise UserError("data frames need pandas: pip install 'evomerge[analysis]'") from None
        with self._store() as store:
            columns, rows = store.query(sql)
        return pandas.DataFrame(rows, columns=columns)


def search(
    config: Config | Path | str,
    *,
    run: Path | str | None = None,
    overrides: Sequence[str] = (),
    continue_: bool = False,
    yes: bool = False,
    display: Display | None = None,
) -> Run:
    """Launch a search and drive it to its end.

    Args:
        config: a config file, or a validated `Config`.
        run: the run directory; default ``runs/NAME``.
        overrides: ``a.b=value`` strings, as for ``--set``.
        continue_: resume the run if it exists already.
        yes: go on although the preview can extract nothing from a task's answers.
        display: shows progress (default: nothing).

    Raises:
        UserError: the config, its models or tasks, or an existing run directory.
        InfrastructureError: workers or disk failed; the run can be resumed.
        Stopped: by Ctrl-C or SIGTERM; the run can be resumed.
        KeyboardInterrupt: the same, before the run directory was made.
    """
    display = display or Silent()
    if isinstance(config, Config):
        parsed, original, file = config, config.to_yaml(), "config"
    else:
        parsed, file = load_config(config, overrides), str(config)
        original = read_text(Path(config), "config")
    folder = Path(run) if run is not None else Path("runs") / parsed.name
    if continue_ and (folder / DATABASE).exists():
        _check_same_config(folder, parsed, file)
        return resume(folder, yes=yes, display=display)
    refuse_taken(folder)
    with stopped_by_signals(), Closing(display):
        setup = _set_up(parsed, file, display)
        store = create_run(folder, setup.config, original, given=parsed)
        _drive(folder, store, setup, setup.config.budget, display, yes=yes)
    return Run(folder)


def resume(
    run: Path | str,
    *,
    budget: Mapping[str, Any] | None = None,
    yes: bool = False,
    display: Display | None = None,
) -> Run:
    """Continue a run where it stopped.

    Args:
        run: the run directory.
        budget: new ceilings, e.g. ``{"candidates": 600}`` (totals, not additions); kept for later resumes.
        yes, display: as for `search`.

    Raises:
        UserError: not a run, another process drives it, or its models, tasks or versions have changed.
    """
    display = display or Silent()
    folder = Path(run)
    with stopped_by_signals(), Closing(display):
        store = open_run(folder)
        try:
            config = load_resolved(folder)
            recorded = store.meta("budget")
            current = config.budget if recorded is None else validate(Budget, recorded, folder)
            if budget:
                merged = {**current.model_dump(exclude_none=True), **budget}
                current = validate(Budget, merged, "--budget")
                if current.layers is not None and not isinstance(config.space, TwoSpaces):
                    raise UserError("--budget: layers: needs space.type coefficients+layers; leave it out")
                _check_time_left(store, current, budget)
            setup = _set_up(
                config,
                folder / CONFIG,
                display,
                budget=current,
                measured=_swap(store),
                first=store.meta("first_phase_generations"),
            )
            if budget:
                store.set_meta(budget=current.model_dump(exclude_none=True))
        except BaseException:
            store.close()
            raise
        _drive(folder, store, setup, current, display, yes=yes)
    return Run(folder)


def _check_time_left(store: Store, budget: Budget, asked: Mapping[str, Any]) -> None:
    """Refuse higher ceilings that change nothing because the run's time is over."""
    hours = float(store.meta("wall_seconds", 0.0)) / 3600
    if budget.hours is not None and "hours" not in asked and hours >= budget.hours:
        raise UserError(
            f"--budget: the run has taken {hours:.3g} hours of {budget.hours:g}, so it would not go on; give more of "
            "them too, e.g. --budget hours=" + f"{math.ceil(2 * hours)}"
        )


def executor_for(setup: Setup, config_file: Path | str) -> Executor:
    """Return the executor that a config asks for."""
    spec = setup.worker_spec(config_file)
    if setup.config.workers.type == "local":
        from evomerge.workers.local import LocalExecutor

        return LocalExecutor(spec)
    from evomerge.searching.memory import workers_that_fit
    from evomerge.workers.ray_executor import RayExecutor

    workers = setup.config.workers
    if workers.count == "auto" and workers.address is None:
        workers = workers.model_copy(update={"count": workers_that_fit(setup)})
    return RayExecutor(spec, workers)


def _swap(store: Store) -> tuple[float, float] | None:
    """Return the mean seconds of a recipe's swaps so far, and their share of the workers' time."""
    merging, scoring, recipes = store.seconds()
    return (merging / recipes, merging / (merging + scoring)) if recipes else None


def _set_up(
    config: Config,
    file: Path | str,
    display: Display,
    *,
    budget: Budget | None = None,
    measured: tuple[float, float] | None = None,
    first: int | None = None,
) -> Setup:
    display.show(Status(state="starting", phase="starting"))
    prepare(offline=not config.uses_hub)
    from evomerge.methods.registry import get_method
    from evomerge.searching.plan import plan_search
    from evomerge.searching.setup import provide_statistics, set_up

    setup = set_up(config, file=file, tell=lambda phase: display.show(Status(state="starting", phase=phase)))
    display.say(str(plan_search(setup, budget or config.budget, measured=measured, first=first)))
    if config.coefficients is not None and get_method(config.coefficients.method).needs:
        provide_statistics(setup, display.say)
    return setup


def _drive(folder: Path, store: Store, setup: Setup, budget: Budget, display: Display, *, yes: bool) -> None:
    from evomerge.searching.driver import Driver

    executor = executor_for(setup, folder / CONFIG)
    try:
        Driver(folder, store, setup, executor, budget=budget, display=display, yes=yes).run()
    except KeyboardInterrupt:
        raise Stopped(
            f"Stopped. Everything so far is saved; go on with 'evomerge resume {folder}'."
        ) from None
    except InfrastructureError as error:
        raise InfrastructureError(
            f"{error}; what was scored is saved: put this right, then 'evomerge resume {folder}'"
        ) from None
    finally:
        try:
            executor.close()
        finally:
            store.close()


def _check_same_config(folder: Path, config: Config, file: str) -> None:
    """Refuse to continue a run with a config, overrides included, that is not the one it was started from.

    Where scores are kept is nothing that a run depends on.
    """
    store = open_run(folder)
    try:
        recorded = store.meta("given", {})
    finally:
        store.close()
    given = config.model_dump(mode="json")
    changed = [key for key in given if given[key] != recorded.get(key) and key != "cache"]
    if changed:
        raise UserError(
            f"{folder}: was started from another config than {file} and --set say (other: {', '.join(changed)}); "
            f"name another folder with --run, or resume it as it is with 'evomerge resume {folder}' (which takes "
            "--budget)"
        )
