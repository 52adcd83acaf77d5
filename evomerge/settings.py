"""What a recipe may set a parameter to: a value, a gradient over depth, or either by tensor name.

The forms and their meaning are mergekit's. A parameter with one value per input takes them for all inputs
at once, or for each input by name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

from pydantic import PlainSerializer, PlainValidator

from evomerge.errors import nearest
from evomerge.schema import Frozen, shown

Scalar = bool | float | str
Gradient = tuple[Scalar, ...]
"""Values at equal distances of depth; numbers are interpolated, words and truth values step."""


class Filtered(Frozen):
    """A value for the tensors whose names contain `filter`, literally; None selects all."""

    filter: str | None = None
    value: Scalar | Gradient

    def matches(self, name: str) -> bool:
        """Whether the entry speaks of a tensor."""
        return self.filter is None or self.filter in name


Setting = Scalar | Gradient | tuple[Filtered, ...]
"""Of several filtered entries the first that matches holds; where none does, nothing is set."""


def read_value(data: Any) -> Setting | dict[str, Setting]:
    """Read a parameter's value from plain data; ValueError tells what is wrong, with the keys to it."""
    if not isinstance(data, Mapping) or _is_filtered(data):
        return read_setting(data)
    for name in data:
        if not isinstance(name, str):
            raise ValueError(f"the name {shown(name)} is not text; put it in quotes")
    return {name: read_setting(item, f"{name}: ") for name, item in data.items()}


def plain(value: Setting | dict[str, Setting]) -> Any:
    """Return a value as plain data, the way it is written in a file."""
    if isinstance(value, dict):
        return {name: plain(setting) for name, setting in value.items()}
    if isinstance(value, tuple):
        return [_entry(entry) if isinstance(entry, Filtered) else entry for entry in value]
    return value


Value = Annotated[Setting | dict[str, Setting], PlainValidator(read_value), PlainSerializer(plain)]
"""A parameter's value: one setting for all, or one for each input by name."""


def read_setting(data: Any, place: str = "") -> Setting:
    """Read one setting from plain data; `place` begins the messages."""
    if _is_filtered(data):
        data = [data]
    if not isinstance(data, list | tuple):
        return _scalar(data, place)
    if not data:
        raise ValueError(f"{place}is empty; give at least one value")
    kinds = {isinstance(entry, Mapping | Filtered) for entry in data}
    if len(kinds) > 1:
        raise ValueError(
            f"{place}{shown(data)} is not accepted: a list holds plain values, one after another over depth, "
            "or entries {filter: part of a name, value: ...}, not both"
        )
    if kinds == {False}:
        return tuple(_scalar(entry, place) for entry in data)
    return tuple(_filtered(entry, place) for entry in data)


def evaluate(setting: Setting, name: str, depth: float) -> Scalar | None:
    """Return the value for one tensor, or None where no filter matches.

    Args:
        setting: what is set.
        name: the tensor's name.
        depth: 0 at the first layer and for all that lies outside the layers, 1 at the last layer.
    """
    if not isinstance(setting, tuple):
        return setting
    if isinstance(setting[0], Filtered):
        entries = (entry for entry in setting if isinstance(entry, Filtered) and entry.matches(name))
        found = next(entries, None)
        return None if found is None else evaluate(found.value, name, depth)
    return _interpolate([v for v in setting if not isinstance(v, Filtered)], depth)


def depth_of(index: int, count: int) -> float:
    """Return the depth of the layer `index` among `count`: 1 if it is the only one."""
    return min(index / (count - 1), 1.0) if count > 1 else 1.0


def scalars(setting: Setting) -> Iterator[Scalar]:
    """Yield every plain value that a setting may take or interpolates between."""
    if not isinstance(setting, tuple):
        yield setting
        return
    for entry in setting:
        yield from scalars(entry.value if isinstance(entry, Filtered) else entry)


def always_set(setting: Setting) -> bool:
    """Whether every tensor gets a value."""
    if not isinstance(setting, tuple) or not isinstance(setting[0], Filtered):
        return True
    return any(isinstance(entry, Filtered) and entry.filter is None for entry in setting)


def canonical(setting: Setting) -> Any:
    """Return plain data for hashing; forms that differ stay different."""
    if not isinstance(setting, tuple):
        return setting if isinstance(setting, bool | str) else float(setting)
    if isinstance(setting[0], Filtered):
        entries = [entry for entry in setting if isinstance(entry, Filtered)]
        return {"filters": [[entry.filter, canonical(entry.value)] for entry in entries]}
    return {"gradient": [canonical(entry) for entry in setting if not isinstance(entry, Filtered)]}


def _interpolate(values: Sequence[Scalar], depth: float) -> Scalar:
    place = depth * (len(values) - 1)
    left = int(place)
    numbers = [v for v in values if not isinstance(v, bool | str)]
    if len(numbers) < len(values):
        return values[left]
    share = place - left
    return (1 - share) * numbers[left] + share * numbers[min(left + 1, len(values) - 1)]


def _is_filtered(data: Any) -> bool:
    return isinstance(data, Filtered) or (isinstance(data, Mapping) and set(data) == {"filter", "value"})


def _filtered(data: Any, place: str) -> Filtered:
    if isinstance(data, Filtered):
        return data
    for key in data:
        if key not in ("filter", "value"):
            raise ValueError(f"{place}unknown key '{key}'{nearest(str(key), ('filter', 'value'))}")
    if "value" not in data:
        raise ValueError(f"{place}{shown(data)} is not accepted: 'value' is missing")
    pattern = data.get("filter")
    if not isinstance(pattern, str | None):
        raise ValueError(f"{place}the filter {shown(pattern)} is not text; give a part of tensor names")
    value = read_setting(data["value"], place)
    if isinstance(value, tuple) and isinstance(value[0], Filtered):
        raise ValueError(f"{place}{shown(data)} is not accepted: filters cannot be nested")
    return Filtered(filter=None if pattern in (None, "", "*") else pattern, value=value)


def _entry(entry: Filtered) -> dict[str, Any]:
    value = list(entry.value) if isinstance(entry.value, tuple) else entry.value
    return {"value": value} if entry.filter is None else {"filter": entry.filter, "value": value}


def _scalar(data: Any, place: str) -> Scalar:
    if isinstance(data, bool | str):
        return data
    if not isinstance(data, int | float):
        fix = "give a value, a list of values over depth, or a list of {filter: part of a name, value: ...}"
        raise ValueError(f"{place}{'is empty;' if data is None else f'{shown(data)} is not accepted:'} {fix}")
    try:
        number = float(data)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{place}{shown(data)} is not accepted: give a finite number")
    return number
