"""The suite of a config that `evomerge init` writes: its tasks, and how their items are split."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from evomerge.errors import UserError
from evomerge.evaluation.definitions import Definition
from evomerge.evaluation.items import SPLITS
from evomerge.evaluation.library import Library, is_yaml_path
from evomerge.recipe import expand_home


@dataclass(frozen=True)
class _Way:
    """What has to be said of a task: the data split to cut, if any, and the metric, where it has to be chosen."""

    cut: str | None
    metric: str | None


def suite_lines(tasks: Sequence[str], include: Sequence[str], speaks: bool) -> tuple[list[str], list[str]]:
    """Write the suite and the splits: by the names that all tasks share, else cut from each task's own split.

    Args:
        tasks: names or files of lm-eval tasks.
        include: folders with task YAMLs.
        speaks: whether the merged models have a chat template.

    Raises:
        UserError: a task is unknown, or names no data.
    """
    library = Library(include, None)
    ways: dict[str, _Way] = {}
    weights: dict[str, float] = {}
    for name in tasks:
        # The config may lie in another folder.
        task = str(expand_home(name).resolve()) if is_yaml_path(name) else name
        definitions = library.expand(task, key="--tasks").definitions
        members = {definition.name: _way(definition) for definition in definitions}
        alike = len(set(members.values())) == 1
        ways |= {task: next(iter(members.values()))} if alike else members
        weights |= {task: 1.0} if alike else {name: round(1 / len(members), 6) for name in members}
    cuts = {way.cut for way in ways.values()}
    lines = ["suite:"]
    if include:
        lines.append(f"  include: {flow(list(include))}   # folders of task files")
    if speaks:
        lines.append(
            "  chat_template: true                 # prompts are messages of a conversation; false: plain text"
        )
    lines.append("  tasks:                              # what is measured, and how much each one counts")
    for task, way in ways.items():
        entry: dict[str, Any] = {"task": task, "weight": weights[task]}
        if way.metric is not None:
            entry["metric"] = way.metric
        if len(cuts) > 1:
            entry["splits"] = _splits(way.cut)
        lines.append(f"    - {flow(entry)}")
    if len(cuts) > 1:
        return lines, []
    about = (
        "# Three disjoint sets of items: the search sees the first, the winner is chosen on the second and meets\n"
        "# the third once, at the end."
    )
    return lines, [about, f"splits: {flow(_splits(*cuts))}"]


def _splits(cut: str | None) -> dict[str, Any]:
    if cut is None:
        return {split: split for split in SPLITS}
    return {"from": cut, "fractions": {"search": 0.6, "validation": 0.2, "test": 0.2}}


def _way(definition: Definition) -> _Way:
    return _Way(_cut(definition.config, definition.name), _metric(definition.config))


def _metric(definition: Mapping[str, Any]) -> str | None:
    """Return the first metric behind the first filter where the task has several filters, else None."""
    filters, metrics = (definition.get(key) or [] for key in ("filter_list", "metric_list"))
    if len(filters) < 2 or not metrics or not isinstance(metrics[0].get("metric"), str):
        return None
    return f"{metrics[0]['metric']},{filters[0]['name']}"


def _cut(definition: Mapping[str, Any], task: str) -> str | None:
    """Return the data split to cut in three, or None where the task's files have three by name."""
    options = definition.get("dataset_kwargs")
    files = options.get("data_files") if isinstance(options, Mapping) else None
    if isinstance(files, Mapping) and set(SPLITS) <= set(files):
        return None
    for key in ("test_split", "validation_split", "training_split"):
        if isinstance(definition.get(key), str):
            return str(definition[key])
    raise UserError(f"--tasks: '{task}' names no test_split, validation_split or training_split to cut")


def flow(data: Any) -> str:
    """Return plain data as YAML on one line."""
    text = yaml.safe_dump(data, default_flow_style=True, sort_keys=False, width=math.inf, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")
