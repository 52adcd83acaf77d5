#!/usr/bin/env python3
"""Every merge method on the zoo: at its customary settings and tuned, on items that tuning never saw.

    .venv/bin/python scripts/build_zoo
    .venv/bin/python experiments/merge_quality/run.py

Tuning is the project's own CMA-ES over the method's numbers (`entries.py`), one value per expert and for all
layers. All candidates answer the same half of the search items; the customary settings, the last mean and the two
best candidates then answer the validation items; the best of them, and the customary settings, meet the test items
once. One line per method goes to results.jsonl and the table to README.md. Methods that are in results.jsonl are
not repeated; `--force` starts over.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import Any

from entries import ENTRIES, EXPERTS, PAIR, Entry

from evomerge.config import OptimizerConfig, load_config
from evomerge.errors import CandidateFailed
from evomerge.evaluation.items import Split
from evomerge.evaluation.statistics import Comparison, Table, compare_all, score, suite_mean
from evomerge.methods import get_method
from evomerge.optimizers import make_optimizer
from evomerge.optimizers.base import Told
from evomerge.recipe import Merge, Recipe
from evomerge.searching.ranking import rank, values_of
from evomerge.searching.results import versions
from evomerge.spaces.genotype import Coordinate, Genotype

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from bench import Bench, packed, unpacked  # noqa: E402

REPOSITORY = HERE.parents[1]
CONFIG = REPOSITORY / "configs" / "quickstart.yaml"
TASKS = REPOSITORY / "zoo" / "tasks" / "data"
RESULTS = HERE / "results.jsonl"

SEED = 0
FINALISTS = 2
SEARCH_BLOCKS = 8
"""Of the fifteen, so that the candidates answer half of the search items."""

SKILLS = {"arithmetic": ("add", "larger"), "text": ("reverse", "vowels"), "ordering": ("sort", "next")}
"""The tasks that each expert was trained on: methods that weigh models by data see their search items."""


class ZooBench(Bench):
    """The zoo's suite and one live model; methods that need data get the experts' texts."""

    def __init__(self) -> None:
        super().__init__(load_config(CONFIG, ["workers.type=local"]), CONFIG)
        self._folder = tempfile.TemporaryDirectory()
        self.texts = {name: str(self._texts(name)) for name in EXPERTS}

    def _texts(self, expert: str) -> Path:
        """Write the search items of an expert's tasks as prompts and answers."""
        lines = []
        for task in SKILLS[expert]:
            for line in (TASKS / f"{task}_search.jsonl").read_text().splitlines():
                item = json.loads(line)
                answer = item["choices"][item["gold"]] if "choices" in item else item["answer"]
                lines.append(json.dumps({"prompt": item["prompt"], "text": answer}))
        file = Path(self._folder.name) / f"{expert}.jsonl"
        file.write_text("\n".join(lines) + "\n")
        return file

    def recipe(self, merge: Merge) -> Recipe:
        """Return the recipe of a merge."""
        if get_method(merge.method).needs:
            data = {
                "texts": {name: self.texts[name] for name in merge.inputs},
                "prompt": "prompt",
                "max_length": 64,
            }
            merge = Merge.model_validate({**merge.model_dump(exclude_none=True), "data": data})
        return super().recipe(merge)

    def answers(self, recipe: Recipe, split: Split) -> Table | str:
        """Return each item's score, by task; or why there is none."""
        searching = split == "search"
        blocks = self.setup.blocks[split][: SEARCH_BLOCKS if searching else None]
        try:
            return values_of(self.scores(recipe, blocks, check_degenerate=searching), raw=True)
        except CandidateFailed as reason:
            return str(reason)


def coordinates(entry: Entry) -> list[tuple[str, str | None, Coordinate]]:
    """Return (parameter, input or None, coordinate) of every searched number."""
    found = []
    ranges = [(name, who, r) for name, r in entry.each.items() for who in entry.inputs]
    ranges += [(name, None, r) for name, r in entry.shared.items()]
    for name, who, (low, high, initial) in ranges:
        label = name if who is None else f"{name}[{who}]"
        found.append((name, who, Coordinate(label, "float", low, high, (initial - low) / (high - low))))
    return found


