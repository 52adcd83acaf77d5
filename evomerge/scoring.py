"""Scoring one model on a suite, outside any search."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomerge.config import Config, Engine, load_config
from evomerge.environment import prepare
from evomerge.errors import CandidateFailed, InfrastructureError, UserError, in_file
from evomerge.evaluation.items import RAW, ItemScore, Split
from evomerge.losses import loss
from evomerge.mergekit import Reading, open_recipe
from evomerge.recipe import Merge, Output, Recipe, Source

if TYPE_CHECKING:
    import torch

    from evomerge.checkpoints import Checkpoint
    from evomerge.evaluation.entries import Reply
    from evomerge.evaluation.report import MetricValue, Results
    from evomerge.evaluation.requests import Engine as LiveEngine
    from evomerge.evaluation.suite import Suite

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """A model's scores on one split of a suite.

    Attributes:
        model: as named by the caller; a `Recipe` by its hash.
        split: the item set.
        score: ``{mean, ci95, n, tasks: {name: {mean, ci95, n, raw, truncated}}}``. Tasks are in their metrics' own
            units. raw is the mean in the metric's units; truncated is the share of generated answers that were
            cut at their token limit.
        units: of the suite's score: those of the metrics, or mapped to [0, 1], as in a run's results.
        metrics: metric of each task.
        lm_eval: task → its metrics as lm-eval reports them over these items: of tasks for which that is not the
            mean over items, or of all.
        fingerprint: of the engine.
    """

    model: str
    split: str
    score: dict[str, Any]
    units: str
    metrics: dict[str, str]
    fingerprint: str
    lm_eval: Mapping[str, Sequence[MetricValue]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "model": self.model,
            "split": self.split,
            "score": self.score,
            "units": self.units,
            "metrics": self.metrics,
            "lm_eval": {
                task: {value.name: value.to_dict() for value in values}
                for task, values in self.lm_eval.items()
            },
            "engine": self.fingerprint,
        }

    def __str__(self) -> str:
        from evomerge.evaluation.report import shown

        mapped = "" if self.units == RAW else self.units
        rows = [
            ("suite", mapped, self.score),
            *((t, self.metrics[t], e) for t, e in self.score["tasks"].items()),
        ]
        width = max(len(name) for name, _, _ in rows)
        lines = [f"{self.model}, {self.split} items"]
        for name, metric, entry in rows:
            low, high = map(shown, entry["ci95"])
            lines.append(
                f"  {name:<{width}}  {shown(entry['mean'])}  [{low}, {high}]  n={entry['n']}  {metric}"
                f"{_cut(entry)}".rstrip()
            )
            for value in self.lm_eval.get(name, ()) if entry is not self.score else ():
                lines.append(f"  {'':<{width}}  lm-eval: {value}")
        return "\n".join(lines)


def _cut(entry: Mapping[str, Any]) -> str:
    share = entry.get("truncated")
    return f"  ({share:.0%} of the answers cut)" if share else ""


def evaluate(
    model: Path | str | Recipe,
    suite: Config | Path | str,
    *,
    split: Split = "validation",
    overrides: Sequence[str] = (),
    base: Path | str | None = None,
    dtype: str | None = None,
    all_metrics: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Score a model on a config's suite.

    Args:
        model: a folder or hub id, a LoRA adapter, a recipe or mergekit YAML, a run directory, or a `Recipe`; a
            folder is scored with its own tokenizer.
        suite: the config (file) whose suite, splits and engine are used.
        split: ``search``, ``validation`` or ``test``.
        overrides: ``a.b=value`` strings for the config.
        base: what an adapter lies on, if not the model that it names.
        dtype: of the weights, if not their own.
        all_metrics: report all metrics of lm-eval's tasks, not only the one that is fitness.
        progress: called with (items answered, in all).

    Raises:
        UserError: the model or the config; also if the model's answers cannot be scored.
    """
    config = suite if isinstance(suite, Config) else load_config(suite, overrides)
    if split == "test" and not isinstance(model, Recipe):
        _refuse_early_opening(Path(model).expanduser())
    # Before the imports below, which take seconds: a mistyped model is told at once.
    subject = open_subject(model, base=base, dtype=dtype, engine=config.engine, offline=not config.uses_hub)
    from evomerge.evaluation.score_cache import ScoreCache, scores_folder
    from evomerge.evaluation.statistics import score
    from evomerge.evaluation.suite import Suite
    from evomerge.merging.identity import Identities
    from evomerge.searching.ranking import values_of
    from evomerge.searching.results import score_dict
    from evomerge.searching.setup import decide_chat_template, decide_engine, probe_engine, probes

    tokenizer = subject.tokenizer
    probed = probes(config)
    file = None if isinstance(suite, Config) else str(suite)
    with in_file(file):
        config = decide_engine(config, subject.donor)
    config = decide_chat_template(config, subject.checkpoints, tokenizer, file, {"model": subject.label})
    built = Suite.build(config.suite, config.splits, tokenizer, splits_needed=(split,), file=file)
    if probed and config.engine.device == "cuda":
        config = probe_engine(config, subject.donor, built, tokenizer, subject.dtype)
    reported = {
        task.name
        for task in built.tasks
        if (scorer := built.harness(task.name)) is not None and (all_metrics or not scorer.means)
    }
    table: dict[str, dict[str, ItemScore]] = {}
    results: dict[str, dict[tuple[str, str], list[Any]]] = {name: {} for name in reported}
    with subject.held(config.engine, config.workers.threads, "what was scored is kept: ") as engine:
        parts = [part for block in built.fixed_blocks(split, packing=engine.packing) for part in block.parts]
        cache = ScoreCache(
            scores_folder(config.cache.scores), engine.fingerprint, log.warning, unshared=built.unshared
        )
        identity = Identities(subject.checkpoints).of(subject.recipe)
        known = cache.known(identity, parts)
        total, done = sum(len(part.items) for part in parts), 0
        progress(0, total)
        for part in parts:
            answered: list[Reply] = []
            if part.hash not in known:
                known[part.hash] = built.score_part(engine, part, keep=answered.extend)
                cache.add(identity, [(part, known[part.hash])])
            outcome = known[part.hash]
            if outcome.failure is not None:
                raise CandidateFailed(outcome.failure)
            table.setdefault(part.task, {}).update({item.item: item for item in outcome.scores})
            if part.task in reported:
                for key, found in built.results(engine, part, answered).items():
                    results[part.task].setdefault(key, []).extend(found)
            done += len(part.items)
            progress(done, total)
        fingerprint = engine.fingerprint
    scored = score_dict(score(values_of(table, raw=True), built.weights, seed=config.seed), table)
    if built.units != RAW:
        mapped = score_dict(score(values_of(table), built.weights, seed=config.seed), table)
        scored = mapped | {"tasks": scored["tasks"]}
    return Evaluation(
        model=subject.label,
        split=split,
        score=scored,
        units=built.units,
        metrics={task.name: task.metric for task in built.tasks},
        fingerprint=fingerprint,
        lm_eval=_reports(built, results, all_metrics, config.seed),
    )


