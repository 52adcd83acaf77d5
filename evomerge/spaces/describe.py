"""Recipes as plain-text tables."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from evomerge.checkpoints.names import Position
from evomerge.recipe import Hop, Merge, Recipe
from evomerge.settings import Filtered, Setting, Value


def describe_recipe(recipe: Recipe) -> str:
    """Return a table of every parameter a recipe sets: where it holds, and each input's value."""
    parts = []
    for name, merge in recipe.merges.items():
        base = f" on {merge.base}" if merge.base else ""
        parts.append(f"{name}: {merge.method}{base} of {', '.join(merge.inputs)}")
        rows = [["*", "*", "*", *_cells(key, value, merge)] for key, value in merge.parameters.items()]
        for rule in merge.rules:
            where = [_layers(rule.layers), ", ".join(rule.roles or ["*"]), rule.tensors or "*"]
            rows += [[*where, *_cells(key, value, merge)] for key, value in rule.parameters.items()]
        parts.append(table(["layers", "roles", "tensors", "parameter", *merge.inputs], rows))
    if recipe.path is not None:
        parts.append(f"path of {len(recipe.path)} layers: {describe_path(recipe.path)}")
    return "\n".join(parts)


def describe_path(path: Sequence[Hop]) -> str:
    """Write a path as runs of layers with the scale of what enters them: ``a 0–5, b 3–7 ×1.15, a 6–11``."""
    runs: list[list[Hop]] = []
    for hop in path:
        last = runs[-1][-1] if runs else None
        follows = last is not None and (last.model, last.merge, last.layer + 1) == (
            hop.model,
            hop.merge,
            hop.layer,
        )
        if follows and hop.scale == 1 and not hop.layers:
            runs[-1].append(hop)
        else:
            runs.append([hop])
    words = []
    for run in runs:
        first, last = run[0], run[-1]
        span = str(first.layer) if first is last else f"{first.layer}–{last.layer}"
        others = "".join(f" ({name} {layer})" for name, layer in first.layers.items())
        scale = "" if first.scale == 1 else f" ×{show(first.scale)}"
        words.append(f"{first.model or first.merge} {span}{others}{scale}")
    return ", ".join(words)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Align columns of text; columns in which every row says ``*`` or ``all`` are left out."""
    keep = [i for i in range(len(head)) if any(row[i] not in ("*", "all", "") for row in rows)]
    lines = [[line[i] for i in keep] for line in (head, *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(keep))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def show(value: Setting) -> str:
    """Write a value with four significant digits, gradients as ``0.1 .. 0.9``."""
    if not isinstance(value, tuple):
        return f"{value:.4g}" if isinstance(value, float) else str(value)
    if not isinstance(value[0], Filtered):
        return " .. ".join(show(entry) for entry in value if not isinstance(entry, Filtered))
    entries = (entry for entry in value if isinstance(entry, Filtered))
    return ", ".join(f"{entry.filter or '*'}: {show(entry.value)}" for entry in entries)


def _cells(name: str, value: Value, merge: Merge) -> list[str]:
    if isinstance(value, dict):
        return [name, *(show(value[ref]) if ref in value else "-" for ref in merge.inputs)]
    return [name, *([show(value)] * len(merge.inputs))]


def _layers(layers: Sequence[Position] | None) -> str:
    """Write positions with runs of layers shortened: ``pre, 0-3, 7``."""
    if layers is None:
        return "*"
    words = []
    numbers = sorted(place for place in layers if isinstance(place, int))
    for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        members = [number for _, number in run]
        words.append(str(members[0]) if len(members) == 1 else f"{members[0]}-{members[-1]}")
    before = ["pre"] if "pre" in layers else []
    after = ["post"] if "post" in layers else []
    return ", ".join([*before, *words, *after])
