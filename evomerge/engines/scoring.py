"""Log-probabilities of continuations, batch by batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from evomerge.engines.live import LiveModel
from evomerge.engines.packing import ScoreBatch
from evomerge.engines.prefixes import Prefixes


def score_all(
    live: LiveModel, prefixes: Prefixes, batches: Sequence[ScoreBatch], count: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Return each request's log-probability (float64 sums of float32) and whether it is greedy.

    Args:
        live, prefixes: the model, and what of it is kept.
        batches: of all requests.
        count: how many requests there are.
    """
    sums = np.zeros(count)
    greedy = np.ones(count, dtype=bool)
    # One transfer at the end: nothing waits for the device in between.
    parts = []
    for batch in batches:
        parts.append(score_batch(live, prefixes, batch))
        live.listener(len(batch.requests))
    if not parts:
        return sums, greedy
    logprobs = torch.cat([part[0] for part in parts]).double().cpu().numpy()
    chosen = torch.cat([part[1] for part in parts]).cpu().numpy()
    offsets = np.cumsum([0, *(len(part[0]) for part in parts)])
    for batch, begin, end in zip(batches, offsets, offsets[1:], strict=False):
        numbers = np.array(batch.requests)
        sums[numbers] = np.add.reduceat(logprobs[begin:end], batch.starts)
        greedy[numbers] = np.logical_and.reduceat(chosen[begin:end], batch.starts)
    return sums, greedy


def score_batch(live: LiveModel, prefixes: Prefixes, batch: ScoreBatch) -> tuple[Tensor, Tensor]:
    """Return the targets' float32 log-probabilities, and whether each is the most probable token."""
    if not live.splits_head:
        logits = live.logits(batch.inputs.ids_BL)
        return _pick(logits.flatten(0, 1)[batch.scored_N], batch.targets_N)
    hidden = live.hidden(batch.inputs, prefixes.of(batch.inputs.prefix))
    parts = live.head_in_parts(hidden.flatten(0, 1)[batch.scored_N])
    targets = torch.split(batch.targets_N, len(parts[0]))
    picked = [_pick(live.head(part), target) for part, target in zip(parts, targets, strict=True)]
    return torch.cat([p[0] for p in picked]), torch.cat([p[1] for p in picked])


def _pick(logits_NV: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """Return the targets' float32 log-probabilities and whether each is the argmax."""
    logits_NV = logits_NV.float()
    target_N = logits_NV.gather(1, targets_N[:, None]).squeeze(1)
    return target_N - logits_NV.logsumexp(1), logits_NV.argmax(1) == targets_N
