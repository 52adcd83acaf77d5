"""Which live parameter holds which on-disk tensor."""

from __future__ import annotations

import torch
from torch import nn

from evomerge.checkpoints.names import is_buffer
from evomerge.errors import CheckpointError
from evomerge.merging.plan import MergePlan


def bind(model: nn.Module, plan: MergePlan) -> dict[str, torch.Tensor]:
    """Return the live tensor of each of the plan's output tensors, by canonical on-disk name.

    A tied head is bound once, under the embedding's name. Every parameter and persistent buffer of the model
    is covered exactly once.

    Raises:
        CheckpointError: a tensor without a live counterpart, a live one without a tensor, different shapes,
            or experts that the live model keeps fused in one tensor.
    """
    live: dict[str, torch.Tensor] = dict(model.named_parameters())
    persistent = model.state_dict(keep_vars=True)
    for name, buffer in model.named_buffers():
        if name in persistent and not is_buffer(name):
            live[name] = buffer
    missing = [job.name for job in plan.jobs if job.name not in live]
    uncovered = sorted(live.keys() - {job.name for job in plan.jobs})
    kind = type(model).__name__
    fused = next((name for name in uncovered if ".experts." in name), None)
    if fused is not None and any(".experts." in name for name in missing):
        raise CheckpointError(
            f"'{fused}' of {kind} holds all experts fused in one tensor; scoring such a model in memory is "
            "not supported, merging it to disk is"
        )
    if missing:
        raise CheckpointError(f"tensor '{missing[0]}' has no counterpart in {kind}{_and_more(missing)}")
    if uncovered:
        raise CheckpointError(f"'{uncovered[0]}' of {kind} is in no checkpoint{_and_more(uncovered)}")
    for job in plan.jobs:
        if tuple(live[job.name].shape) != job.shape:
            raise CheckpointError(
                f"tensor '{job.name}' has shape {job.shape}, {kind} built from config.json expects "
                f"{tuple(live[job.name].shape)}"
            )
    return {job.name: live[job.name] for job in plan.jobs}


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
