"""The library of tasks: names as lm-eval's users write them, and the tasks that a group or tag stands for."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evomerge.environment import cache_folder
from evomerge.errors import UserError, at, nearest
from evomerge.evaluation.definitions import (
    Definition,
    make_absolute,
    overridden,
    read_definition,
    read_yaml,
)
from evomerge.suite_config import TaskSpec

_IGNORED = {"__pycache__", ".ipynb_checkpoints"}
_GROUP_KEYS = {"group", "group_alias", "task", "aggregate_metric_list", "metadata", "tag"}
"""What a group's YAML says of the group; any other key overrides that of its tasks."""
_OLD_GROUP = "group: this YAML defines a task, whose groups lm-eval calls 'tag' now; rename the key"


@dataclass(frozen=True)
class Index:
    """Where names are defined.

    Attributes:
        tasks, groups: name → its YAMLs' paths.
        tags: name → its tasks.
        broken: (text, reason) of YAMLs that cannot be read.
    """

    tasks: dict[str, list[str]] = field(default_factory=dict)
    groups: dict[str, list[str]] = field(default_factory=dict)
    tags: dict[str, list[str]] = field(default_factory=dict)
    broken: list[tuple[str, str]] = field(default_factory=list)

    @property
    def names(self) -> set[str]:
        """Every name."""
        return {*self.tasks, *self.groups, *self.tags}


@dataclass(frozen=True)
class Aggregate:
    """How lm-eval adds up one metric of a group.

    Attributes:
        metric: its name.
        filters: behind which filters; None: whichever the tasks have.
        by_size: whether a task counts by its number of documents, rather than all alike.
    """

    metric: str
    filters: tuple[str, ...] | None
    by_size: bool


@dataclass(frozen=True)
class Expansion:
    """The tasks that a name stands for.

    Attributes:
        definitions: of the tasks, in the group's order.
        group: name of the group or tag; None for a task by itself.
        aggregates: of the group.
    """

    definitions: tuple[Definition, ...]
    group: str | None = None
    aggregates: tuple[Aggregate, ...] = ()

    def aggregate(self, metric: str) -> Aggregate | None:
        """Return how a metric is added up: as the group says of it, else as of its first."""
        own = [a for a in self.aggregates if a.metric == metric.partition(",")[0].strip()]
        return next(iter([*own, *self.aggregates]), None)