def decode(entry: Entry, genotype: Genotype) -> Merge:
    """Return the merge that a genotype describes."""
    parameters: dict[str, Any] = dict(entry.fixed)
    for (name, who, c), u in zip(coordinates(entry), genotype, strict=True):
        value = c.low + u * (c.high - c.low)
        if who is None:
            parameters[name] = value
        else:
            parameters.setdefault(name, {})[who] = value
    return Merge(method=entry.method, base=entry.base, inputs=entry.inputs, parameters=parameters)


def tuned(bench: ZooBench, entry: Entry, budget: int) -> tuple[list[Merge], int]:
    """Search on the search items; return the merges to validate, the customary one first, and how many were tried."""
    space = [c for _, _, c in coordinates(entry)]
    start = tuple(c.initial for c in space)
    if not space:
        return [decode(entry, start)], 0
    optimizer = make_optimizer(OptimizerConfig(), space, seed=SEED)
    seen: list[tuple[float, Genotype]] = []
    generation = 0
    while len(seen) < budget:
        asked = optimizer.ask(generation)
        fitness: list[float | None] = []
        for genotype in asked:
            table = bench.answers(bench.recipe(decode(entry, genotype)), "search")
            fitness.append(None if isinstance(table, str) else suite_mean(table, bench.weights))
            seen.append((-1.0 if fitness[-1] is None else fitness[-1], genotype))
        told = zip(asked, rank(fitness), fitness, strict=True)
        optimizer.tell(generation, [Told(*each) for each in told])
        generation += 1
    seen.sort(key=lambda pair: -pair[0])
    mean = optimizer.mean()
    best = [*([] if mean is None else [mean]), *(genotype for _, genotype in seen[:FINALISTS])]
    return [decode(entry, genotype) for genotype in dict.fromkeys([start, *best])], len(seen)


def one_entry(bench: ZooBench, entry: Entry, budget: int) -> dict[str, Any]:
    """Return a method's line of results.jsonl."""
    started = time.monotonic()
    merges, tried = tuned(bench, entry, budget)
    validated = [(merge, bench.answers(bench.recipe(merge), "validation")) for merge in merges]
    scores = [-1.0 if isinstance(table, str) else suite_mean(table, bench.weights) for _, table in validated]
    chosen = max(range(len(merges)), key=lambda i: scores[i])
    customary = bench.answers(bench.recipe(merges[0]), "test")
    test = customary if chosen == 0 else bench.answers(bench.recipe(merges[chosen]), "test")
    if isinstance(test, str):
        raise SystemExit(f"{entry.name}: cannot be scored: {test}")
    return {
        "name": entry.name,
        "method": entry.method,
        "models": len({entry.base, *entry.inputs} - {None, "base"}),
        "dimension": len(coordinates(entry)),
        "candidates": tried,
        "customary": merges[0].parameters,
        "customary_validation": scores[0],
        "customary_test": customary if isinstance(customary, str) else packed(customary),
        "tuned": merges[chosen].parameters,
        "tuned_validation": scores[chosen],
        "tuned_test": packed(test),
        "seconds": round(time.monotonic() - started, 1),
    }


def parents(bench: ZooBench) -> dict[str, Any]:
    """Return the line of the models that exist without any method."""
    recipes = {name: recipe for name, recipe in bench.setup.baselines.items() if name != "initial"}
    found = {}
    for name, recipe in recipes.items():
        validation, test = (bench.answers(recipe, split) for split in ("validation", "test"))
        if isinstance(validation, str) or isinstance(test, str):
            raise SystemExit(f"{name}: cannot be scored")
        found[name] = {"validation": suite_mean(validation, bench.weights), "test": packed(test)}
    return {"name": "parents", "models": found, "weights": bench.weights, "versions": versions()}


