#!/usr/bin/env python3
"""The quickstart search with ten seeds: how often, and by how much, the winner beats parents and average.

    .venv/bin/python scripts/build_zoo
    .venv/bin/python experiments/quickstart_seeds/run.py

Runs two searches at a time, each in one process (local workers give the same numbers as Ray workers), keeps one
line per seed in results.jsonl and writes the table in README.md. Seeds that are in results.jsonl are not repeated;
`--force` starts over.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from typing import Any

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
CONFIG = REPOSITORY / "configs" / "quickstart.yaml"
RESULTS = HERE / "results.jsonl"


def one_seed(seed: int) -> dict[str, Any]:
    """Run one search; return what the table needs."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, "-m", "evomerge", "search", str(CONFIG), "--run", str(run)]
        settings = ["--set", f"seed={seed}", "--set", "workers.type=local"]
        subprocess.run([*command, *settings], check=True, capture_output=True)
        results = json.loads((run / "results.json").read_text())
    baselines = {**results["baselines"]["experts"]}
    baselines.update({name: results["baselines"][name] for name in ("base", "uniform", "initial")})
    return {
        "seed": seed,
        "winner": results["winner"]["name"],
        "search": results["winner"]["search"]["mean"],
        "validation": results["winner"]["validation"]["mean"],
        "test": results["winner"]["test"]["mean"],
        "test_ci95": results["winner"]["test"]["ci95"],
        "baselines": {name: entry["test"]["mean"] for name, entry in baselines.items()},
        "comparisons": results["comparisons"],
        "optimism": results["optimism"],
        "optimism_best_seen": results["optimism_best_seen"],
        "candidates": results["candidates"],
        "item_evaluations": results["item_evaluations"],
        "wall_seconds": results["wall_seconds"],
        "versions": results["versions"],
        "hardware": results["hardware"],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Return the README: one line per seed, and what they say together."""
    parents = [name for name in rows[0]["baselines"] if name not in ("uniform", "initial")]
    best = max(parents, key=lambda name: rows[0]["baselines"][name])
    lines = [
        "# The quickstart search with ten seeds",
        "",
        "Made by `.venv/bin/python experiments/quickstart_seeds/run.py` after `scripts/build_zoo`; the full numbers "
        "are in `results.jsonl`. All seeds share parents and test items, so parents and averages score the same "
        "in every row: "
        + ", ".join(f"{name} {score:.3f}" for name, score in rows[0]["baselines"].items())
        + ". Another kind of processor rounds otherwise, so it trains another zoo, with slightly other numbers.",
        "",
        f"Test columns: the winner's mean over all tasks, and its paired difference to the best parent ({best}), the "
        "uniform average and the search's starting point, with simultaneous 95 % intervals.",
        "",
        f"| seed | winner | validation | test | − {best} | − uniform | − initial | best seen − test | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [
            str(row["seed"]),
            row["winner"],
            f"{row['validation']:.3f}",
            f"{row['test']:.3f}",
            *(_difference(row["comparisons"][name]) for name in (best, "uniform", "initial")),
            f"{row['optimism_best_seen']:+.3f}",
            f"{row['wall_seconds']:.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", f"Over {len(rows)} seeds:", ""]
    tests = [row["test"] for row in rows]
    lines.append(
        f"- the winner's test score is {mean(tests):.3f} on average (standard deviation {stdev(tests):.3f});"
    )
    for name in (best, "uniform", "initial"):
        deltas = [row["comparisons"][name]["delta"] for row in rows]
        resolved = sum(
            row["comparisons"][name]["resolved"] and row["comparisons"][name]["delta"] > 0 for row in rows
        )
        lines.append(
            f"- against {name}: {mean(deltas):+.3f} on average, from {min(deltas):+.3f} to {max(deltas):+.3f}; better "
            f"and resolved in {resolved} of {len(rows)};"
        )
    seen = [row["optimism_best_seen"] for row in rows]
    lines.append(
        f"- the best search score seen overstates the winner's test score by {mean(seen):+.3f} on average, the "
        f"winner's score on all search items by {mean(row['optimism'] for row in rows):+.3f}."
    )
    return "\n".join(lines) + "\n"


def _difference(comparison: dict[str, Any]) -> str:
    low, high = comparison["ci95_simultaneous"]
    mark = "" if comparison["resolved"] else " (not resolved)"
    return f"{comparison['delta']:+.3f} [{low:+.3f}, {high:+.3f}]{mark}"


def main() -> None:
    """Run the missing seeds and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--force", action="store_true")
    options = parser.parse_args()
    if options.force:
        RESULTS.unlink(missing_ok=True)
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    missing = [seed for seed in range(options.seeds) if seed not in {row["seed"] for row in rows}]
    with ThreadPoolExecutor(options.jobs) as pool:
        for row in pool.map(one_seed, missing):
            rows.append(row)
            rows.sort(key=lambda r: r["seed"])
            RESULTS.write_text("".join(json.dumps(r) + "\n" for r in rows))
            print(
                f"seed {row['seed']}: {row['winner']} {row['test']:.3f} on test, {row['wall_seconds']:.0f} s",
                flush=True,
            )
    (HERE / "README.md").write_text(table(rows))


if __name__ == "__main__":
    main()
