"""Finding task definitions: lm-eval YAMLs, read as text and checked before anything in them may run."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from evomerge.errors import UserError, at, nearest

_IGNORED = {"__pycache__", ".ipynb_checkpoints"}
_CODE_METRICS = {"code_eval", "pass_at_k", "pass_at_1", "pass@k", "pass@1"}
_FILE_KEYS = ("data_files", "data_dir")


@dataclass(frozen=True)
class PythonCall:
    """A ``!function`` of a YAML: `name` as written in `file`, under `key`. Not imported here."""

    name: str
    file: Path


@dataclass(frozen=True)
class Definition:
    """One task as its YAMLs define it.

    Attributes:
        name: the task's name.
        file: its YAML.
        config: the merged keys, `PythonCall`s in place of functions, data files as absolute paths.
        calls: every Python call of the file and those it includes, also the overridden ones: lm-eval
            imports them all.
        unsafe_templates: templates that reach for Python's internals.
    """

    name: str
    file: Path
    config: Mapping[str, Any]
    calls: tuple[PythonCall, ...]
    unsafe_templates: tuple[str, ...]


def find_definition(name: str, include: Sequence[str], *, file: Path | str | None, key: str) -> Definition:
    """Find a task by name: in the include folders first, then among lm-eval's own.

    lm-eval's index of its own tasks takes seconds; it is only made for a name that no folder defines.

    Raises:
        UserError: unknown name, a group, two definitions, an unreadable YAML or a missing folder.
    """
    paths, broken = _index(tuple(include), file)
    if name in paths:
        if len(paths[name]) > 1:
            where = " and ".join(map(str, paths[name][:2]))
            raise UserError(
                f"{at(file, key)}the task '{name}' is defined twice, in {where}; rename one of them"
            )
        return read_definition(paths[name][0])
    for text, reason in broken:
        if re.search(rf"^task:\s*['\"]?{re.escape(name)}\b", text, re.MULTILINE):
            raise UserError(f"{at(file, key)}task '{name}': {reason}")
    own, members = _lm_eval_index()
    if name in members:
        shown = ", ".join(members[name][:8]) + (", …" if len(members[name]) > 8 else "")
        raise UserError(f"{at(file, key)}'{name}' is a group of tasks; list its tasks instead: {shown}")
    if name in own:
        return read_definition(own[name])
    folders = f"the include folders ({', '.join(include)})" if include else "suite.include (it is empty)"
    hint = nearest(name, paths) or nearest(name, own)
    raise UserError(
        f"{at(file, key)}unknown task '{name}'{hint}: neither in {folders} nor one of lm-eval's own"
    )


def read_definition(path: Path) -> Definition:
    """Read one task's YAML and what it includes, as text: nothing is imported or run."""
    calls: list[PythonCall] = []
    templates: list[str] = []
    config = _read(path.resolve(), calls, templates, ())
    name = config.get("task")
    if not isinstance(name, str):
        raise UserError(f"{path}: task: a task's YAML names the task with this key")
    return Definition(name, path.resolve(), config, tuple(calls), tuple(templates))


def check_trust(definition: Definition, *, python: bool, execution: bool, file: Path | str | None) -> None:
    """Refuse a task that would run code which the config does not allow.

    Args:
        definition: the task.
        python: ``suite.trust_task_code``.
        execution: ``suite.allow_code_execution``.
        file: the config file.

    Raises:
        UserError: Python called from outside lm-eval's package, or generated code executed.
    """
    if not python:
        reasons = [
            f"calls Python (!function {c.name} in {c.file})" for c in definition.calls if not _is_own(c.file)
        ]
        if not _is_own(definition.file):
            reasons += [
                f"has {key}" for key in ("class", "custom_dataset", "use_prompt") if key in definition.config
            ]
        reasons += [
            f"reaches for Python's internals in the template {text!r:.60}"
            for text in definition.unsafe_templates
        ]
        if reasons:
            raise UserError(
                f"{at(file, 'suite.trust_task_code')}task '{definition.name}' {reasons[0]}; "
                f"read it, then set suite.trust_task_code: true"
            )
    if not execution and _executes(definition):
        raise UserError(
            f"{at(file, 'suite.allow_code_execution')}task '{definition.name}' executes code that the model writes; "
            f"if this machine may run it, set suite.allow_code_execution: true"
        )


def _executes(definition: Definition) -> bool:
    if definition.config.get("unsafe_code", False) is not False:
        return True
    entries = definition.config.get("metric_list")
    metrics = [e.get("metric") for e in entries if isinstance(e, dict)] if isinstance(entries, list) else []
    names = [m.name.rpartition(".")[2] if isinstance(m, PythonCall) else m for m in metrics]
    return any(name in _CODE_METRICS for name in names)


def _is_own(path: Path) -> bool:
    return path.is_relative_to(_package())