def table(lines: dict[str, dict[str, Any]]) -> str:
    """Return the README."""
    first, rows = lines["parents"], [lines[entry.name] for entry in ENTRIES if entry.name in lines]
    weights = first["weights"]
    models = {name: unpacked(entry["test"]) for name, entry in first["models"].items()}
    best = max(("base", *EXPERTS), key=lambda name: first["models"][name]["validation"])
    tests = {row["name"]: unpacked(row["tuned_test"]) for row in rows}
    against = compare_all(models[best], tests, weights, seed=SEED)
    rows.sort(key=lambda row: -suite_mean(tests[row["name"]], weights))
    tried = max(row["candidates"] for row in rows)
    text = [
        "# Merge methods on the zoo",
        "",
        "Made by `.venv/bin/python experiments/merge_quality/run.py` after `scripts/build_zoo`; parameters and every "
        "item's score are in `results.jsonl`. Parents on the test items: "
        + ", ".join(
            f"{name} {suite_mean(items, weights):.3f}" for name, items in models.items() if name != "uniform"
        )
        + f"; plain average of the experts {suite_mean(models['uniform'], weights):.3f}.",
        "",
        "*Customary* are the settings in `entries.py`. *Tuned*: CMA-ES over the method's numbers (one value per "
        f"expert, the same for all layers), {tried} candidates at most, each on the same half of the search items; of "
        "the customary settings, the last mean and the two best candidates, the best on the validation items. Both "
        "were scored once on the test items, of which neither search nor choice knew. Intervals are 95 %; those of "
        f"the difference to the best parent ({best}, by validation) hold for all rows together.",
        "",
        f"| method | models | numbers | customary, test | tuned, validation | tuned, test | tuned − {best} |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        scored = score(tests[row["name"]], weights, seed=SEED)
        customary = row["customary_test"]
        cells = [
            row["name"],
            str(row["models"]),
            str(row["dimension"]),
            "failed" if isinstance(customary, str) else f"{suite_mean(unpacked(customary), weights):.3f}",
            f"{row['tuned_validation']:.3f}",
            f"{scored.mean:.3f} [{scored.ci95[0]:.3f}, {scored.ci95[1]:.3f}]",
            difference(against[row["name"]]),
        ]
        text.append("| " + " | ".join(cells) + " |")
    better = [row for row in rows if against[row["name"]].resolved and against[row["name"]].delta < 0]
    worse = [row for row in rows if against[row["name"]].resolved and against[row["name"]].delta > 0]
    gains = [
        suite_mean(tests[row["name"]], weights) - suite_mean(unpacked(row["customary_test"]), weights)
        for row in rows
        if row["candidates"] and not isinstance(row["customary_test"], str)
    ]
    above = sum(
        suite_mean(unpacked(row["customary_test"]), weights) > suite_mean(models[best], weights)
        for row in rows
        if not isinstance(row["customary_test"], str)
    )
    text += [
        "",
        f"- Tuned, {len(better)} of {len(rows)} rows are better than the best parent and {len(worse)} are worse, "
        f"beyond the intervals; at their customary settings {above} score above it.",
        f"- Tuning moves a row's test score by {mean(gains):+.3f} on average, from {min(gains):+.3f} to "
        f"{max(gains):+.3f}.",
        "- Rows are compared with the best parent, not with each other: with so few candidates and one seed, "
        "neighbours in the table are not told apart.",
        f"- Methods for two models merge {' and '.join(PAIR)}; nearswap and arcee_fusion take {PAIR[1]} as their base. "
        "fisher, regmean and regmean++ see the search items of each expert's own tasks, with the answers. knots is "
        "made for adapters of low rank, and gets full fine-tunes here.",
        "- The zoo is a small model with three experts of unequal strength: it shows how methods behave, and says "
        "nothing about large models.",
    ]
    return "\n".join([*text, ""])


def difference(parent_minus_row: Comparison) -> str:
    low, high = parent_minus_row.ci95_simultaneous or parent_minus_row.ci95
    mark = "" if parent_minus_row.resolved else " (not resolved)"
    return f"{-parent_minus_row.delta:+.3f} [{-high:+.3f}, {-low:+.3f}]{mark}"


def main() -> None:
    """Run the missing methods and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--candidates", type=int, default=28, help="candidates of each method's search")
    parser.add_argument("--force", action="store_true", help="start over")
    options = parser.parse_args()
    if options.force:
        RESULTS.unlink(missing_ok=True)
    done = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    lines = {line["name"]: line for line in done}
    missing = [entry for entry in ENTRIES if entry.name not in lines]
    if missing:
        bench = ZooBench()
        if "parents" not in lines:
            lines["parents"] = parents(bench)
        for entry in missing:
            line = lines[entry.name] = one_entry(bench, entry, options.candidates)
            RESULTS.write_text("".join(json.dumps(each) + "\n" for each in lines.values()))
            test = suite_mean(unpacked(line["tuned_test"]), bench.weights)
            print(f"{entry.name}: {test:.3f} on test, {line['seconds']:.0f} s", flush=True)
    (HERE / "README.md").write_text(table(lines))


if __name__ == "__main__":
    main()
