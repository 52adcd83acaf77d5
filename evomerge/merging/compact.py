"""Loading a compact folder: what is equal in it is one tensor in memory, too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from evomerge.checkpoints.compact import open_compact
from evomerge.checkpoints.names import OUTSIDE
from evomerge.environment import prepare
from evomerge.merging.plan import ModelPlan, TensorJob
from evomerge.merging.sinks import LiveSink


def load_compact(path: Path | str, *, device: torch.device | str = "cpu") -> nn.Module:
    """Load the model of a folder that was written with `compact`.

    A layer that comes several times lies in memory once, with a place in the key-value cache for each time. The
    model computes what the ordinary checkpoint computes (`evomerge.convert` writes it), bit for bit; change
    its weights in that one.

    Args:
        path: the folder.
        device: where the model is to be.

    Returns:
        A transformers model in eval mode without gradients.

    Raises:
        CheckpointError: the folder is no compact one, is damaged, or its model type is unknown.
    """
    prepare(offline=True)
    from evomerge.merging.binding import bind
    from evomerge.merging.live import live_model
    from evomerge.merging.live_paths import SharedLayers

    folder = open_compact(path)
    infos = {name: folder.infos[stored] for name, stored in folder.tensors.items()}
    sizes: Counter[torch.dtype] = Counter()
    for info in infos.values():
        sizes[info.dtype] += info.numel
    plan = ModelPlan(
        config=folder.config,
        jobs=tuple(
            TensorJob(
                name=name,
                shape=info.shape,
                dtype=info.dtype,
                source=OUTSIDE * (name in folder.outside) + info.name,
                inputs=("",),
            )
            for name, info in infos.items()
        ),
        copied=tuple(folder.outside),
        dtype=sizes.most_common(1)[0][0],
    )

    def write(sink: LiveSink, jobs: Sequence[TensorJob]) -> None:
        for job in jobs:
            for start, piece in sink.pieces(job.name, job.numel, job.dtype, 1 << 22):
                piece.copy_(
                    folder.read(
                        job.source.removeprefix(OUTSIDE), start, torch.empty(piece.numel(), dtype=job.dtype)
                    )
                )

    if SharedLayers.can_hold(plan):
        return SharedLayers(torch.device(device)).model(plan, write, generation=folder.path, room=0)
    model = live_model(plan.config, plan.dtype, device, generation=folder.path)
    write(LiveSink(bind(model, plan)), plan.jobs)
    return model
