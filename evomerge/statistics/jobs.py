"""Which statistic belongs to each input of one tensor's merge."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from evomerge.checkpoints import Checkpoint
from evomerge.checkpoints.aligned import AlignedCheckpoint
from evomerge.methods.statistics import Statistic
from evomerge.statistics.files import Source, with_rows

if TYPE_CHECKING:
    from evomerge.merging.plan import MergePlan, TensorJob


def statistics_of(
    job: TensorJob, parents: Mapping[str, Checkpoint], opened: Mapping[str, Source]
) -> list[Statistic] | None:
    """Return each input's statistic of a tensor; None where one of them has none.

    Args:
        job: of the tensor.
        parents: its models, by name, as the job reads them.
        opened: the statistics that jobs name, by key.
    """
    found = [
        _statistic(opened[key], parents[model], job.source_in(model))
        for key, model in zip(job.statistics, job.inputs, strict=False)
    ]
    known = [statistic for statistic in found if statistic is not None]
    return known if known and len(known) == len(job.inputs) else None


def _statistic(source: Source, parent: Checkpoint, name: str) -> Statistic | None:
    """Return a statistic with its rows in the order in which the parent's are read."""
    if not isinstance(parent, AlignedCheckpoint):
        return source.of(name)
    statistic, alignment = source.of(parent.sources[name]), parent.alignments.get(name)
    if statistic is None or alignment is None:
        return statistic
    own = alignment.own.copy()
    own[alignment.tokens :] = -1
    return with_rows(statistic, own, math.prod(parent.tensors[name].shape[1:]))


def without_statistics(
    plan: MergePlan, checkpoints: Mapping[str, Checkpoint], opened: Mapping[str, Source]
) -> tuple[str, ...]:
    """Tell which linear layers of mixtures are averaged because no token was routed to them."""
    missing = [
        job.name
        for job in plan.jobs
        if job.statistics and ".experts." in job.name and statistics_of(job, checkpoints, opened) is None
    ]
    if not missing:
        return ()
    return (
        f"{len(missing)} tensors of experts that saw no token of the texts are averaged, among them "
        f"'{missing[0]}'; more texts would reach them",
    )
