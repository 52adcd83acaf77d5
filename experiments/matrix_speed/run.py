"""Seconds that the methods of dense linear algebra take for one matrix: a table in Markdown on stdout."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import torch

from evomerge.methods import MaskKey, merge_chunks

METHODS = {
    "iso_c": ("iso_c", {}),
    "iso_cts": ("iso_cts", {}),
    "tsv_m": ("tsv_m", {}),
    "knots (ties)": ("knots", {}),
    "wudi, closed form": ("wudi", {"solver": "closed_form"}),
    "wudi, 10 steps of adam": ("wudi", {"steps": 10}),
    "wudi, 30 steps of adam": ("wudi", {"steps": 30}),
}
MASKS = MaskKey(seed=0, experts=("a", "b", "c"), tensor="t")


def experts(n: int, rank: int | None) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return a base and three experts: bfloat16 and changed everywhere, or float32 and changed by LoRA."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    base = 0.02 * draw(n, n)
    if rank is None:
        return base.bfloat16(), [(base + 1e-3 * draw(n, n)).bfloat16() for _ in range(3)]
    return base, [base + 1e-3 * draw(n, rank) @ draw(rank, n) for _ in range(3)]


def seconds(
    method: str, values: dict[str, float | str], base: torch.Tensor, inputs: Sequence[torch.Tensor]
) -> float:
    """Return the processor time of one merge."""
    before = time.process_time()
    for _ in merge_chunks(method, base, inputs, values, masks=MASKS):
        pass
    return time.process_time() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048])
    parser.add_argument("--rank", type=int, default=16, help="of the LoRA experts")
    options = parser.parse_args()
    torch.set_num_threads(1)
    kinds = [(n, rank) for n in options.sizes for rank in (None, options.rank)]
    print(
        "| method |",
        " | ".join(f"{n}², {'full rank' if rank is None else f'LoRA {rank}'}" for n, rank in kinds),
        "|",
    )
    print("|---|" + "---|" * len(kinds))
    times = {}
    for n, rank in kinds:
        base, inputs = experts(n, rank)
        seconds("iso_c", {}, *experts(64, None))
        for label, (method, values) in METHODS.items():
            times[label, n, rank] = seconds(method, values, base, inputs)
    for label in METHODS:
        print(f"| {label} |", " | ".join(f"{times[label, n, rank]:.2f}" for n, rank in kinds), "|")


if __name__ == "__main__":
    main()
