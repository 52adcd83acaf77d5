"""results.json: what was found, against what, and how sure one can be."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from evomerge import __version__
from evomerge.evaluation.items import RAW, Block, ItemScore, truncated_share
from evomerge.evaluation.statistics import Score, compare_all, minimum_detectable_effect, score
from evomerge.layers_config import MERGED
from evomerge.recipe import Recipe
from evomerge.searching.progress import evaluations, prefix_sharing
from evomerge.searching.ranking import fitness_of, values_of
from evomerge.searching.rundir import RESULTS, write_json
from evomerge.searching.scheduler import Scheduler
from evomerge.searching.store import Store
from evomerge.spaces import undefined_baselines

if TYPE_CHECKING:
    from evomerge.searching.setup import Setup

SCHEMA = 1
PACKAGES = ("torch", "transformers", "lm-eval", "cma", "cmaes", "optuna", "ray", "numpy")


def write_results(folder: Path, store: Store, setup: Setup, scheduler: Scheduler) -> dict[str, Any]:
    """Build results.json from the run's database and write it."""
    results = build_results(store, setup, scheduler)
    write_json(folder / RESULTS, results)
    return results


def build_results(store: Store, setup: Setup, scheduler: Scheduler) -> dict[str, Any]:
    """Return results.json's content for the latest winner; keys as in the documentation."""
    weights = setup.suite.weights
    raw = setup.suite.units == RAW
    seed = setup.config.seed
    digest, name = store.winner() or ("", "")
    winner = store.recipe(digest)

    def measured(recipe: Recipe, blocks: Sequence[Block]) -> Any:
        table = scheduler.table(recipe, blocks)
        if isinstance(table, str):
            return table
        return {task.name: table[task.name] for task in setup.suite.tasks}

    def reported(recipe: Recipe, split: str) -> dict[str, Any]:
        table = measured(recipe, setup.blocks[split])  # type: ignore[index]
        if isinstance(table, str):
            return {"failed": table}
        return score_dict(score(values_of(table, raw=raw), weights, seed=seed), table)

    baselines: dict[str, Any] = {"base": None, "initial": None, "uniform": None, "experts": {}}
    if setup.paths is not None:
        baselines[MERGED] = None
    for baseline, recipe in setup.baselines.items():
        entry = {split: reported(recipe, split) for split in ("validation", "test")}
        if baseline in baselines:
            baselines[baseline] = entry
        else:
            baselines["experts"][baseline] = entry
    for baseline, reason in undefined_baselines(setup.config).items():
        baselines[f"{baseline}_reason"] = reason

    tests = {name: measured(recipe, setup.blocks["test"]) for name, recipe in setup.baselines.items()}
    tests = {name: values_of(t, raw=raw) for name, t in tests.items() if not isinstance(t, str)}
    won = measured(winner, setup.blocks["test"])
    comparisons = (
        {} if isinstance(won, str) else compare_all(values_of(won, raw=raw), tests, weights, seed=seed)
    )
    scores = {split: reported(winner, split) for split in ("search", "validation", "test")}
    candidates = store.candidates()
    best_seen = max((row.fitness for row in candidates if row.fitness is not None), default=None)
    counts, layers = store.counts(), store.layer_evaluations()
    search_items = len(setup.suite.items("search"))
    per_task = {task.name: len(_task_items(setup, task.name, "test")) for task in setup.suite.tasks}
    return {
        "schema": SCHEMA,
        "name": setup.config.name,
        "units": setup.suite.units,
        "winner": {"name": name, "hash": digest, "recipe": winner.to_dict(), **scores},
        "baselines": baselines,
        "comparisons": {
            baseline: {
                "delta": c.delta,
                "ci95": list(c.ci95),
                "ci95_simultaneous": list(c.ci95_simultaneous or c.ci95),
                "n": c.n,
                "resolved": c.resolved,
                "needed_n": c.needed_items,
            }
            for baseline, c in comparisons.items()
        },
        "optimism": _difference(scores["search"], scores["test"]),
        "optimism_best_seen": None
        if best_seen is None or isinstance(won, str)
        else best_seen - fitness_of(won, weights),
        "candidates": counts["candidates"],
        "failed_candidates": counts["failed"],
        "screened_candidates": counts["screened"],
        "dimension": setup.dimension,
        "item_evaluations": counts["item_evaluations"],
        "cached_item_evaluations": counts["cached_item_evaluations"],
        "layer_evaluations": layers.computed,
        "saved_layer_evaluations": layers.saved,
        "full_item_evaluations": len(candidates) * search_items,
        "minimum_detectable_effect": minimum_detectable_effect(per_task, weights),
        "test_openings": store.test_openings(),
        "merge_seconds": round(store.seconds()[0], 3),
        "score_seconds": round(store.seconds()[1], 3),
        "wall_seconds": round(float(store.meta("wall_seconds", 0.0)), 3),
        "seed": seed,
        "engine": store.meta("fingerprint"),
        "versions": versions(),
        "hardware": hardware(setup.config.engine.device),
        "splits_sha256": store.meta("splits"),
    }