@dataclass(frozen=True)
class Subject:
    """A model that is to be scored.

    Attributes:
        label: what reports call it.
        recipe: pinned to its content.
        checkpoints: its parents, by name.
        donor: the parent whose config the live model has.
        dtype: of the live model's weights.
        tokenizer: of the live model.
    """

    label: str
    recipe: Recipe
    checkpoints: Mapping[str, Checkpoint]
    donor: Checkpoint
    dtype: torch.dtype
    tokenizer: Any

    @contextlib.contextmanager
    def held(self, settings: Engine, threads: int | None = None, comfort: str = "") -> Iterator[LiveEngine]:
        """Give an engine with the model's weights, and say of which model it is that scoring ended early.

        Args:
            settings: `device`, `batch_tokens` and `max_length` already decided.
            threads: of one operation on the CPU, and tensors that are merged at the same time; None: as it is, and
                one.
            comfort: what to know before trying again.

        Raises:
            UserError: the model cannot be scored.
            InfrastructureError: the engine was lost.
        """
        from evomerge.engines import open_host
        from evomerge.threads import threads_per_operation

        fixed = settings.device == "cpu" and threads
        host = open_host(settings, self.checkpoints, self.tokenizer, threads=threads or 1)
        with (
            _told_of(self.label, comfort),
            threads_per_operation(fixed) if fixed else contextlib.nullcontext(),
            contextlib.closing(host),
        ):
            yield host.hold(self.recipe)


