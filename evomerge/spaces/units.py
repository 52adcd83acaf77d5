"""From a parameter's own units to the optimisers' numbers in [0, 1], and back."""

from __future__ import annotations

import math
from dataclasses import replace

from evomerge.settings import Scalar
from evomerge.space_config import ParameterSpec
from evomerge.spaces.genotype import Coordinate


def make_coordinate(name: str, spec: ParameterSpec, initial: Scalar | None) -> Coordinate:
    """Return the coordinate of one searched number that starts at `initial`.

    Without one the search starts in the middle of the range (the geometric mean of a log range), or
    at the first choice.

    Raises:
        ValueError: an integer range whose ends or initial are not whole.
    """
    if spec.choices is not None:
        index = 0 if initial is None else spec.choices.index(initial)
        return Coordinate(name, "choice", 0.0, 1.0, float(index), choices=spec.choices)
    assert spec.range is not None
    low, high = spec.range
    if not spec.integer:
        unit = 0.5 if initial is None else to_unit(float(initial), low, high, spec.log)
        return Coordinate(name, "float", low, high, unit, spec.log)
    for value in (low, high, initial):
        if value is not None and not float(value).is_integer():
            raise ValueError(f"integer: {value} is not a whole number")
    coordinate = Coordinate(name, "integer", low, high, 0.5, spec.log)
    start = float(to_value(coordinate, 0.5) if initial is None else initial)
    return replace(coordinate, initial=to_unit(start, low, high, spec.log))


def to_unit(value: float, low: float, high: float, log: bool) -> float:
    """Map a value of [low, high] to [0, 1]."""
    unit = math.log(value / low) / math.log(high / low) if log else (value - low) / (high - low)
    return min(max(unit, 0.0), 1.0)


def to_value(coordinate: Coordinate, number: float) -> Scalar:
    """Return what a genotype's number stands for.

    An integer is the nearest one to the number's place in the range, halves upwards.

    Raises:
        ValueError: the number lies outside [0, 1], or is not the index of a choice.
    """
    if coordinate.kind == "choice":
        if number not in range(len(coordinate.choices)):
            raise ValueError(f"{coordinate.name}: {number!r} is not the index of a choice")
        return coordinate.choices[int(number)]
    if not 0 <= number <= 1:
        raise ValueError(f"{coordinate.name}: {number!r} lies outside [0, 1]")
    low, high = coordinate.low, coordinate.high
    value = low * (high / low) ** number if coordinate.log else low + number * (high - low)
    if coordinate.kind == "integer":
        value = float(math.floor(value + 0.5))
    return min(max(value, low), high)
