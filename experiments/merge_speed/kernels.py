#!/usr/bin/env python3
"""The kernels alone, one thread, against the least time in which their bytes can be moved.

    .venv/bin/python experiments/merge_speed/kernels.py

bfloat16 operands of 16 Mi elements in memory. The bound counts the bytes that a method must read and write (methods
that need a reduction first read twice), at the rate at which one thread copies between two buffers. Prints the table
of README.md.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import torch

from evomerge.methods import MaskKey, TensorMerge
from evomerge.methods.native import loader

N = 1 << 24
METHODS: list[tuple[str, int, bool, dict[str, Any], int]] = [
    # name, inputs, base, parameters, bytes an element
    ("linear", 3, False, {"weight": 0.3}, 8),
    ("task_arithmetic", 3, True, {"weight": 0.3}, 10),
    ("slerp", 2, False, {"t": 0.4}, 10),
    ("dare_linear", 3, True, {"weight": 0.3, "density": 0.5}, 10),
    ("ties", 3, True, {"weight": 0.3, "density": 0.2}, 18),
    ("dare_ties", 3, True, {"weight": 0.3, "density": 0.5}, 10),
]


def least(work: Callable[[], Any], repeats: int = 5) -> float:
    """Return the fewest CPU nanoseconds an element of several runs."""
    best = float("inf")
    for _ in range(repeats):
        started = time.process_time()
        work()
        best = min(best, time.process_time() - started)
    return best / N * 1e9


def main() -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    base = 0.02 * torch.randn(N, generator=generator)
    inputs = [(base + 0.001 * torch.randn(N, generator=generator)).bfloat16() for _ in range(3)]
    base = base.bfloat16()
    out = torch.empty(N, dtype=torch.bfloat16)
    key = MaskKey(seed=0, experts=("a", "b", "c"), tensor="w")
    rate = 4 / least(lambda: out.copy_(base))
    print(f"One thread moves {rate:.1f} GB/s in a bfloat16 copy (bytes read and written).\n")
    print(
        "| method | inputs | bound, ns an element | C kernels | of the bound | plain torch | of the bound |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, count, has_base, values, nbytes in METHODS:
        bound = nbytes / rate
        times = []
        for switch in ("1", "0"):
            os.environ[loader.SWITCH] = switch
            loader.library.cache_clear()

            def merge(
                name: str = name, count: int = count, has_base: bool = has_base, values: Any = values
            ) -> None:
                experts = inputs[:count]
                TensorMerge(name, base if has_base else None, experts, values, masks=key).write(0, N, out)

            times.append(least(merge, 5 if switch == "1" else 2))
        ours, plain = times
        cells = [name, count, *(f"{x:.2f}" for x in (bound, ours)), f"{ours / bound:.1f}×"]
        print(" | ".join(["", *map(str, cells), f"{plain:.2f}", f"{plain / bound:.1f}×", ""]).strip())


if __name__ == "__main__":
    main()
