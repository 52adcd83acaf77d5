#!/usr/bin/env python3
"""Maths in French from experts that were never taught it: parents, customary merges, a grid and searches compared.

    scripts/build_smollm2
    .venv/bin/python experiments/crosslingual_maths/run.py

Every search and the grid propose as many merges and score them on as many items (plain CMA-ES: fewer merges on all
items); searches run once a seed; all models are scored on the same test items, of which no search knew. One line a
model goes to results.jsonl; README.md's table and, if matplotlib is there, french_maths.png come from that file
(`report.py`) when it is complete. What is in it is not repeated, and an interrupted search goes on where it stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.update(
    HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false"
)

from arms import ARMS, DEFAULTS, grid
from report import GRID_BEST, MAIN, PARENTS, RESULTS, TARGET, write_report

import evomerge
from evomerge.config import Config, parse_config
from evomerge.errors import UserError
from evomerge.evaluation.statistics import Table
from evomerge.recipe import Recipe
from evomerge.schema import read_yaml
from evomerge.searching.ranking import fitness_of, values_of
from evomerge.searching.setup import Setup, set_up

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from bench import Bench, packed  # noqa: E402

REPOSITORY = HERE.parents[1]
CONFIG = REPOSITORY / "configs" / "smollm2_crosslingual.yaml"
RUNS = REPOSITORY / "runs" / "crosslingual_maths"

CANDIDATES = 45
"""Of a search that scores them on blocks: five generations of nine."""

FINALISTS = 5
"""Grid points that meet the validation items, with the parents: as many as a search has of its own."""


def config_of(arm: str, seed: int) -> Config:
    """Return the config of one search."""
    data = read_yaml(CONFIG, "config")
    data["budget"] = {"candidates": CANDIDATES}
    data["workers"] = {"type": "local"}
    data["cache"] = {"scores": str(RUNS / "scores")}
    data["seed"] = seed
    next(a for a in ARMS if a.name == arm).change(data)
    return parse_config(data, CONFIG)


def search(arm: str, seed: int) -> dict[str, Any]:
    """Run one search, or go on with it; return its winner's line."""
    run = evomerge.search(config_of(arm, seed), run=folder_of(arm, seed), continue_=True, yes=True)
    results = run.results
    rows = run.candidates()
    return {
        "name": arm,
        "seed": seed,
        "winner": results["winner"]["name"],
        "recipe": _without_places(results["winner"]["recipe"]),
        "search": results["winner"]["search"]["mean"],
        "validation": results["winner"]["validation"]["mean"],
        "test": _test_scores(run, results["winner"]["hash"]),
        "fitness": [[int(g), f] for g, f in zip(rows.generation, rows.fitness, strict=True)],
        **{key: results[key] for key in ("candidates", "failed_candidates", "item_evaluations", "dimension")},
        **{key: results[key] for key in ("wall_seconds", "versions", "hardware")},
    }


