#!/usr/bin/env python3
"""What weights in the order of the CPU's matrix products save, on SmolLM2 and the suite of the French comparison.

    scripts/build_smollm2
    .venv/bin/python experiments/reordered_weights/run.py

Merges of its three experts are scored on one block of the suite in one process, with and without in turn. One line a
merge and side goes to results.jsonl; README.md's table comes from it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

os.environ.update(
    HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false"
)

from evomerge.config import load_config
from evomerge.engines import reordering
from evomerge.recipe import Merge

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from bench import Bench  # noqa: E402
from readme import put_tables  # noqa: E402

CONFIG = HERE.parents[1] / "configs" / "smollm2_crosslingual.yaml"
RESULTS = HERE / "results.jsonl"
WEIGHTS = ((1.0, 0.3, 0.0), (1.3, 0.5, 0.0), (0.5, 0.5, 0.5), (0.8, 0.2, 0.2), (0.3, 0.9, 0.3))
"""Of maths, French and ordering: texts of other lengths, so several merges."""


def recipe(bench: Bench, weights: tuple[float, ...]) -> Any:
    experts = tuple(name for name in bench.setup.sources if name != "base")
    parameters = {"weight": dict(zip(experts, weights, strict=True))}
    return bench.recipe(Merge(method="task_arithmetic", base="base", inputs=experts, parameters=parameters))


def main() -> None:
    """Measure both sides, then write the table."""
    sides: dict[str, Bench] = {}
    for name, limit in (("plain", 0), ("reordered", reordering.MOST_BYTES)):
        reordering.MOST_BYTES = limit
        sides[name] = Bench(load_config(CONFIG), CONFIG)
    lines = []
    for weights in WEIGHTS:
        scores = {}
        for name, bench in sides.items():
            block = bench.setup.blocks["search"][0]
            started = time.process_time()
            scores[name] = bench.scores(recipe(bench, weights), [block])
            seconds = time.process_time() - started
            lines.append({"weights": weights, "side": name, "cpu_seconds": round(seconds, 3)})
            print(lines[-1], flush=True)
        assert scores["plain"] == scores["reordered"], "the scores differ"
    RESULTS.write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_report(lines)


def write_report(lines: list[dict[str, Any]]) -> None:
    """Put the table between the marks of README.md."""
    spent = {
        side: [line["cpu_seconds"] for line in lines if line["side"] == side]
        for side in ("plain", "reordered")
    }
    ratios = [plain / fast for plain, fast in zip(spent["plain"], spent["reordered"], strict=True)]
    rows = [f"| {side} | {median(s):.2f} ({min(s):.2f} to {max(s):.2f}) |" for side, s in spent.items()]
    rows.append(f"| ratio | {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |")
    text = "\n".join(["| | CPU s a candidate, median (min to max) |", "|---|---|", *rows])
    put_tables(HERE / "README.md", f"\n{text}\n\n")


if __name__ == "__main__":
    main()
