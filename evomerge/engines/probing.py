"""How many tokens a forward pass may have: tried once, with a model of the same shape and any weights."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from evomerge.losses import loss

SMALLEST, LARGEST = 1024, 65536
"""The budgets that are tried on a GPU: powers of two from here to here."""
_MARGIN = 0.85
_SECONDS = 600


def largest_that_fits(fits: Callable[[int], bool], largest: int = LARGEST) -> int:
    """Return the largest power of two from `SMALLEST` to `largest` that fits, or `SMALLEST`."""
    budget = SMALLEST
    while budget < largest and fits(2 * budget):
        budget *= 2
    return budget


def probe_batch_tokens(
    model: str,
    *,
    dtype: str,
    device: str,
    longest: int,
    max_length: int,
    share: float = 1.0,
    kept: int = 0,
    largest: int = LARGEST,
) -> int | None:
    """Find the token budget of one forward pass in a process of its own, which leaves nothing on the device.

    Args:
        model: folder with the model's config.
        dtype: number format of the live model.
        device: where it will be.
        longest: tokens of the suite's longest text.
        max_length: longest input of the model.
        share: how much of the device's memory a worker has.
        kept: bytes that an engine may keep besides prefixes and growing texts.
        largest: budget to try.

    Returns:
        The budget, or None if the process could not find one.
    """
    task = {
        "model": model, "dtype": dtype, "device": device, "longest": longest, "max_length": max_length,
        "share": share, "kept": kept, "largest": largest,
    }  # fmt: skip
    command = [sys.executable, "-m", "evomerge.engines.probing", json.dumps(task)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=True)
        return int(done.stdout.splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def _probe(task: dict[str, Any]) -> int:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from evomerge.engines.generation import SLOT_BYTES
    from evomerge.engines.live import LiveModel
    from evomerge.engines.prefixes import KEPT_BYTES
    from evomerge.engines.trials import try_savings

    device = torch.device(task["device"])
    config = AutoConfig.from_pretrained(task["model"])
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, task["dtype"]))
    live = LiveModel(model, device, task["max_length"])
    try_savings(live)
    room = None
    if device.type == "cuda":
        room = _MARGIN * task["share"] * torch.cuda.mem_get_info(device)[1]
        # What prefixes and growing texts may hold while a batch is computed.
        room -= KEPT_BYTES + SLOT_BYTES["cuda"] + task["kept"]
    return largest_that_fits(
        lambda budget: fits(live, budget, longest=task["longest"], room=room), task["largest"]
    )


def fits(live: Any, budget: int, *, longest: int, room: float | None) -> bool:
    """Whether batches of a token budget fit, at their worst: every position scored, one long text a row.

    Args:
        live: the model.
        budget: tokens.
        longest: tokens of the longest text.
        room: bytes that the device may hold meanwhile; None: as many as there are.
    """
    import torch

    from evomerge.engines.packing import pack_scores
    from evomerge.engines.prefixes import Prefixes
    from evomerge.engines.scoring import score_batch

    try:
        if live.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(live.device)
        with torch.inference_mode():
            # Long texts alone, and short ones that share rows behind masks.
            for length, tree in (
                (min(longest, live.max_length), False),
                (min(64, live.max_length), live.forks),
            ):
                texts = [([*divmod(number, 50)], [7] * length) for number in range(max(1, budget // length))]
                for batch in pack_scores(
                    texts, batch_tokens=budget, max_length=live.max_length, tree=tree, device=live.device
                ):
                    score_batch(live, Prefixes(live), batch)
        return room is None or torch.cuda.max_memory_reserved(live.device) <= room
    except Exception as error:
        if loss(error) is None:
            raise
        return False


if __name__ == "__main__":
    print(_probe(json.loads(sys.argv[1])))