def _without_places(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe whose models' folders are relative to the repository."""

    place = (REPOSITORY / "smollm2").resolve().parent

    def shortened(source: dict[str, str]) -> dict[str, str]:
        return {key: value.removeprefix(f"{place}/") for key, value in source.items()}

    return {**recipe, "models": {name: shortened(source) for name, source in recipe["models"].items()}}


def folder_of(arm: str, seed: int) -> Path:
    """Return where a search is kept."""
    return RUNS / f"{arm.replace(' ', '_').replace(',', '')}-{seed}"


def _test_scores(run: evomerge.Run, recipe: str) -> dict[str, Any]:
    items, scores = run.items(), run.scores()
    test = set(items[items.split == "test"].id)
    found = scores[(scores.recipe == recipe) & scores.item.isin(test)]
    return _by_item(
        {task: dict(zip(part.item, part.raw, strict=True)) for task, part in found.groupby("task")}
    )


def _by_item(table: Table) -> dict[str, Any]:
    """Pack scores in the order of the items' ids, so that those of two models can be paired."""
    return packed({task: dict(sorted(scores.items())) for task, scores in table.items()})


def subject(setup: Setup) -> str:
    """Return what results are of: a hash of the models and of all items."""
    models = {name: source.sha256 for name, source in setup.sources.items()}
    text = json.dumps([models, sorted(item.id for item in setup.items)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def parents(recipes: Mapping[str, Recipe]) -> Iterator[dict[str, Any]]:
    """Yield the lines of base, experts, uniform and initial, which the first search has scored."""
    run = evomerge.Run(folder_of(MAIN, 0))
    known = {**run.results["baselines"], **run.results["baselines"]["experts"]}
    for name in PARENTS:
        yield {
            "name": name,
            "validation": known[name]["validation"]["mean"],
            "test": _test_scores(run, recipes[name].hash),
        }


def reference(name: str) -> dict[str, Any]:
    """Return the line of a customary merge, or of the grid's best."""
    bench = Bench(config_of(MAIN, 0), CONFIG)
    return (
        _best_of_grid(bench) if name == GRID_BEST else _reference(bench, name, bench.recipe(DEFAULTS[name]))
    )


def _reference(bench: Bench, name: str, recipe: Recipe, **more: Any) -> dict[str, Any]:
    blocks = bench.setup.blocks
    return {
        "name": name,
        "validation": fitness_of(bench.scores(recipe, blocks["validation"]), bench.weights),
        "test": _by_item(values_of(bench.scores(recipe, blocks["test"]), raw=True)),
        **more,
    }


def _best_of_grid(bench: Bench) -> dict[str, Any]:
    """Score the grid on search items, its best points on the validation items, and their best on the test items."""
    recipes = {name: bench.recipe(merge) for name, merge in grid().items()}
    # As many points as a search has candidates, so that each answers one block, as a candidate does.
    block, validation = bench.setup.blocks["search"][0], bench.setup.blocks["validation"]
    seen = {
        name: fitness_of(bench.scores(recipe, [block]), bench.weights) for name, recipe in recipes.items()
    }
    finalists = sorted(seen, key=lambda name: -seen[name])[:FINALISTS]
    recipes = {**{name: recipes[name] for name in finalists}, **bench.setup.baselines}
    validated = {
        name: fitness_of(bench.scores(recipe, validation), bench.weights) for name, recipe in recipes.items()
    }
    best = max(validated, key=lambda name: validated[name])
    return _reference(bench, GRID_BEST, recipes[best], point=best, grid=seen, items=len(block.items))


def _run(job: tuple[Any, ...]) -> dict[str, Any] | str:
    """Return a line, or why there is none: one job that fails does not end the others."""
    try:
        return search(*job) if len(job) > 1 else reference(*job)
    except Exception as error:
        return f"{' '.join(map(str, job))} failed: {type(error).__name__}: {error}"


def main() -> int:
    """Run what is missing, then write the report if nothing is missing any more; return 1 if something failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="processes of one thread each")
    parser.add_argument(
        "--only", nargs="*", choices=[arm.name for arm in ARMS], help="searches to run (default: all)"
    )
    options = parser.parse_args()
    if options.seeds < 1 or options.jobs < 1:
        parser.error("--seeds and --jobs are at least 1")
    try:
        setup = set_up(config_of(MAIN, 0), file=CONFIG)
    except UserError as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 2
    of = subject(setup)
    lines = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    if any(line["of"] != of for line in lines):
        print(f"run.py: {RESULTS}: is of other models or tasks; remove it, and {RUNS}", file=sys.stderr)
        return 2
    RUNS.mkdir(parents=True, exist_ok=True)
    found = {(line["name"], line.get("seed")) for line in lines}

    def keep(line: dict[str, Any]) -> None:
        solved = [int(digit) for digit in line["test"][TARGET]]
        lines.append({**line, "of": of})
        found.add((line["name"], line.get("seed")))
        with RESULTS.open("a") as out:
            out.write(json.dumps(lines[-1], ensure_ascii=False) + "\n")
        print(
            f"{line['name']} {line.get('seed', '')}: French maths {sum(solved) / len(solved):.3f}", flush=True
        )

    references: list[tuple[Any, ...]] = [(name,) for name in (GRID_BEST, *DEFAULTS)]
    searches = [(arm.name, seed) for seed in range(options.seeds) for arm in ARMS]
    jobs = [job for job in references if (*job, None) not in found]
    jobs += [job for job in searches if job not in found and (not options.only or job[0] in options.only)]
    failed = False
    with get_context("spawn").Pool(options.jobs, maxtasksperchild=1) as pool:
        for line in pool.imap_unordered(_run, jobs):
            if isinstance(line, str):
                failed = True
                print(line, file=sys.stderr, flush=True)
            else:
                keep(line)
    if (MAIN, 0) in found and any((name, None) not in found for name in PARENTS):
        for line in parents(setup.baselines):
            keep(line)

    wanted = [(name, None) for name in (*PARENTS, *(name for (name,) in references))] + searches
    missing = [
        f"{name} {seed}" if seed is not None else name for name, seed in wanted if (name, seed) not in found
    ]
    if missing:
        print(f"no report yet: {', '.join(missing)} missing")
    else:
        write_report(lines)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
