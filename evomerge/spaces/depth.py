"""Values over depth: a few control values, and what they give at every position of a model.

A model of L layers has L + 2 positions: ``pre`` (embeddings), layers 0 … L-1, ``post`` (final norm, head).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from evomerge.checkpoints.names import Position
from evomerge.settings import Scalar
from evomerge.space_config import Depth, Groups, Smooth


def positions(layers: int) -> tuple[Position, ...]:
    """Return the positions of a model in order: ``pre``, 0 … layers - 1, ``post``."""
    return ("pre", *range(layers), "post")


def check_depth(depth: Depth, layers: int) -> None:
    """Raise ValueError unless a model of `layers` layers can carry `depth`."""
    if control_count(depth, layers) > layers:
        kind, n = (
            ("groups", depth.groups)
            if isinstance(depth, Groups)
            else ("smooth", control_count(depth, layers))
        )
        raise ValueError(f"{{{kind}: {n}}} is more than the model's {layers} layers; give at most {layers}")


def control_count(depth: Depth, layers: int) -> int:
    """Return how many control values `depth` has in a model of `layers` layers."""
    if isinstance(depth, Groups):
        return depth.groups
    if isinstance(depth, Smooth):
        return depth.smooth
    return layers if depth == "layers" else 1


def control_names(depth: Depth, layers: int) -> tuple[str, ...]:
    """Name each control value by its place: ``1/2`` on a curve, ``layers 0-3``, ``layer 2``, or nothing."""
    count = control_count(depth, layers)
    if isinstance(depth, Groups):
        members = [[layer for layer in range(layers) if layer * count // layers == i] for i in range(count)]
        return tuple(
            f"layers {group[0]}-{group[-1]}" if len(group) > 1 else f"layer {group[0]}" for group in members
        )
    if isinstance(depth, Smooth):
        return tuple(f"{i + 1}/{count}" for i in range(count))
    return tuple(f"layer {i}" for i in range(layers)) if depth == "layers" else ("",)


def over_depth(
    controls: Sequence[Scalar], depth: Depth, layers: int, *, log: bool = False, integer: bool = False
) -> tuple[Scalar, ...]:
    """Return the value at each of the L + 2 positions.

    Groups are runs of consecutive layers whose sizes differ by at most one. The knots of a smooth curve lie
    at equal depths from the first to the last layer, linear in between. ``pre`` takes the first control
    value, ``post`` the last.

    Args:
        controls: `control_count` values.
        depth: how they spread.
        layers: number of layers L, at least the number of controls.
        log: interpolate the logarithm.
        integer: round what lies between the knots.
    """
    count = len(controls)
    inner: list[Scalar]
    if isinstance(depth, Smooth):
        inner = [_between(controls, layer * (count - 1), layers - 1, log, integer) for layer in range(layers)]
    elif depth == "global":
        inner = [controls[0]] * layers
    else:
        inner = [controls[layer * count // layers] for layer in range(layers)]
    return (controls[0], *inner, controls[-1])


def _between(controls: Sequence[Scalar], numerator: int, denominator: int, log: bool, integer: bool) -> float:
    """Value at the knot index numerator / denominator; exact at the knots and between equal ones."""
    knot, rest = divmod(numerator, denominator)
    left = float(controls[knot])
    if rest == 0:
        return left
    right, t = float(controls[knot + 1]), rest / denominator
    value = left * (right / left) ** t if log else left + t * (right - left)
    value = min(max(value, min(left, right)), max(left, right))
    return float(math.floor(value + 0.5)) if integer else value
