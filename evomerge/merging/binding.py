"""Which part of which live parameter holds which on-disk tensor."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from evomerge.checkpoints.names import is_buffer
from evomerge.errors import CheckpointError
from evomerge.merging.plan import ModelPlan


def bind(model: nn.Module, plan: ModelPlan) -> dict[str, torch.Tensor]:
    """Return the live tensor of each of the plan's output tensors, by on-disk name.

    The names are matched as transformers does when it loads a folder; where it keeps the experts of a layer
    in one parameter, each expert's tensor is a view of its part. A tied head is bound once, under the
    embedding's name. Every element of the model's parameters and persistent buffers is covered exactly once.
    Tensors outside the language model that the live model has no place for are left out, as at loading.

    Returns:
        Contiguous views of the live storage, in the shapes of the plan's tensors.

    Raises:
        CheckpointError: a tensor without a live counterpart, a live one without a tensor, different shapes,
            or parts that are no contiguous piece of their parameter.
    """
    live: dict[str, torch.Tensor] = dict(model.named_parameters())
    persistent = model.state_dict(keep_vars=True)
    for name, buffer in model.named_buffers():
        if name in persistent and not is_buffer(name):
            live[name] = buffer
    kind = type(model).__name__
    places = _places(model, [job.name for job in plan.jobs], live)
    places = {name: p for name, p in places.items() if p.target in live or name not in plan.copied}
    missing = [name for name, place in places.items() if place.target not in live]
    if missing:
        raise CheckpointError(f"tensor '{missing[0]}' has no counterpart in {kind}{_and_more(missing)}")
    uncovered = sorted(live.keys() - {place.target for place in places.values()})
    if uncovered:
        raise CheckpointError(f"'{uncovered[0]}' of {kind} is in no checkpoint{_and_more(uncovered)}")
    shapes = {job.name: job.shape for job in plan.jobs}
    views: dict[str, torch.Tensor] = {}
    for target, members in _by_target(places).items():
        views |= _views(kind, target, live[target], members, shapes)
    return {job.name: views[job.name] for job in plan.jobs if job.name in views}


@dataclass(frozen=True)
class _Place:
    """Where transformers puts a tensor: a live tensor, and the conversion of which it is a source, if any."""

    target: str
    pattern: str | None = None
    converter: WeightConverter | None = None


def _places(model: nn.Module, names: list[str], live: dict[str, torch.Tensor]) -> dict[str, _Place]:
    if not isinstance(model, PreTrainedModel):
        return {name: _Place(name) for name in names}
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    prefix = model.base_model_prefix
    places = {}
    for name in names:
        target, pattern = rename_source_key(name, renamings, converters, prefix, live)
        if target not in live and name in live:
            target, pattern = name, None
        places[name] = _Place(target, pattern, by_pattern[pattern] if pattern is not None else None)
    return places


def _by_target(places: dict[str, _Place]) -> dict[str, dict[str, _Place]]:
    targets: dict[str, dict[str, _Place]] = defaultdict(dict)
    for name, place in places.items():
        targets[place.target][name] = place
    return targets


def _views(
    kind: str,
    target: str,
    tensor: torch.Tensor,
    members: dict[str, _Place],
    shapes: dict[str, tuple[int, ...]],
) -> dict[str, torch.Tensor]:
    """Return the part of a live tensor that belongs to each of the on-disk tensors it is made of."""
    first, place = next(iter(members.items()))
    if place.converter is None:
        if len(members) > 1:
            raise CheckpointError(f"'{target}' of {kind} has two sources: {_list(list(members))}")
        if tuple(tensor.shape) != shapes[first]:
            raise CheckpointError(
                f"tensor '{first}' has shape {shapes[first]}, {kind} built from config.json expects "
                f"{tuple(tensor.shape)}"
            )
        return {first: tensor}
    layout = _layout(place.converter)
    views = {} if layout is None else _parts(tensor, members, place.converter, shapes, layout)
    if layout is None or not all(view.is_contiguous() for view in views.values()):
        raise CheckpointError(
            f"{kind} keeps '{first}' in '{target}' in another form; scoring such a model in memory is not "
            "supported, merging it to disk is"
        )
    for name, view in views.items():
        if tuple(view.shape) != shapes[name]:
            raise CheckpointError(
                f"tensor '{name}' has shape {shapes[name]}, its part of '{target}' of {kind} built from "
                f"config.json has {tuple(view.shape)}"
            )
    if len(views) < len(members) or sum(view.numel() for view in views.values()) != tensor.numel():
        raise CheckpointError(
            f"'{target}' of {kind} built from config.json has shape {tuple(tensor.shape)}, which its "
            f"{len(members)} tensors ({_list(list(members))}) do not fill"
        )
    return views


def _layout(converter: WeightConverter) -> tuple[bool, int | None] | None:
    """Return whether experts are stacked, and the dimension along which each one's projections are joined.

    None for conversions that do more than this.
    """
    operations = list(converter.operations)
    stacked = bool(operations) and isinstance(operations[0], MergeModulelist) and operations[0].dim == 0
    match operations[stacked:]:
        case []:
            return (stacked, None) if len(converter.source_patterns) == 1 else None
        case [Concatenate() as joined]:
            return stacked, joined.dim - stacked
    return None


def _parts(
    tensor: torch.Tensor,
    members: dict[str, _Place],
    converter: WeightConverter,
    shapes: dict[str, tuple[int, ...]],
    layout: tuple[bool, int | None],
) -> dict[str, torch.Tensor]:
    """Undo a conversion by views of the live tensor; tensors for which there is no room are left out."""
    stacked, dim = layout
    views: dict[str, torch.Tensor] = {}
    starts: dict[int, int] = defaultdict(int)
    for pattern in converter.source_patterns:
        names = sorted((n for n, place in members.items() if place.pattern == pattern), key=dot_natural_key)
        for expert, name in enumerate(names[: len(tensor) if stacked else 1]):
            part = tensor[expert] if stacked else tensor
            if dim is not None and len(shapes[name]) == part.dim():
                length = min(shapes[name][dim], part.shape[dim] - starts[expert])
                part = part.narrow(dim, starts[expert], length)
                starts[expert] += length
            views[name] = part
    return views


def _list(names: list[str]) -> str:
    return ", ".join(f"'{name}'" for name in names[:3]) + (", …" if len(names) > 3 else "")


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