def open_subject(
    model: Path | str | Recipe,
    *,
    base: Path | str | None,
    dtype: str | None,
    engine: Engine,
    offline: bool = True,
) -> Subject:
    """Open a model in any form; see `evaluate`.

    Args:
        model, base, dtype: as for `evaluate`.
        engine: its dtype counts where nothing else is said.
        offline: whether all else is on this machine.

    Raises:
        UserError: no such model, or its parents do not fit each other.
    """
    reading = _model_reading(model, base=base, dtype=dtype, engine=engine)
    prepare(offline=offline and not reading.recipe.uses_hub)
    from evomerge.merging import open_parents, output_tokenizer, pin, plan_merge

    with reading.in_file():
        checkpoints = open_parents(reading.recipe)
        recipe = pin(reading.recipe, checkpoints)
        plan = plan_merge(recipe, checkpoints)
    return Subject(
        label=f"recipe {recipe.hash}" if isinstance(model, Recipe) else str(model),
        recipe=recipe,
        checkpoints=checkpoints,
        donor=checkpoints[plan.donor],
        dtype=plan.dtype,
        tokenizer=output_tokenizer(recipe, checkpoints),
    )


@contextlib.contextmanager
def _told_of(label: str, comfort: str) -> Iterator[None]:
    try:
        yield
    except CandidateFailed as reason:
        raise UserError(f"{label}: cannot be scored: {reason}") from None
    except Exception as error:
        lost = loss(error)
        if lost is None:
            raise
        raise InfrastructureError(
            f"{label}: the engine was lost: {lost}; {comfort}try again, with a smaller "
            "engine.batch_tokens if memory ran out"
        ) from None


def _reports(
    suite: Suite, results: Mapping[str, Results], all_metrics: bool, seed: int
) -> dict[str, list[MetricValue]]:
    """Return what lm-eval reports of some tasks: all metrics, or the one that is fitness."""
    from evomerge.evaluation.report import report

    reports = {}
    for task in suite.tasks:
        scorer = suite.harness(task.name) if task.name in results else None
        if scorer is not None:
            chosen = {
                key: found
                for key, found in results[task.name].items()
                if all_metrics or key == (task.metric, task.filter)
            }
            reports[task.name] = report(scorer.task, task.name, chosen, seed=seed)
    return reports


def _model_reading(
    model: Path | str | Recipe, *, base: Path | str | None, dtype: str | None, engine: Engine
) -> Reading:
    reading = Reading(model) if isinstance(model, Recipe) else reading_of(str(model), base)
    if base is not None and isinstance(model, Recipe):
        raise UserError("--base: it is for adapters; a recipe names its models itself")
    if dtype is None and reading.recipe.output.dtype is None and engine.dtype != "auto":
        dtype = engine.dtype
    if dtype is None:
        return reading
    output = reading.recipe.output.model_copy(update={"dtype": dtype})
    return replace(reading, recipe=reading.recipe.model_copy(update={"output": output}))


def _refuse_early_opening(model: Path) -> None:
    """Keep the test items closed to a search that has not chosen its winner, or is looking for another one."""
    from evomerge.searching.rundir import DATABASE, RESULTS, STATUS, read_status

    run = model.parent if model.is_file() else model
    if not (run / DATABASE).exists():
        return
    # A copy of a run may lack its status.
    state = read_status(run)["state"] if (run / STATUS).exists() else "done"
    if state != "done" or not (run / RESULTS).exists():
        raise UserError(
            f"{run}: this run has not ended, and its test items stay closed until it has; finish it with "
            f"'evomerge resume {run}', or look at --split validation"
        )


def reading_of(text: str, base: Path | str | None = None) -> Reading:
    """Return the recipe of a recipe file, of a run directory, or of a single model, an adapter on its base."""
    path = Path(text).expanduser()
    is_recipe = path.is_file() or text == "-" or (path / "run.db").exists()
    if is_recipe and base is not None:
        raise UserError(f"--base: it is for adapters; {text} is a recipe, which names its models itself")
    if (path / "run.db").exists():
        if not (path / "recipe.yaml").exists():
            raise UserError(f"{path}: this run has no recipe yet; its first generation is not complete")
        return open_recipe(path / "recipe.yaml")
    if is_recipe:
        return open_recipe(text if text == "-" else path)
    if base is None:
        source = Source(source=_located(text))
    else:
        source = Source(source=_located(str(base)), adapter=_located(text))
    recipe = Recipe(
        models={"model": source},
        merges={"merged": Merge(method="linear", inputs=("model",), parameters={"weight": 1.0})},
        output=Output(tokenizer="model", chat_template="model"),
    )
    # The user names the model and knows of no recipe.
    return Reading(recipe, keys={"models.model": ""})


def _located(text: str) -> str:
    path = Path(text).expanduser()
    return str(path.resolve()) if path.exists() else text
