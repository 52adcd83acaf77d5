"""Task definitions: lm-eval YAMLs, read as text and checked before anything in them may run."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from evomerge.errors import UserError, at

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
        calls: every Python call of the file and those it includes, also the overridden ones.
        unsafe_templates: templates that reach for Python's internals.
        groups: YAMLs of groups that override keys of it.
    """

    name: str
    file: Path
    config: Mapping[str, Any]
    calls: tuple[PythonCall, ...]
    unsafe_templates: tuple[str, ...]
    groups: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Reading:
    """One YAML with those it includes: the merged keys, and what in them may run."""

    keys: dict[str, Any]
    calls: tuple[PythonCall, ...]
    unsafe_templates: tuple[str, ...]


def read_yaml(path: Path) -> Reading:
    """Read a YAML and what it includes, as text: nothing is imported or run."""
    calls: list[PythonCall] = []
    templates: list[str] = []
    keys = _read(path.resolve(), calls, templates, ())
    return Reading(keys, tuple(calls), tuple(templates))


def read_definition(path: Path) -> Definition:
    """Read one task's YAML and what it includes; see `read_yaml`."""
    reading = read_yaml(path)
    name = reading.keys.get("task")
    if not isinstance(name, str):
        raise UserError(f"{path}: task: a task's YAML names the task with this key")
    return Definition(name, path.resolve(), reading.keys, reading.calls, reading.unsafe_templates)


def overridden(definition: Definition, overrides: Mapping[str, Any], groups: Sequence[Path]) -> Definition:
    """Return a task with the keys that the YAMLs of groups override."""
    if not overrides:
        return definition
    readings = [read_yaml(group) for group in groups]
    return replace(
        definition,
        config={**definition.config, **overrides},
        calls=sum((r.calls for r in readings), definition.calls),
        unsafe_templates=sum((r.unsafe_templates for r in readings), definition.unsafe_templates),
        groups=(*definition.groups, *(group.resolve() for group in groups)),
    )


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
        if not all(map(_is_own, (definition.file, *definition.groups))):
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
    make_absolute(data, path)
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


def make_absolute(data: dict[str, Any], path: Path) -> None:
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
