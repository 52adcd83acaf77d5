"""Scoring one model on lm-eval tasks by name, as `lm_eval` does: no config, no splits, no search."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomerge.config import Engine
from evomerge.errors import UserError
from evomerge.evaluation.report import MetricValue, shown
from evomerge.overrides import overridden
from evomerge.recipe import Recipe
from evomerge.schema import Frozen, validate
from evomerge.scoring import open_subject
from evomerge.suite_config import Suite, TaskSpec

if TYPE_CHECKING:
    from evomerge.evaluation.definitions import Definition
    from evomerge.evaluation.library import Expansion

_STEPS = 20
_FEWEST_AT_ONCE = 64


@dataclass(frozen=True)
class TaskScores:
    """One task's, or one group's, metrics.

    Attributes:
        metrics: of each filter.
        n: documents.
        truncated: share of the generated answers that were cut at their token limit; None if there are none.
        split: the data split; of a group, None.
    """

    metrics: tuple[MetricValue, ...]
    n: int
    truncated: float | None = None
    split: str | None = None


@dataclass(frozen=True)
class TaskEvaluation:
    """A model's scores on lm-eval tasks.

    Attributes:
        model: as named by the caller; a `Recipe` by its hash.
        tasks: name → scores.
        groups: name → scores, of the groups that lm-eval adds up.
        fingerprint: of the engine.
    """

    model: str
    tasks: Mapping[str, TaskScores]
    groups: Mapping[str, TaskScores]
    fingerprint: str

    def to_dict(self) -> dict[str, Any]:
        """Return plain data; metrics are called ``metric,filter``, as lm-eval does."""

        def plain(of: Mapping[str, TaskScores]) -> dict[str, Any]:
            return {
                name: {
                    "n": scores.n,
                    "split": scores.split,
                    "truncated": scores.truncated,
                    "metrics": {value.name: value.to_dict() for value in scores.metrics},
                }
                for name, scores in of.items()
            }

        return {
            "model": self.model,
            "tasks": plain(self.tasks),
            "groups": plain(self.groups),
            "engine": self.fingerprint,
        }

    def __str__(self) -> str:
        rows = [("task", "metric", "value", "95 % interval", "stderr", "n")]
        notes = []
        for name, scores in (*self.groups.items(), *self.tasks.items()):
            for number, value in enumerate(scores.metrics):
                filter_ = "" if value.filter == "none" else f",{value.filter}"
                interval = "" if value.ci95 is None else "[{}, {}]".format(*map(shown, value.ci95))
                stderr = "" if value.stderr is None else shown(value.stderr)
                arrow = {True: "↑", False: "↓", None: ""}[value.higher_is_better]
                rows.append(
                    (
                        name if number == 0 else "",
                        f"{value.metric}{filter_} {arrow}".rstrip(),
                        shown(value.value),
                        interval,
                        stderr,
                        str(value.n),
                    )
                )
            if scores.truncated:
                notes.append(f"  {name}: {scores.truncated:.0%} of the answers were cut at their token limit")
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        right = (2, 4, 5)
        lines = [
            "  "
            + "  ".join(
                cell.rjust(width) if column in right else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        return "\n".join([self.model, *lines, *notes])


def evaluate_tasks(
    model: Path | str | Recipe,
    tasks: Sequence[str],
    *,
    limit: float | None = None,
    num_fewshot: int | None = None,
    include: Sequence[str] = (),
    split: str | None = None,
    chat_template: bool | str | None = None,
    base: Path | str | None = None,
    dtype: str | None = None,
    engine: str = "hf",
    device: str = "auto",
    overrides: Sequence[str] = (),
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> TaskEvaluation:
    """Score a model on tasks, groups or tags: the documents that `lm_eval` evaluates, in its order.

    Args:
        model: a folder or hub id, a LoRA adapter, a recipe or mergekit YAML, a run directory, or a `Recipe`.
        tasks: lm-eval's names, or paths of YAMLs.
        limit: of each task the first so many documents, or below 1 this share of them.
        num_fewshot: examples in each prompt, if not the task's own number.
        include: folders of task YAMLs.
        split: the data split, if not the one that lm-eval evaluates.
        chat_template: as `suite.chat_template`; has to be given where the model has one.
        base: what an adapter lies on, if not the model that it names.
        dtype: of the weights, if not their own.
        engine, device: as in a config's `engine`.
        overrides: ``suite.key=value`` or ``engine.key=value`` strings.
        seed: of bootstraps.
        progress: called with (documents answered, in all).

    Raises:
        UserError: the model, a task or a setting is wrong, or the model's answers cannot be scored.
    """
    if limit is not None and not (limit > 0 and (limit < 1 or float(limit).is_integer())):
        raise UserError(f"--limit {limit:g}: give a number of documents, or a share between 0 and 1")
    suite, specs, settings = _settings(
        tasks, num_fewshot, include, chat_template, {"type": engine, "device": device}, overrides
    )
    subject = open_subject(model, base=base, dtype=dtype, engine=settings)
    from evomerge.checkpoints.tokenizer import chat_templates
    from evomerge.evaluation.chat import PromptStyle, decide_chat, prompt_style
    from evomerge.evaluation.entries import ask
    from evomerge.evaluation.library import Library
    from evomerge.evaluation.report import report, report_group
    from evomerge.evaluation.requests import Generated
    from evomerge.evaluation.whole import WholeTask
    from evomerge.searching.setup import decided

    settings, tokenizer = decided(settings, subject.donor), subject.tokenizer
    library = Library(suite.include, None)
    expansions = {spec.task: library.expand(spec.task, key="--tasks") for spec in specs}

    chosen = _chosen(specs, expansions)

    def opened(style: PromptStyle) -> Iterator[WholeTask]:
        for spec, definition in chosen:
            yield WholeTask(spec, definition, suite, limit=limit, split=split, style=style, key="--tasks")

    def first_prompt(style: PromptStyle) -> str | None:
        return next((prompt for task in opened(style) if (prompt := task.prompt()) is not None), None)

    templates = {name: chat_templates(c.path) for name, c in subject.checkpoints.items()}
    if set(templates) == {"model"}:
        templates = {subject.label: templates["model"]}
    suite = decide_chat(suite, tokenizer, templates, first_prompt, key="--chat-template", file=None)
    whole = {task.name: task for task in opened(prompt_style(suite, tokenizer, None))}
    total, done = sum(map(len, whole.values())), 0
    results: dict[str, dict[tuple[str, str], list[Any]]] = {}
    scores: dict[str, TaskScores] = {}
    progress(0, total)
    with subject.held(settings) as held:
        for name, task in whole.items():
            requests = task.requests()
            size = max(_FEWEST_AT_ONCE, -(-len(requests) // _STEPS))
            answers: list[tuple[Any, ...]] = []
            for start in range(0, len(requests), size):
                answers += ask(held, requests[start : start + size])
                progress(done + len(answers), total)
            done += len(requests)
            texts = [answer for of in answers for answer in of if isinstance(answer, Generated)]
            cut = sum(text.truncated for text in texts) / len(texts) if texts else None
            results[name] = task.results(answers)
            metrics = report(task.task, name, results[name], seed=seed)
            scores[name] = TaskScores(tuple(metrics), len(task), cut, task.split)
        fingerprint = held.fingerprint
    groups = {}
    for expansion in expansions.values():
        names = [definition.name for definition in expansion.definitions]
        found = {name: scores[name].metrics for name in names}
        metrics = report_group(expansion.aggregates, found, results, seed=seed)
        if expansion.group is not None and metrics:
            groups[expansion.group] = TaskScores(tuple(metrics), sum(scores[name].n for name in names))
    return TaskEvaluation(subject.label, scores, groups, fingerprint)


class _Settings(Frozen):
    """What of a config an evaluation without one has."""

    suite: Suite
    engine: Engine


def _chosen(
    specs: Sequence[TaskSpec], expansions: Mapping[str, Expansion]
) -> list[tuple[TaskSpec, Definition]]:
    """Return the tasks behind some names, each once."""
    from evomerge.evaluation.library import specs_of

    chosen: dict[str, tuple[TaskSpec, Definition]] = {}
    for spec in specs:
        expansion = expansions[spec.task]
        for member, definition in zip(specs_of(spec, expansion), expansion.definitions, strict=True):
            _, known = chosen.setdefault(definition.name, (member, definition))
            if known.config != definition.config:
                raise UserError(
                    f"--tasks: '{definition.name}' comes twice, with different settings; evaluate them one by one"
                )
    return list(chosen.values())


def _settings(
    tasks: Sequence[str],
    num_fewshot: int | None,
    include: Sequence[str],
    chat_template: bool | str | None,
    engine: Mapping[str, Any],
    overrides: Sequence[str],
) -> tuple[Suite, list[TaskSpec], Engine]:
    """Return the suite with its tasks and the engine as a config would have them."""
    if not tasks:
        raise UserError("--tasks: is empty; name at least one lm-eval task")
    here = Path.cwd()
    data: dict[str, Any] = {
        "suite": {
            "tasks": [{"task": task, "num_fewshot": num_fewshot} for task in tasks],
            "include": [os.path.abspath(Path(folder).expanduser()) for folder in include],
            "chat_template": chat_template,
        },
        "engine": dict(engine),
    }
    settings = validate(_Settings, overridden(data, overrides), None)
    specs = [spec.placed(here) for spec in settings.suite.tasks if isinstance(spec, TaskSpec)]
    return settings.suite, specs, settings.engine
