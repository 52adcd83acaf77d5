"""Trials that show, on the given model, which savings change nothing but rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from evomerge.engines.generation import Decoder
from evomerge.engines.hops import SharedHops
from evomerge.engines.live import SLIDING, LiveModel
from evomerge.engines.packing import Inputs, pack_prompts, pack_scores
from evomerge.engines.prefixes import Prefixes
from evomerge.engines.reordering import ReorderedWeights
from evomerge.engines.scoring import score_batch
from evomerge.errors import CandidateFailed
from evomerge.losses import loss

if TYPE_CHECKING:
    from evomerge.merging.live_paths import LivePath

_SHARED = 24
_ROWS = (1, 5, 24, 64, 130, 512)
_WINDOW = 5


def try_savings(live: LiveModel) -> None:
    """Find out what of the model's parts may be used, and say so in `live`.

    The LM head at chosen positions; then masks, prefixes and growing texts of our own, all or none.

    Raises:
        CandidateFailed: the model's logits are not finite, so that the trial says nothing.
    """
    live.splits_head = _holds(lambda: _head_is_known(live))
    live.forks = live.splits_head and live.windows is not None and _holds(lambda: _states_are_known(live))


def try_hops(live: LiveModel, path: LivePath) -> None:
    """Find out whether a path's first layers may be left out where their outcome is known, and say so in `live`."""
    if live.hops.on and live.hops.works is None:
        live.hops.works = live.splits_head and _holds(lambda: _hops_are_known(live, path))


def try_reordering(live: LiveModel, reordered: ReorderedWeights) -> None:
    """Find out whether reordered weights give a model's own logits, bit for bit, and say so in `reordered`."""
    reordered.works = reordered.possible and _holds(lambda: _reordering_is_exact(live, reordered))
    reordered.forget()


def _holds(trial: Callable[[], bool]) -> bool:
    """Whether a trial succeeds; one that raises does not, unless the engine is lost with it."""
    try:
        with torch.inference_mode():
            return trial()
    except CandidateFailed:
        raise
    except Exception as error:
        if loss(error) is not None:
            raise
        return False


def _head_is_known(live: LiveModel) -> bool:
    """Whether logits are the output embedding of the last hidden state, and what the config says of it."""
    ids_BL = torch.arange(1, 6, device=live.device)[None]
    whole = live.logits(ids_BL)
    if not torch.isfinite(whole).all():
        raise CandidateFailed("a logit is not finite")
    return bool(torch.equal(live.head(live.hidden(Inputs((), ids_BL))), whole))


def _states_are_known(live: LiveModel) -> bool:
    """Whether texts behind one prefix, in one row, and as they grow get the logits that they get alone."""
    with _short_window(live):
        shared = [1 + 5 * i % 31 for i in range(_SHARED)]
        pairs = [
            ([*shared, 2, 3], [4, 5, 6, 7]),
            ([*shared, 2, 3], [5, 4, 7]),
            ([*shared, 3, 9, 8, 7, 6, 5], [9, 9]),
        ]
        prefixes = Prefixes(live)
        states = [state for pair in prefixes.of(tuple(shared)) or () for state in pair]
        live.layer_bytes = -(-sum(state.nbytes for state in states) // (_SHARED * live.depth))
        batches = pack_scores(
            pairs, batch_tokens=64, max_length=live.max_length, tree=True, device=live.device
        )
        if len(batches) != 1 or len(batches[0].inputs.prefix) != _SHARED:
            return False
        scored = dict.fromkeys(batches[0].requests, 0.0)
        logprobs = score_batch(live, prefixes, batches[0])[0].double()
        ends = [*batches[0].starts[1:], len(logprobs)]
        for request, begin, end in zip(batches[0].requests, batches[0].starts, ends, strict=True):
            scored[request] = float(logprobs[begin:end].sum())
        alone = [_logprobs(live, [*context, *rest])[len(context) - 1 :] for context, rest in pairs]
        expected = [
            float(rows.gather(1, torch.tensor(rest, device=rows.device)[:, None]).sum())
            for rows, (_, rest) in zip(alone, pairs, strict=True)
        ]
        if not _close(
            torch.tensor([scored[i] for i in range(3)]), torch.tensor(expected), torch.finfo(live.dtype).eps
        ):
            return False

        prompts = [pairs[0][0], pairs[2][0]]
        (batch,) = pack_prompts(prompts, batch_tokens=64, most=2, device=live.device)
        decoder = Decoder(live, prefixes, rows=3)
        steps = [decoder.admit(batch)]
        new = [[7, 8, 9], [3, 2, 1]]
        for step in range(3):
            decoder.force(torch.tensor([new[n][step] for n in batch.requests], device=live.device))
            steps.append(decoder.step())
        for row, number in enumerate(batch.requests):
            grown = torch.stack([logits[row] for logits in steps]).double().log_softmax(-1)
            text = _logprobs(live, [*prompts[number], *new[number]])[len(prompts[number]) - 1 :]
            if not _close(grown, text, torch.finfo(live.dtype).eps):
                return False
    return True


def _hops_are_known(live: LiveModel, path: LivePath) -> bool:
    """Whether hidden states, keys and values are the same bits, however many of the first layers are left out."""
    inputs = Inputs((), torch.arange(1, 6, device=live.device)[None])
    own, depth = live.hops, len(path.layers)
    try:
        live.hops = SharedHops()
        expected, pairs = live.hidden_and_added(inputs, None)
        for hops in sorted({1, depth // 2, depth - 1, depth} - {0}):
            live.hops = SharedHops(budget=2**40)
            live.hops.begin(path, [hops])
            for known in (0, hops):
                before = live.hops.saved
                hidden, added = live.hidden_and_added(inputs, None)
                if live.hops.saved - before != known * inputs.ids_BL.numel() or len(added) != len(pairs):
                    return False
                ours = [hidden, *(state for pair in added for state in pair)]
                theirs = [expected, *(state for pair in pairs for state in pair)]
                if not all(map(torch.equal, ours, theirs)):
                    return False
    finally:
        live.hops = own
    return True


def _reordering_is_exact(live: LiveModel, reordered: ReorderedWeights) -> bool:
    """Whether logits are the same bits for few rows and for many, which are multiplied in different ways."""
    for length in (n for n in _ROWS if n <= live.max_length):
        ids_BL = (torch.arange(length, device=live.device) * 5 % 31)[None]
        plain = live.logits(ids_BL)
        with reordered.used():
            if not torch.equal(live.logits(ids_BL), plain):
                return False
    return True


def _logprobs(live: LiveModel, tokens: list[int]) -> Tensor:
    return live.logits(torch.tensor([tokens], device=live.device))[0].double().log_softmax(-1)


def _close(ours: Tensor, theirs: Tensor, eps: float) -> bool:
    # Far above rounding, far below what a wrong mask does.
    tolerance = eps**0.5 * max(1.0, float(theirs.abs().max()))
    return bool(torch.allclose(ours.to(theirs), theirs, rtol=0, atol=tolerance))


@contextmanager
def _short_window(live: LiveModel) -> Iterator[None]:
    """Let a model with a sliding window look back a few tokens only, so that a short text crosses it."""
    if live.windows is None or live.windows.get(SLIDING) is None:
        yield
        return
    windows, own = live.windows, live.config.sliding_window
    try:
        live.config.sliding_window = min(own, _WINDOW)
        live.windows = {kind: window and min(own, _WINDOW) for kind, window in windows.items()}
        yield
    finally:
        live.windows, live.config.sliding_window = windows, own
