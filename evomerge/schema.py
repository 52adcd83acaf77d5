"""Reading the YAML files that users write: strict keys, and errors that name file, key, value and fix."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticKnownError

from evomerge.errors import UserError, at, nearest


class Frozen(BaseModel):
    """Base of every schema: immutable, unknown keys refused with the nearest known one.

    What a validator raises as ValueError is told to the user word for word. It may begin with ``key: ``, a
    key path relative to the model.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, data: Any) -> Any:
        if isinstance(data, dict):
            known = {field.alias or name for name, field in cls.model_fields.items()} | set(cls.model_fields)
            names = [field.alias or name for name, field in cls.model_fields.items()]
            for key in data:
                if key not in known:
                    hint = nearest(str(key), names) or f" (known: {', '.join(names)})"
                    raise ValueError(f"unknown key '{key}'{hint}")
        return data


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticKnownError("float_type")
    return value


def _whole(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticKnownError("int_type")
    return value


Auto = Literal["auto"]
"""To be decided by evomerge."""

Number = Annotated[float, BeforeValidator(_number)]
"""A float that `true` does not pass for."""

Whole = Annotated[int, BeforeValidator(_whole)]
"""An int that `true` does not pass for."""

Positive = Annotated[Whole, Field(gt=0)]
"""An int of at least 1."""


class _UniqueKeyLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key written twice; PyYAML silently keeps the last one."""


def _construct_mapping(loader: _UniqueKeyLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    _refuse_doubles(loader, node)
    loader.flatten_mapping(node)
    return {
        loader.construct_object(key, deep=True): loader.construct_object(value, deep=True)
        for key, value in node.value
    }


def _refuse_doubles(loader: _UniqueKeyLoader, node: yaml.MappingNode) -> None:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        merge = key_node.tag == "tag:yaml.org,2002:merge"
        key = "<<" if merge else loader.construct_object(key_node, deep=True)
        try:
            double = key in seen
        except TypeError:
            problem = f"the key {shown(key)} is not a plain value"
            raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark) from None
        if double:
            problem = f"the key '{key}' is written twice"
            raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
        seen.add(key)


_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_mapping)

# YAML 1.1 reads 1e-3 as a string; people who write configs mean a number.
_FLOAT = (
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)
_UniqueKeyLoader.add_implicit_resolver(*_FLOAT)


def parse_yaml(text: str, file: Path | str | None) -> Any:
    """Parse one YAML document with unique keys; `file` is named in errors."""
    try:
        return yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{at(file)}{line}not valid YAML: {problem}") from None
    except RecursionError:
        raise UserError(f"{at(file)}not valid YAML: brackets are nested too deeply") from None
    except (ValueError, OverflowError) as error:
        # PyYAML's own conversions: the date 2024-13-45, a number of 5000 digits.
        raise UserError(f"{at(file)}not valid YAML: {str(error).split(';')[0]}") from None


def read_text(path: Path, what: str) -> str:
    """Read a UTF-8 text file that the user named."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such {what}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: this {what} is not UTF-8 text (see byte {error.start})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot read this {what}: {error.strerror or error}") from None


def read_yaml(path: Path, what: str) -> dict[str, Any]:
    """Read a YAML mapping from a file that the user named as a `what` (config, recipe)."""
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name the {what} file inside it")
    data = parse_yaml(read_text(path, what), path)
    if data is None:
        raise UserError(f"{path}: this {what} is empty")
    if not isinstance(data, dict):
        kind = "a list" if isinstance(data, list) else f"the plain value {shown(data)}"
        raise UserError(f"{path}: a {what} is a mapping of keys to values, this is {kind}")
    return data


Model = TypeVar("Model", bound=BaseModel)


def validate(model: type[Model], data: Any, file: Path | str | None) -> Model:
    """Validate `data` against a schema; the first problem becomes one sentence."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise UserError(_sentence(error, data, file)) from None


def from_text(cls: type, data: Any, key: str, wanted: str) -> Any:
    """Return what a model that may be written as a text alone is validated from: the text under its key.

    Args:
        cls: the model's class.
        data: as given.
        key: what a text stands for.
        wanted: what to give instead, for the message.

    Raises:
        ValueError: neither a text nor a mapping.
    """
    if not isinstance(data, str | dict | cls):
        raise ValueError(f"{shown(data)} is not accepted: give {wanted}")
    return {key: data} if isinstance(data, str) else data


def shown(value: Any) -> str:
    """Return a value as it would be written in YAML, on one line, shortened."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    if isinstance(value, dict):
        text = "{" + ", ".join(f"{key}: {shown(item)}" for key, item in value.items()) + "}"
    elif isinstance(value, list | tuple):
        text = "[" + ", ".join(map(shown, value)) + "]"
    else:
        text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 80 else text[:76] + " ..."