class Library:
    """Tasks, groups and tags by name: those of the include folders first, then lm-eval's own.

    lm-eval's index of its own takes seconds; it is only made for a name that no folder defines.

    Args:
        include: folders of task YAMLs.
        file: the config file, for messages.

    Raises:
        UserError: a folder does not exist.
    """

    def __init__(self, include: Sequence[str], file: Path | str | None) -> None:
        self._include = tuple(include)
        self._file = file
        self._local = _index(self._include, file)

    def expand(self, name: str, *, key: str) -> Expansion:
        """Return the tasks behind the name, or the path, of a task, a group or a tag.

        Args:
            name: as in lm-eval; or the path of a YAML (see `is_yaml_path`).
            key: where it is written, for messages.

        Raises:
            UserError: unknown name, two definitions, an unreadable YAML, a group that holds itself.
        """
        place = at(self._file, key)
        if is_yaml_path(name):
            kind, path = "task", Path(name).expanduser()
            if not path.is_file():
                raise UserError(f"{place}{name}: no such file")
            if "group" in read_yaml(path).keys:
                kind = "group"
        else:
            kind, found = self._known(name, place, None)
            if kind == "tag":
                definitions = [d for task in found for d in self._named(task, {}, _Walk(place))]
                return Expansion(_once(definitions, name, place), group=name)
            path = self._only(name, kind, found, place)
        if kind == "task":
            return Expansion((read_definition(path),))
        keys = read_yaml(path).keys
        name = str(keys["group"])
        definitions = list(self._members(name, keys, path, {}, _Walk(place)))
        return Expansion(_once(definitions, name, place), name, _aggregates(keys, path))

    def _find(self, name: str, place: str) -> tuple[str, Sequence[str]] | None:
        """Return whether a name is a task, a group or a tag, with its YAMLs or its tasks."""
        for own in (False, True):
            known = lm_eval_index() if own else self._local
            if name in known.tasks:
                return "task", known.tasks[name]
            if name in known.groups:
                return "group", known.groups[name]
            if name in known.tags:
                return "tag", sorted(set(known.tags[name]))
            for text, reason in known.broken:
                if re.search(rf"^(task|group):\s*['\"]?{re.escape(name)}\b", text, re.MULTILINE):
                    raise UserError(f"{place}'{name}': {reason}")
        return None

    def _known(self, name: str, place: str, group: str | None) -> tuple[str, Sequence[str]]:
        found = self._find(name, place)
        if found is not None:
            return found
        where = "" if group is None else f" in group '{group}'"
        folders = ", ".join(self._include)
        folders = f"the include folders ({folders})" if folders else "suite.include (it is empty)"
        hint = nearest(name, sorted(self._local.names)) or nearest(name, sorted(lm_eval_index().names))
        raise UserError(
            f"{place}unknown task '{name}'{where}{hint}: neither in {folders} nor one of lm-eval's own"
        )

    def _only(self, name: str, kind: str, paths: Sequence[str], place: str) -> Path:
        if len(paths) > 1:
            where = " and ".join(paths[:2])
            raise UserError(f"{place}the {kind} '{name}' is defined twice, in {where}; rename one of them")
        return Path(paths[0])

    def _named(self, name: str, overrides: Mapping[str, Any], walk: _Walk) -> list[Definition]:
        """Return the tasks of a group's member by name."""
        kind, found = self._known(name, walk.place, walk.names[-1] if walk.names else None)
        if kind == "tag":
            return [d for task in found for d in self._named(task, overrides, walk)]
        path = self._only(name, kind, found, walk.place)
        if kind == "task":
            return [overridden(read_definition(path), overrides, walk.files)]
        return list(self._members(name, read_yaml(path).keys, path, overrides, walk))

    def _members(
        self, name: str, keys: Mapping[str, Any], path: Path, overrides: Mapping[str, Any], walk: _Walk
    ) -> Iterator[Definition]:
        """Yield the tasks of a group; what is written farther out overrides what is written farther in.

        As in lm-eval, the keys of an entry of the list itself win over both.
        """
        if name in walk.names:
            raise UserError(f"{walk.place}group '{name}' holds itself: {' > '.join([*walk.names, name])}")
        walk = _Walk(walk.place, (*walk.names, name), (*walk.files, path))
        overrides = {**_task_keys(keys), **overrides}
        listed = keys.get("task")
        listed = [listed] if isinstance(listed, str) else listed
        if isinstance(keys.get("task"), str) and _is_task(keys):
            raise UserError(f"{path}: {_OLD_GROUP}")
        if not isinstance(listed, list) or not listed:
            raise UserError(f"{path}: task: group '{name}' lists no tasks")
        for entry in listed:
            if isinstance(entry, str):
                yield from self._named(entry, overrides, walk)
                continue
            member = entry.get("group", entry.get("task")) if isinstance(entry, dict) else None
            if not isinstance(member, str):
                raise UserError(
                    f"{path}: task: {entry!r:.60} in group '{name}' is neither a name nor a mapping with "
                    "'task' or 'group'"
                )
            make_absolute(entry, path)
            own = {**overrides, **_task_keys(entry)}
            if "group" in entry and self._find(member, walk.place) is None:
                yield from self._members(f"{name}::{member}", entry, path, overrides, walk)
            elif _is_task(own) and self._find(member, walk.place) is None:
                task = f"{name}::{member}"
                yield overridden(Definition(task, path, {}, (), ()), {**own, "task": task}, walk.files)
            else:
                yield from self._named(member, own, walk)


@dataclass(frozen=True)
class _Walk:
    """The way from a name to the group that is being looked at: its groups and their YAMLs."""

    place: str
    names: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()


