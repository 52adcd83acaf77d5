"""Scoring one model on a suite, outside any search."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evomerge.config import Config, load_config
from evomerge.environment import prepare
from evomerge.errors import CandidateFailed, UserError
from evomerge.evaluation.items import ItemScore, Split
from evomerge.mergekit import Reading, open_recipe
from evomerge.recipe import Merge, Output, Recipe, Source

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """A model's scores on one split of a suite.

    Attributes:
        model: as named by the caller; a `Recipe` by its hash.
        split: the item set.
        score: ``{mean, ci95, n, tasks: {name: {mean, ci95, n, truncated}}}`` in the metrics' own units;
            truncated is the share of generated answers that were cut at their token limit.
        metrics: metric of each task.
        fingerprint: of the engine.
    """

    model: str
    split: str
    score: dict[str, Any]
    metrics: dict[str, str]
    fingerprint: str

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "model": self.model,
            "split": self.split,
            "score": self.score,
            "metrics": self.metrics,
            "engine": self.fingerprint,
        }

    def __str__(self) -> str:
        rows = [("suite", "", self.score), *((t, self.metrics[t], e) for t, e in self.score["tasks"].items())]
        width = max(len(name) for name, _, _ in rows)
        lines = [f"{self.model}, {self.split} items"]
        for name, metric, entry in rows:
            low, high = entry["ci95"]
            lines.append(
                f"  {name:<{width}}  {entry['mean']:.3f}  [{low:.3f}, {high:.3f}]  n={entry['n']}  {metric}"
                f"{_cut(entry)}".rstrip()
            )
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
) -> Evaluation:
    """Score a model folder, a recipe file, a run's recipe or a `Recipe` on a config's suite.

    Args:
        model: what to score; a folder is scored with its own tokenizer.
        suite: the config (file) whose suite, splits and engine are used.
        split: ``search``, ``validation`` or ``test``.
        overrides: ``a.b=value`` strings for the config.

    Raises:
        UserError: the model or the config; also if the model's answers cannot be scored.
    """
    config = suite if isinstance(suite, Config) else load_config(suite, overrides)
    reading = Reading(model) if isinstance(model, Recipe) else reading_of(str(model))
    recipe = reading.recipe
    if split == "test" and not isinstance(model, Recipe):
        _refuse_early_opening(Path(model))
    prepare(offline=not (config.uses_hub or recipe.uses_hub))
    from evomerge.merging import open_parents, output_tokenizer, pin, plan_merge

    # Before the imports below, which take seconds: a mistyped model is told at once.
    with reading.in_file():
        checkpoints = open_parents(recipe)
    from evomerge.engines import open_host
    from evomerge.evaluation.score_cache import ScoreCache, scores_folder
    from evomerge.evaluation.statistics import score
    from evomerge.evaluation.suite import Suite
    from evomerge.merging.identity import Identities
    from evomerge.searching.ranking import values_of
    from evomerge.searching.results import score_dict
    from evomerge.searching.setup import decide_chat_template, decide_engine

    with reading.in_file():
        recipe = pin(recipe, checkpoints)
        plan = plan_merge(recipe, checkpoints)
    label = f"recipe {recipe.hash}" if isinstance(model, Recipe) else str(model)
    config = decide_engine(config, checkpoints[plan.donor])
    tokenizer = output_tokenizer(recipe, checkpoints)
    file = None if isinstance(suite, Config) else suite
    config = decide_chat_template(config, checkpoints, tokenizer, file, {"model": label})
    built = Suite.build(
        config.suite,
        config.splits,
        tokenizer,
        splits_needed=(split,),
        file=None if isinstance(suite, Config) else str(suite),
    )
    try:
        engine = open_host(config.engine, checkpoints, tokenizer).hold(recipe)
        parts = [part for block in built.fixed_blocks(split, packing=engine.packing) for part in block.parts]
        cache = ScoreCache(
            scores_folder(config.cache.scores), engine.fingerprint, log.warning, unshared=built.unshared
        )
        identity = Identities(checkpoints).of(recipe)
        known = cache.known(identity, parts)
        table: dict[str, dict[str, ItemScore]] = {}
        for part in parts:
            if part.hash not in known:
                known[part.hash] = built.score_part(engine, part)
                cache.add(identity, [(part, known[part.hash])])
            outcome = known[part.hash]
            if outcome.failure is not None:
                raise CandidateFailed(outcome.failure)
            table.setdefault(part.task, {}).update({item.item: item for item in outcome.scores})
    except CandidateFailed as reason:
        raise UserError(f"{label}: cannot be scored: {reason}") from None
    raw = all(task.higher_is_better for task in built.tasks)
    result = score(values_of(table, raw=raw), built.weights, seed=config.seed)
    return Evaluation(
        model=label,
        split=split,
        score=score_dict(result, table),
        metrics={task.name: task.metric for task in built.tasks},
        fingerprint=engine.fingerprint,
    )


def _refuse_early_opening(run: Path) -> None:
    """Keep the test items closed to a search that has not chosen its winner."""
    if (run / "run.db").exists() and not (run / "results.json").exists():
        raise UserError(
            f"{run}: this run has not ended, and its test items stay closed until it has; finish it with "
            f"'evomerge resume {run}', or look at --split validation"
        )


def reading_of(text: str) -> Reading:
    """Return the recipe of a recipe file, of a run directory, or of a single model."""
    path = Path(text).expanduser()
    if path.is_file():
        return open_recipe(path)
    if (path / "run.db").exists():
        if not (path / "recipe.yaml").exists():
            raise UserError(f"{path}: this run has no recipe yet; its first generation is not complete")
        return open_recipe(path / "recipe.yaml")
    source = str(path.resolve()) if path.exists() else text
    recipe = Recipe(
        models={"model": Source(source=source)},
        merges={"merged": Merge(method="linear", inputs=("model",), parameters={"weight": 1.0})},
        output=Output(tokenizer="model", chat_template="model"),
    )
    # The user names the model and knows of no recipe.
    return Reading(recipe, keys={"models.model": ""})
