"""Reading the YAML files that users write: strict keys, and errors that name file, key, value and fix."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from evomerge.errors import UserError, at, nearest


class Frozen(BaseModel):
    """Base of every schema: immutable, unknown keys refused with the nearest known one."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, data: Any) -> Any:
        if isinstance(data, dict):
            known = {field.alias or name for name, field in cls.model_fields.items()} | set(cls.model_fields)
            shown = {field.alias or name for name, field in cls.model_fields.items()}
            for key in data:
                if key not in known:
                    hint = nearest(str(key), shown) or f" (known: {', '.join(sorted(shown))})"
                    raise ValueError(f"unknown key '{key}'{hint}")
        return data


class _UniqueKeyLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key written twice; PyYAML silently keeps the last one."""


def _construct_mapping(loader: _UniqueKeyLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    loader.flatten_mapping(node)
    mapping: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        try:
            duplicate = key in mapping
        except TypeError:
            raise yaml.constructor.ConstructorError(
                None, None, f"key {key!r} is not a plain value", key_node.start_mark
            ) from None
        if duplicate:
            raise yaml.constructor.ConstructorError(
                None, None, f"key '{key}' is written twice", key_node.start_mark
            )
        mapping[key] = loader.construct_object(value_node, deep=True)
    return mapping


_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_mapping)


# YAML 1.1 reads 1e-3 as a string; people who write configs mean a number.
_UniqueKeyLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse_yaml(text: str, file: Path | str | None) -> Any:
    """Parse one YAML document with unique keys; `file` is named in errors."""
    try:
        return yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{at(file)}{line}not valid YAML: {problem}") from None


def read_text(path: Path, what: str) -> str:
    """Read a UTF-8 text file that the user named."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such {what}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read this {what}: {error}") from None


def read_yaml(path: Path, what: str) -> dict[str, Any]:
    """Read a YAML mapping from a file that the user named as a `what` (config, recipe)."""
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name the {what} file inside it")
    data = parse_yaml(read_text(path, what), path)
    if not isinstance(data, dict):
        raise UserError(f"{path}: a {what} is a YAML mapping of keys to values, this is {type(data).__name__}")
    return data


Model = TypeVar("Model", bound=BaseModel)


def validate(model: type[Model], data: Any, file: Path | str | None) -> Model:
    """Validate `data` against a schema; the first problem becomes one sentence."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise UserError(_sentence(error, file)) from None


_UNION_TAGS = ("function-", "tagged-union", "literal", "list[", "dict[", "constrained-", "tuple[", "nullable")


def _sentence(error: ValidationError, file: Path | str | None) -> str:
    problems = error.errors(include_url=False)
    # A union reports one problem per alternative: the deepest location belongs to the one that was meant.
    problem = max(problems, key=lambda p: (_is_custom(p), len(_keys(p["loc"]))))
    key = ".".join(_keys(problem["loc"]))
    if problem["type"] == "missing":
        return f"{at(file, key)}this key is required"
    message = problem["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if problem["type"] in ("value_error", "assertion_error"):
        return f"{at(file, key)}{message}"
    value = problem.get("input")
    return f"{at(file, key)}{value!r} is not accepted: {message[0].lower()}{message[1:]}"


def _is_custom(problem: Any) -> bool:
    return problem["type"] == "value_error"


def _keys(location: tuple[int | str, ...]) -> list[str]:
    """Drop the names of union alternatives that pydantic mixes into a location."""
    keys = []
    for part in location:
        text = str(part)
        if isinstance(part, str) and (text[:1].isupper() or text.startswith(_UNION_TAGS)):
            continue
        if text in ("float", "int", "bool", "str") and isinstance(part, str):
            continue
        keys.append(text)
    return keys


class _Dumper(yaml.SafeDumper):
    """SafeDumper that writes short lists and mappings of scalars on one line."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_list(dumper: yaml.SafeDumper, data: Any) -> yaml.Node:
    flow = all(isinstance(item, str | int | float | bool | type(None)) for item in data)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=flow)


def _represent_float(dumper: yaml.SafeDumper, data: float) -> yaml.Node:
    text = repr(data)
    if "e" in text and "." not in text.split("e")[0]:
        text = text.replace("e", ".0e")
    return dumper.represent_scalar("tag:yaml.org,2002:float", text)


_Dumper.add_representer(list, _represent_list)
_Dumper.add_representer(tuple, _represent_list)
_Dumper.add_representer(float, _represent_float)


def dump_yaml(data: Any) -> str:
    """Write plain data as YAML, keys in the given order, floats with all their digits."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