def _task_keys(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a group, or of an entry of its list, that override those of its tasks."""
    return {key: value for key, value in keys.items() if key not in _GROUP_KEYS}


def _is_task(keys: Mapping[str, Any]) -> bool:
    """Whether a YAML that has the key 'group' defines a task, as lm-eval allowed once."""
    return {"dataset_path", "custom_dataset"} & set(keys) != set() and "doc_to_text" in keys


def specs_of(spec: TaskSpec, expansion: Expansion) -> list[TaskSpec]:
    """Return an entry for each task that an entry of the suite stands for; each has the whole weight.

    Where no metric is named, the tasks of a group get the one that lm-eval adds up for it, if they have it.
    """
    metric = spec.metric
    first = expansion.aggregate(metric)
    if metric == "auto" and first is not None:
        only = first.filters if first.filters is not None and len(first.filters) == 1 else ()
        metric = ",".join([first.metric, *only])
    suffix = spec.name.removeprefix(spec.task) if spec.name.startswith(spec.task) else None
    specs = []
    for definition in expansion.definitions:
        name = spec.name if suffix is None else definition.name + suffix
        if suffix is None and expansion.group is not None:
            name = f"{spec.name}:{definition.name}"
        wanted = metric if spec.metric != "auto" or _has_metric(definition, metric) else "auto"
        specs.append(spec.model_copy(update={"task": definition.name, "name": name, "metric": wanted}))
    return specs


def _has_metric(definition: Definition, metric: str) -> bool:
    """Whether a task lists a metric, or lists none and may have it."""
    listed = definition.config.get("metric_list")
    names = [entry.get("metric") for entry in listed or [] if isinstance(entry, dict)]
    return not listed or metric.partition(",")[0] in names


def is_yaml_path(name: str) -> bool:
    """Whether a task is named by its file."""
    return name.startswith((".", "/", "~")) and name.endswith((".yaml", ".yml"))


def _once(definitions: Iterable[Definition], group: str, place: str) -> tuple[Definition, ...]:
    """Return the tasks, those that are reached in several ways once; refuse one that is overridden differently."""
    known: dict[str, Definition] = {}
    for definition in definitions:
        other = known.setdefault(definition.name, definition)
        if other.config != definition.config:
            raise UserError(
                f"{place}group '{group}' holds the task '{definition.name}' twice, with different settings"
            )
    return tuple(known.values())


def _aggregates(keys: Mapping[str, Any], path: Path) -> tuple[Aggregate, ...]:
    listed = keys.get("aggregate_metric_list") or []
    aggregates = []
    for entry in [listed] if isinstance(listed, dict) else listed:
        if not isinstance(entry, dict) or not isinstance(entry.get("metric"), str):
            raise UserError(f"{path}: aggregate_metric_list: each entry needs the key 'metric'")
        filters = entry.get("filter_list")
        filters = (filters,) if isinstance(filters, str) else None if filters is None else tuple(filters)
        aggregates.append(Aggregate(entry["metric"], filters, bool(entry.get("weight_by_size", True))))
    return tuple(aggregates)


@functools.cache
def lm_eval_index() -> Index:
    """Return where lm-eval's own tasks, groups and tags are defined.

    Reading its 14,000 YAMLs takes many seconds, so the index is kept in the cache folder for as long as they
    stay the same.
    """
    root = _own_tasks()
    kept = cache_folder() / "lm-eval-index" / f"{_state_of(root)}.json"
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        data = json.loads(kept.read_text(encoding="utf-8"))
        return Index(_placed(data["tasks"], root), _placed(data["groups"], root), data["tags"])
    index = _read_lm_eval_index()
    data = {
        "tasks": {name: os.path.relpath(path, root) for name, (path,) in index.tasks.items()},
        "groups": {name: os.path.relpath(path, root) for name, (path,) in index.groups.items()},
        "tags": index.tags,
    }
    # An index that cannot be kept is read again the next time.
    with contextlib.suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        part = kept.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps(data), encoding="utf-8")
        part.replace(kept)
    return index


def _own_tasks() -> Path:
    spec = importlib.util.find_spec("lm_eval")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations))).resolve() / "tasks"


def _state_of(root: Path) -> str:
    """Return a digest that changes when a YAML is added, removed or edited."""
    digest = hashlib.sha256(f"v1 {root}".encode())
    for folder, folders, files in os.walk(root):
        folders.sort()
        for name in sorted(file for file in files if file.endswith(".yaml")):
            path = os.path.join(folder, name)
            state = os.stat(path)
            digest.update(f"{path}\0{state.st_size}\0{state.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:32]


def _placed(paths: Mapping[str, str], root: Path) -> dict[str, list[str]]:
    placed = {name: Path(os.path.normpath(root / path)) for name, path in paths.items()}
    if not all(path.is_relative_to(root) for path in placed.values()):
        raise ValueError("the index names files of others")
    return {name: [str(path)] for name, path in placed.items()}


def _read_lm_eval_index() -> Index:
    from lm_eval.tasks import TaskManager

    index = Index()
    manager = TaskManager()
    groups, tags = set(manager.all_groups), set(manager.all_tags)
    for name, entry in manager.task_index.items():
        if name in tags:
            index.tags[name] = sorted(entry.tags)
        elif entry.yaml_path is not None:
            (index.groups if name in groups else index.tasks)[name] = [str(entry.yaml_path)]
    return index


def _index(include: tuple[str, ...], file: Path | str | None) -> Index:
    """Return what the YAMLs of some folders define."""
    index = Index()
    seen: set[Path] = set()
    for folder in include:
        if not Path(folder).is_dir():
            raise UserError(f"{at(file, 'suite.include')}{folder}: no such folder of task YAMLs")
        for path in sorted(Path(folder).resolve().glob("**/*.yaml")):
            if path in seen or _IGNORED & set(path.parts):
                continue
            seen.add(path)
            try:
                keys = read_yaml(path).keys
            except UserError as error:
                index.broken.append((path.read_text(encoding="utf-8", errors="replace"), str(error)))
                continue
            if "group" in keys and isinstance(keys.get("task"), str) and _is_task(keys):
                index.broken.append((path.read_text(encoding="utf-8"), f"{path}: {_OLD_GROUP}"))
            elif isinstance(keys.get("group"), str):
                index.groups.setdefault(keys["group"], []).append(str(path))
            elif isinstance(keys.get("task"), str):
                index.tasks.setdefault(keys["task"], []).append(str(path))
                tags = keys.get("tag") or []
                for tag in [tags] if isinstance(tags, str) else tags:
                    index.tags.setdefault(str(tag), []).append(keys["task"])
    return index