@functools.cache
def _package() -> Path:
    import lm_eval

    return Path(lm_eval.__path__[0]).resolve()


@functools.cache
def _lm_eval_index() -> tuple[dict[str, Path], dict[str, list[str]]]:
    """Return lm-eval's own tasks (name → YAML), and its groups and tags (name → members)."""
    from lm_eval.tasks import TaskManager

    tasks: dict[str, Path] = {}
    members: dict[str, list[str]] = {}
    manager = TaskManager()
    groups = set(manager.all_groups) | set(manager.all_tags)
    for name, entry in manager.task_index.items():
        if name in groups:
            listed = (entry.cfg or {}).get("task") or sorted(entry.tags)
            members[name] = [
                str(t.get("task", t.get("group"))) if isinstance(t, dict) else str(t) for t in listed
            ]
        elif entry.yaml_path is not None:
            tasks[name] = Path(entry.yaml_path)
    return tasks, members


def _index(
    include: tuple[str, ...], file: Path | str | None
) -> tuple[dict[str, list[Path]], list[tuple[str, str]]]:
    """Return the tasks of the folders (name → YAMLs), and (text, reason) of YAMLs that cannot be read."""
    paths: dict[str, list[Path]] = {}
    broken: list[tuple[str, str]] = []
    seen: set[Path] = set()
    for folder in include:
        if not Path(folder).is_dir():
            raise UserError(f"{at(file, 'suite.include')}{folder}: no such folder of task YAMLs")
        for path in sorted(Path(folder).resolve().glob("**/*.yaml")):
            if path in seen or _IGNORED & set(path.parts):
                continue
            seen.add(path)
            try:
                config = _read(path, [], [], ())
            except UserError as error:
                broken.append((path.read_text(encoding="utf-8", errors="replace"), str(error)))
                continue
            if isinstance(config.get("task"), str) and "group" not in config:
                paths.setdefault(config["task"], []).append(path)
    return paths, broken


def _read(
    path: Path, calls: list[PythonCall], templates: list[str], chain: tuple[Path, ...]
) -> dict[str, Any]:
    """Return the merged keys of a YAML; a file's own keys win over those it includes."""
    if path in chain:
        raise UserError(f"{path}: include: the files include one another")
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_loader(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a valid task YAML: {' '.join(str(error).split()):.200}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: a task YAML is a mapping of keys to values, this is {type(data).__name__}")
    for value in _leaves(data):
        if isinstance(value, PythonCall):
            calls.append(value)
        elif isinstance(value, str) and not _is_own(path) and _reaches_inside(value):
            templates.append(value)
    includes = data.pop("include", [])
    _make_absolute(data, path)
    merged: dict[str, Any] = {}
    for entry in includes if isinstance(includes, list) else [includes]:
        merged |= _read((path.parent / str(entry)).resolve(), calls, templates, (*chain, path))
    return merged | data


def _reaches_inside(text: str) -> bool:
    """Whether a template names a Python internal: written out, escaped, or put together from pieces."""
    if "{{" not in text and "{%" not in text:
        return False
    if "__" in text:
        return True
    import jinja2
    from jinja2 import nodes

    try:
        tree = jinja2.Environment().parse(text)
    except jinja2.TemplateSyntaxError:
        return False
    literals = [node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)]
    return any("__" in t or t.startswith("_") or t.endswith("_") for t in literals) or any(
        node.name == "attr" for node in tree.find_all(nodes.Filter)
    )


def _loader(path: Path) -> type[yaml.SafeLoader]:
    """Return a loader that turns ``!function`` into a `PythonCall` and knows no other tag."""

    class Loader(yaml.SafeLoader):
        pass

    def call(loader: yaml.SafeLoader, node: yaml.Node) -> PythonCall:
        if not isinstance(node, yaml.ScalarNode):
            raise yaml.constructor.ConstructorError(None, None, "!function takes a name", node.start_mark)
        return PythonCall(str(loader.construct_scalar(node)), path)

    Loader.add_constructor("!function", call)
    return Loader


def _leaves(data: Any) -> Iterator[Any]:
    if isinstance(data, dict):
        for key, value in data.items():
            yield from _leaves(key)
            yield from _leaves(value)
    elif isinstance(data, list | tuple):
        for value in data:
            yield from _leaves(value)
    else:
        yield data


def _make_absolute(data: dict[str, Any], path: Path) -> None:
    """Make the paths of `dataset_kwargs` absolute: they are relative to the YAML that has them."""
    kwargs = data.get("dataset_kwargs")
    if not isinstance(kwargs, dict):
        return

    def absolute(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: absolute(entry) for key, entry in value.items()}
        if isinstance(value, list):
            return [absolute(entry) for entry in value]
        return value if "://" in str(value) else str((path.parent / Path(str(value)).expanduser()).resolve())

    for key in _FILE_KEYS:
        if kwargs.get(key) is not None:
            kwargs[key] = absolute(kwargs[key])