def two_ends(ends: Any) -> Any:
    """Validate that a range, if there is one, has two ends, before they are validated themselves."""
    if ends is not None and not (isinstance(ends, list | tuple) and len(ends) == 2):
        raise ValueError(f"{shown(ends)} is not accepted: give two numbers, [low, high]")
    return ends


_WANTED = {
    "greater_than": "a number greater than {gt}",
    "greater_than_equal": "a number of at least {ge}",
    "less_than": "a number less than {lt}",
    "less_than_equal": "a number of at most {le}",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a smaller number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "string_too_short": "some text",
    "dict_type": "a mapping of keys to values",
    "model_type": "a mapping of keys to values",
    "model_attributes_type": "a mapping of keys to values",
    "list_type": "a list",
    "tuple_type": "a list",
    "too_short": "at least {min_length} entry",
    "too_long": "at most {max_length} entries",
}
"""What would be right, for each of pydantic's error types."""


def _sentence(error: ValidationError, data: Any, file: Path | str | None) -> str:
    problems = [(_path(problem["loc"], data), problem) for problem in error.errors(include_url=False)]
    # A union reports one problem per alternative: the deepest location belongs to the one that was meant.
    (keys, node), problem = max(problems, key=lambda p: (p[1]["type"] == "value_error", len(p[0][0])))
    prefix = at(file, ".".join(keys))
    if problem["type"] == "missing":
        return f"{prefix}this key is required"
    if problem["type"] in ("value_error", "assertion_error"):
        message = problem["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
        head, colon, rest = message.partition(": ")
        if keys and colon and isinstance(node, dict) and head.split(".")[0] in node:
            return f"{at(file, '.'.join([*keys, head]))}{rest}"
        return f"{prefix}{message}"
    if problem["loc"][-1] == "[key]":
        return f"{prefix}this name is not text; put it in quotes"
    wanted = [_wanted(other) for (others, _), other in problems if others == keys]
    numbers = [text for text in wanted if "finite" in text]
    fix = " or ".join(dict.fromkeys(numbers or wanted))
    value = problem["input"]
    if value is None or value in ({}, [], ()):
        return f"{prefix}is empty; give {fix}"
    return f"{prefix}{shown(value)} is not accepted: give {fix}"


def _wanted(problem: Any) -> str:
    if problem["type"] == "literal_error":
        return str(problem["ctx"]["expected"]).replace("'", "")
    if problem["type"] == "string_type" and isinstance(problem["input"], int | float):
        return "text, in quotes"
    bounds = {name: shown(bound) for name, bound in problem.get("ctx", {}).items()}
    return _WANTED.get(problem["type"], "something else").format(**bounds)


_ABSENT = object()
_ALTERNATIVES = re.compile(
    r"(float|int|bool|str|nullable|[A-Z]\w*)$|(function-\w+|tagged-union|literal|list|dict|tuple|constrained-\w+)"
    r"(\[|$)|\[key\]$"
)
"""Names of union alternatives, which pydantic mixes into a location."""


def _path(location: Sequence[int | str], data: Any) -> tuple[list[str], Any]:
    """Return a location as the keys that the user wrote, and what stands there in the user's data.

    What validators made of shorthands is left out: the list around a single mapping, the mapping around a
    plain value.
    """
    keys: list[str] = []
    node = data
    for part in location:
        if isinstance(node, dict) and part in node:
            node = node[part]
        elif isinstance(node, list) and isinstance(part, int):
            node = node[part] if part < len(node) else _ABSENT
        elif (node is not _ABSENT and isinstance(part, int)) or _ALTERNATIVES.match(str(part)):
            continue
        elif node is _ABSENT or isinstance(node, dict | list):
            node = _ABSENT
        else:
            continue
        keys.append(str(part))
    return keys, node


class _Dumper(yaml.SafeDumper):
    """SafeDumper that writes short lists and mappings of scalars on one line."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_list(dumper: yaml.SafeDumper, data: Any) -> yaml.Node:
    flow = all(isinstance(item, str | int | float | bool | type(None)) for item in data)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=flow)


def _represent_float(dumper: yaml.SafeDumper, data: float) -> yaml.Node:
    if not math.isfinite(data):
        return dumper.represent_float(data)
    text = repr(data)
    if "e" in text and "." not in text.split("e")[0]:
        text = text.replace("e", ".0e")
    return dumper.represent_scalar("tag:yaml.org,2002:float", text)


_Dumper.add_representer(list, _represent_list)
_Dumper.add_representer(tuple, _represent_list)
_Dumper.add_representer(float, _represent_float)
# So that the text 1e5 is written in quotes, and read as text again.
_Dumper.add_implicit_resolver(*_FLOAT)


def dump_yaml(data: Any) -> str:
    """Write plain data as YAML, keys in the given order, floats with all their digits."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
