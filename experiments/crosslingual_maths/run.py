#!/usr/bin/env python3
"""Maths in French from experts that were never taught it: parents, customary merges, a grid and searches compared.

    scripts/build_smollm2
    .venv/bin/python experiments/crosslingual_maths/run.py

Every search, and the grid, has the same budget of item evaluations; searches run once a seed; all models are scored on
the same test items, of which no search knew. One line a model goes to results.jsonl, and the table and the figure come
from that file (`report.py`). What is in it is not repeated, and a search that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.update(
    HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false"
)

from arms import ARMS, DEFAULTS, grid

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
CONFIG = REPOSITORY / "configs" / "smollm2_crosslingual.yaml"
RESULTS = HERE / "results.jsonl"
RUNS = REPOSITORY / "runs" / "crosslingual_maths"

CANDIDATES = 45
"""Of every search: five generations of nine."""

FINALISTS = 4
"""Grid points that meet the validation items."""


def config_of(arm: str, seed: int) -> Any:
    """Return the config of one search."""
    from evomerge.config import parse_config
    from evomerge.schema import read_yaml

    data = read_yaml(CONFIG, "config")
    data["budget"] = {"candidates": CANDIDATES}
    data["workers"] = {"type": "local"}
    data["cache"] = {"scores": str(RUNS / "scores")}
    data["seed"] = seed
    next(a for a in ARMS if a.name == arm).change(data)
    return parse_config(data, CONFIG)


def search(arm: str, seed: int) -> dict[str, Any]:
    """Run one search, or go on with it; return its winner's line."""
    import evomerge

    folder = RUNS / f"{arm.replace(' ', '_').replace(',', '')}-{seed}"
    run = evomerge.search(config_of(arm, seed), run=folder, continue_=True)
    results = run.results
    items, scores = run.items(), run.scores()
    test = set(items[items.split == "test"].id)
    won = scores[(scores.recipe == results["winner"]["hash"]) & scores.item.isin(test)]
    rows = run.candidates()
    return {
        "kind": "search",
        "name": arm,
        "seed": seed,
        "winner": results["winner"]["name"],
        "recipe": results["winner"]["recipe"],
        "search": results["winner"]["search"]["mean"],
        "validation": results["winner"]["validation"]["mean"],
        "test": packed(
            {task: dict(zip(part.item, part.raw, strict=True)) for task, part in won.groupby("task")}
        ),
        "fitness": [[int(g), f] for g, f in zip(rows.generation, rows.fitness, strict=True)],
        "baselines": _baselines(results),
        **{key: results[key] for key in ("candidates", "failed_candidates", "item_evaluations", "dimension")},
        **{key: results[key] for key in ("wall_seconds", "versions", "hardware")},
    }