def score_dict(value: Score, table: Mapping[str, Mapping[str, ItemScore]]) -> dict[str, Any]:
    """Return a score as plain data, with what else there is to know of each task.

    That is the mean in its metric's own units (`raw`, even where the score is of values in [0, 1]), and the share of
    its generated answers that were cut at their limit (`truncated`).

    Args:
        value: the score.
        table: task → item id → what it is the score of.
    """
    return {
        "mean": value.mean,
        "ci95": list(value.ci95),
        "n": value.n,
        "tasks": {
            name: {
                "mean": task.mean,
                "ci95": list(task.ci95),
                "n": task.n,
                "raw": fmean(score.raw for score in table[name].values()),
                "truncated": truncated_share(table[name].values()),
            }
            for name, task in value.tasks.items()
        },
    }


def versions() -> dict[str, str]:
    """Return the versions of what decides the numbers."""
    found = {"evomerge": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def hardware(device: str) -> dict[str, Any]:
    """Return what kind of machine scored."""
    facts: dict[str, Any] = {"device": device, "machine": platform.machine(), "cpus": os.cpu_count()}
    if device.startswith("cuda"):
        import torch

        facts["gpu"] = torch.cuda.get_device_name(0)
    return facts


def verdict(results: Mapping[str, Any]) -> str:
    """Return one sentence: how the winner does on items that the search never saw."""
    winner = results["winner"]
    test = winner["test"]
    if "failed" in test:
        return f"The winner ({winner['name']}) could not be scored on the test items: {test['failed']}"
    parents = {"base": results["baselines"]["base"], **results["baselines"]["experts"]}
    scored = {name: entry["test"]["mean"] for name, entry in parents.items() if "mean" in entry["test"]}
    parts = []
    if scored:
        best = max(scored, key=lambda name: scored[name])
        parts.append(_against(results, best, f"the best parent ({best})"))
    for name, words in (("uniform", "the uniform average"), (MERGED, "the winner of the coefficients")):
        if name in results["comparisons"]:
            parts.append(_against(results, name, words))
    low, high = test["ci95"]
    return (
        f"On {test['n']} test items that the search never saw, the winner ({winner['name']}) scores "
        f"{test['mean']:.3f} [{low:.3f}, {high:.3f}]"
        + (", " if parts else "")
        + ", ".join(parts[:-1])
        + (" and " if parts[1:] else "")
        + "".join(parts[-1:])
        + "."
    )


def _against(results: Mapping[str, Any], name: str, words: str) -> str:
    comparison = results["comparisons"].get(name)
    if comparison is None:
        return f"not comparable with {words}"
    low, high = comparison["ci95_simultaneous"]
    if low == high == 0.0:
        return f"the same as {words}"
    better = "better" if comparison["delta"] >= 0 else "worse"
    by = f"{abs(comparison['delta']):.3f} {better} than" if comparison["delta"] else "level with"
    text = f"{by} {words} [{low:+.3f}, {high:+.3f}]"
    if comparison["resolved"]:
        return text
    needed = comparison["needed_n"]
    return text + (f" (not resolved; it would take about {needed} items)" if needed else " (not resolved)")


def _difference(left: Mapping[str, Any], right: Mapping[str, Any]) -> float | None:
    return left["mean"] - right["mean"] if "mean" in left and "mean" in right else None


def _task_items(setup: Setup, task: str, split: str) -> list[str]:
    return [item.id for item in setup.suite.items(split) if item.task == task]  # type: ignore[arg-type]


def summary(results: Mapping[str, Any]) -> str:
    """Return the results as a table of everybody on test, and the verdict."""
    entries = {"winner": results["winner"], "base": results["baselines"]["base"]}
    entries.update(results["baselines"]["experts"])
    entries.update({name: results["baselines"].get(name) for name in ("uniform", "initial", MERGED)})
    lines = [
        "",
        f"{'':<14} {'validation':>10} {'test':>7}  {'95 % interval':<16} winner − it [simultaneous 95 %]",
    ]
    for name, entry in entries.items():
        if entry is None:
            continue
        if "failed" in entry["test"]:
            lines.append(f"{name:<14} failed: {entry['test']['failed']}")
            continue
        low, high = entry["test"]["ci95"]
        validation = entry["validation"].get("mean", float("nan"))
        line = f"{name:<14} {validation:>10.3f} {entry['test']['mean']:>7.3f}  [{low:.3f}, {high:.3f}] "
        comparison = results["comparisons"].get(name)
        if comparison is not None:
            low, high = comparison["ci95_simultaneous"]
            line += f"  {comparison['delta']:+.3f} [{low:+.3f}, {high:+.3f}]"
            line += "" if comparison["resolved"] else "  not resolved"
        lines.append(line)
    seen = results["optimism_best_seen"]
    lines += [
        "",
        f"{results['candidates']} candidates ({_share(results)}), "
        f"{evaluations(results['item_evaluations'], results['cached_item_evaluations'])}, "
        f"{results['wall_seconds']:.0f} s. "
        + (
            f"The best search score seen lies {abs(seen):.3f} {'above' if seen >= 0 else 'below'} the winner's "
            "test score."
            if seen is not None
            else ""
        ),
    ]
    if results.get("saved_layer_evaluations"):
        said = prefix_sharing(results["layer_evaluations"], results["saved_layer_evaluations"])
        lines.append(said[0].upper() + said[1:] + ".")
    if results["test_openings"] > 1:
        lines.append(f"The test items have been opened {results['test_openings']} times.")
    return "\n".join([*lines, "", verdict(results)])


def _share(results: Mapping[str, Any]) -> str:
    """Return how many candidates have no fitness, and why."""
    failed = f"{results['failed_candidates']} failed"
    screened = results["screened_candidates"]
    return f"{failed}, {screened} stopped before their last item" if screened else failed
