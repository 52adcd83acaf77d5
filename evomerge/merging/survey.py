"""What a merge must know of the whole model before it can write the first tensor: thresholds of global trims."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt
import torch

from evomerge.errors import UserError
from evomerge.merging.plan import TensorJob
from evomerge.methods import TensorCache
from evomerge.methods.operands import Operands
from evomerge.methods.reductions import digit_counts, radix_select
from evomerge.methods.ties import rank_of

Thresholds = dict[str, tuple[float, ...]]
"""By output tensor: of each input the smallest magnitude that is kept."""

Count = Callable[[Callable[[TensorJob], None], Iterable[TensorJob]], None]
"""Runs a function over jobs, in several threads."""


def global_thresholds(
    jobs: Iterable[TensorJob],
    operands_of: Callable[[TensorJob], Operands],
    run: Count,
    cache: TensorCache | None = None,
) -> Thresholds:
    """Return the thresholds of the jobs whose method trims globally.

    The tensors of one base and the same inputs belong together: each input's magnitudes are ranked over all of
    them, exactly, in two passes.

    Args:
        jobs: all of a plan's.
        operands_of: opens a job's operands; called from several threads.
        run: runs a function over jobs.
        cache: keeps thresholds.

    Raises:
        UserError: tensors that belong together have different densities, or float64 weights.
    """
    groups: dict[tuple[str | None, tuple[str, ...]], list[TensorJob]] = defaultdict(list)
    for job in jobs:
        if job.values is not None and job.values.get("trim") == "global" and job.numel:
            groups[job.base, job.inputs].append(job)
    found: Thresholds = {}
    for members in groups.values():
        densities = {job.values["density"] for job in members if job.values is not None}
        if len(densities) > 1:
            raise UserError(
                f"trim: global ranks all tensors together, but density differs between them "
                f"('{members[0].name}' and others); give each input one density, or use trim: tensor",
                key="",
            )
        each = next(iter(densities))
        assert isinstance(each, tuple)
        total = sum(job.numel for job in members)
        ranks = tuple(rank_of(density, total) for density in each)
        names = "\x1f".join(job.key for job in members)

        def build(members: list[TensorJob] = members, ranks: tuple[int, ...] = ranks) -> tuple[float, ...]:
            return tuple(_select(members, k, rank, operands_of, run) for k, rank in enumerate(ranks))

        key = ("global thresholds", names, ranks)
        thresholds = build() if cache is None else cache.get(key, build)
        found.update({job.name: thresholds for job in members})
    return found


def _select(
    members: list[TensorJob], k: int, rank: int, operands_of: Callable[[TensorJob], Operands], run: Count
) -> float:
    def counts(prefix: int, shift: int) -> npt.NDArray[np.int64]:
        parts: dict[str, npt.NDArray[np.int64]] = {}

        def count(job: TensorJob) -> None:
            operands = operands_of(job)
            if operands.dtype == torch.float64:
                raise UserError(
                    f"trim: global needs weights of 32 bits or fewer, '{job.name}' has 64; use trim: tensor",
                    key="",
                )
            parts[job.name] = digit_counts(operands, k, prefix, shift)

        run(count, members)
        total: npt.NDArray[np.int64] = np.sum(list(parts.values()), axis=0)
        return total

    return radix_select(counts, rank)