def packed(table: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Return each task's scores in the order of the item ids: a string of digits where all are 0 or 1."""
    found: dict[str, Any] = {}
    for task, items in sorted(table.items()):
        values = [float(items[item]) for item in sorted(items)]
        found[task] = "".join(f"{v:.0f}" for v in values) if set(values) <= {0.0, 1.0} else values
    return found


def _baselines(results: dict[str, Any]) -> dict[str, float]:
    entries = {**results["baselines"]["experts"], **{n: results["baselines"][n] for n in ("base", "uniform")}}
    return {name: entry["validation"]["mean"] for name, entry in entries.items()}


class Bench:
    """The suite and one live model, for merges that need no search."""

    def __init__(self) -> None:
        from evomerge.searching.setup import set_up
        from evomerge.workers.worker import Worker

        self.setup = set_up(config_of("task_arithmetic", 0), file=CONFIG)
        self.weights = self.setup.suite.weights
        self.worker = Worker(self.setup.worker_spec(CONFIG))
        self.worker.prepare(self.setup.baselines["base"])

    def recipe(self, merge: Any) -> Any:
        """Return the recipe of a merge."""
        from evomerge.recipe import Output, Recipe

        recipe = Recipe(
            models=self.setup.sources,
            merges={"merge": merge},
            output=Output(tokenizer="base", chat_template="base"),
            seed=0,
        )
        return recipe.pinned({name: str(source.sha256) for name, source in self.setup.sources.items()})

    def scores(self, recipe: Any, split: str, *, at_most: int | None = None) -> tuple[float, dict[str, Any]]:
        """Return the suite's mean of values in [0, 1] and each item's raw score, of a split's first blocks."""
        from evomerge.evaluation.blocks import put_together
        from evomerge.evaluation.statistics import suite_mean
        from evomerge.workers.work import Work, WorkerLost

        table: dict[str, dict[str, Any]] = {}
        asked = 0
        for block in self.setup.blocks[split]:
            if at_most is not None and asked + len(block.items) > at_most:
                break
            asked += len(block.items)
            answer = self.worker.run(Work("", (recipe,), block))
            if isinstance(answer, WorkerLost):
                raise SystemExit(answer.reason)
            for item in put_together(block, answer.outcomes[0].parts, check_degenerate=False):
                table.setdefault(item.task, {})[item.item] = item
        values = {task: {i: s.value for i, s in part.items()} for task, part in table.items()}
        return suite_mean(values, self.weights), {
            t: {i: s.raw for i, s in p.items()} for t, p in table.items()
        }


def references(done: set[str]) -> Iterator[dict[str, Any]]:
    """Yield the lines of parents, of customary merges and of the grid's best."""
    wanted = ["base", "maths", "french", "ordering", "uniform", *DEFAULTS, "best of the grid"]
    if done >= set(wanted):
        return
    bench = Bench()
    recipes = {name: bench.setup.baselines[name] for name in wanted[:5]}
    recipes.update({name: bench.recipe(merge) for name, merge in DEFAULTS.items()})
    for name, recipe in recipes.items():
        if name not in done:
            yield _reference(bench, name, recipe)
    if "best of the grid" not in done:
        yield _best_of_grid(bench)


def _reference(bench: Bench, name: str, recipe: Any, **more: Any) -> dict[str, Any]:
    validation, _ = bench.scores(recipe, "validation")
    _, test = bench.scores(recipe, "test")
    return {
        "kind": "reference",
        "name": name,
        "validation": validation,
        "test": packed(test),
        "weights": bench.weights,
        **more,
    }


def _best_of_grid(bench: Bench) -> dict[str, Any]:
    """Score the grid on search items, its best points on the validation items, and their best on the test items."""
    recipes = {name: bench.recipe(merge) for name, merge in grid().items()}
    each = CANDIDATES * bench.setup.items_per_candidate // len(recipes)
    seen = {name: bench.scores(recipe, "search", at_most=each)[0] for name, recipe in recipes.items()}
    finalists = sorted(seen, key=lambda name: -seen[name])[:FINALISTS]
    validated = {name: bench.scores(recipes[name], "validation")[0] for name in finalists}
    best = max(validated, key=lambda name: validated[name])
    return _reference(bench, "best of the grid", recipes[best], point=best, grid=seen, items=each)


def _run(job: tuple[str, Any]) -> list[dict[str, Any]]:
    kind, argument = job
    return [search(*argument)] if kind == "search" else list(references(set(argument)))


def main() -> None:
    """Run what is missing, then write the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--only", nargs="*", help="arms to run (default: all)")
    options = parser.parse_args()
    lines = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    RUNS.mkdir(parents=True, exist_ok=True)

    def keep(new: list[dict[str, Any]]) -> None:
        for line in new:
            lines.append(line)
            with RESULTS.open("a") as out:
                out.write(json.dumps(line, ensure_ascii=False) + "\n")
            french = [int(digit) for digit in line["test"]["maths_fr"]]
            print(
                f"{line['name']} {line.get('seed', '')}: French maths {sum(french) / len(french):.3f}",
                flush=True,
            )

    found = {(line["name"], line.get("seed")) for line in lines}
    jobs: list[tuple[str, Any]] = [
        ("search", (arm.name, seed))
        for seed in range(options.seeds)
        for arm in ARMS
        if (arm.name, seed) not in found and (options.only is None or arm.name in options.only)
    ]
    jobs.append(("references", [name for name, seed in found if seed is None]))
    with get_context("spawn").Pool(options.jobs, maxtasksperchild=1) as pool:
        for new in pool.imap_unordered(_run, jobs):
            keep(new)

    from report import write_report

    write_report(lines)


if __name__ == "__main__":
    main()
