#!/usr/bin/env python3
"""What prefix sharing saves a search over layer paths, and that it changes no score.

    .venv/bin/python experiments/prefix_sharing/run.py --zoo zoo

Each search is run with `engine.prefix_sharing` 0 and auto by turns, in this process, with one thread; all that the two
record must be equal. The zoo's models have 6 layers; for deeper paths two random models of 24 layers stand in, of the
same width, with the zoo's tasks. Their scores are chance, but a layer costs what it costs. What several workers save
is worked out from the paths that were searched. Appends to results.jsonl and prints the tables of README.md.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

os.environ.update(
    HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false"
)

import torch
import yaml
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

import evomerge
from evomerge.engines.hops import SharedHops
from evomerge.evaluation.items import Block
from evomerge.recipe import Recipe
from evomerge.searching.store import Store
from evomerge.workers.queue import take
from evomerge.workers.work import Work
from evomerge.workers.worker import Worker

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results.jsonl"
DEPTH = 24
ITEMS = 96
"""Of each split."""
WORKERS = (1, 2, 4, 8)
GENOMES = {"edits": "edits", "indicators": "cma"}
"""Genome → optimiser."""
METRICS = {
    "generated": {
        "zoo_add": "exact_match",
        "zoo_larger": "acc",
        "zoo_reverse": "exact_match",
        "zoo_vowels": "acc",
    },
    "likelihoods": dict.fromkeys(("zoo_add", "zoo_larger", "zoo_reverse", "zoo_vowels"), "gold_nll"),
}
"""Task → metric: half of the items are answered with generated text, or none."""


@dataclass(frozen=True)
class Search:
    """A search that is measured.

    Attributes:
        layers: of the models: 6 (the zoo) or `DEPTH`.
        genome, metrics: of `GENOMES` and `METRICS`.
        candidates: the budget.
    """

    layers: int
    genome: str
    metrics: str
    candidates: int

    def __str__(self) -> str:
        return f"{self.layers} layers, {self.genome} ({GENOMES[self.genome]}), {self.metrics}"


SEARCHES = (
    Search(6, "edits", "generated", 144),
    Search(6, "indicators", "generated", 144),
    Search(6, "edits", "likelihoods", 144),
    Search(6, "indicators", "likelihoods", 144),
    Search(DEPTH, "edits", "likelihoods", 96),
    Search(DEPTH, "indicators", "likelihoods", 96),
)


class Watch:
    """Notes the CPU seconds that workers spend, and the most bytes that are kept at once."""

    def __init__(self) -> None:
        self.seconds, self.nbytes = 0.0, 0
        keep, run = SharedHops._keep, Worker.run

        def watched_keep(hops: SharedHops, *arguments: Any) -> None:
            keep(hops, *arguments)
            self.nbytes = max(self.nbytes, hops.nbytes)

        def watched_run(worker: Worker, work: Work) -> Any:
            started = time.process_time()
            result = run(worker, work)
            self.seconds += time.process_time() - started
            return result

        SharedHops._keep, Worker.run = watched_keep, watched_run  # type: ignore[method-assign]


WATCH = Watch()


def saved_by(workers: int, generations: Sequence[Sequence[Recipe]], layers: int) -> float:
    """Return the share of layer evaluations that so many workers save, if all candidates answer one block alike."""
    whole = computed = 0
    held: list[Recipe | None] = [None] * workers
    for recipes in generations:
        # The next generation answers other items.
        kept: list[set[tuple[Any, ...]]] = [set() for _ in range(workers)]
        queue = deque(
            Work(r.hash, (r,), Block("search", 0, ())) for r in {r.hash: r for r in recipes}.values()
        )
        free = [(0, worker) for worker in range(workers)]
        while queue:
            now, worker = heapq.heappop(free)
            others = [other for number, other in enumerate(held) if number != worker and other is not None]
            work = take(queue, held[worker], others)
            (held[worker],) = work.recipes
            path = hops_of(work.recipes[0], layers)
            known = max((len(start) for start in kept[worker] if path[: len(start)] == start), default=0)
            kept[worker] = {path[:hops] for hops in work.branches}
            whole, computed = whole + len(path), computed + len(path) - known
            heapq.heappush(free, (now + len(path) - known, worker))
    return 1 - computed / whole


def hops_of(recipe: Recipe, layers: int) -> tuple[Any, ...]:
    """Return a recipe's path as plain data; without one all layers of the model that it is."""
    if recipe.path is not None:
        return tuple((hop.model, hop.layer, hop.scale) for hop in recipe.path)
    return tuple((recipe.main.inputs[0], layer, 1.0) for layer in range(layers))


def deep_models(zoo: Path, folder: Path) -> dict[str, Path]:
    """Write two random models of `DEPTH` layers in the shape of the zoo's, with its tokenizer."""
    found = {}
    for seed, name in enumerate(("base", "arithmetic", "text")):
        place = folder / name
        shutil.copytree(zoo / "base", place, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
        config = AutoConfig.from_pretrained(zoo / "base", num_hidden_layers=DEPTH)
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        config.save_pretrained(place)
        tensors = {
            n: t
            for n, t in model.state_dict().items()
            if n != "lm_head.weight" or not config.tie_word_embeddings
        }
        save_file(tensors, place / "model.safetensors", {"format": "pt"})
        found[name] = place
    return found


def config_of(search: Search, models: dict[str, Path], zoo: Path, sharing: float | str) -> dict[str, Any]:
    """Return the config of a search."""
    metrics = METRICS[search.metrics]
    return {
        "version": 1,
        "models": {
            "base": str(models["base"]),
            "experts": {name: str(models[name]) for name in ("arithmetic", "text")},
        },
        "space": {
            "type": "layers",
            "pool": ["arithmetic", "text"],
            "scale": {"range": [0.5, 2.0]},
            "genome": search.genome,
        },
        "optimizer": {"type": GENOMES[search.genome]},
        "budget": {"candidates": search.candidates},
        "suite": {
            "include": [str(zoo / "tasks")],
            "tasks": [
                {"task": task, "metric": metric, "limit": ITEMS // len(metrics)}
                for task, metric in metrics.items()
            ],
        },
        "splits": {"search": "search", "validation": "validation", "test": "test"},
        "engine": {"device": "cpu", "prefix_sharing": sharing},
        "workers": {"type": "local"},
        "cache": {"scores": False},
    }


def measured(
    search: Search, models: dict[str, Path], zoo: Path, sharing: float | str
) -> tuple[dict[str, Any], Any]:
    """Run a search; return what it took, and all that it recorded."""
    before = WATCH.seconds
    WATCH.nbytes = 0
    with tempfile.TemporaryDirectory() as place:
        config = Path(place) / "config.yaml"
        config.write_text(yaml.safe_dump(config_of(search, models, zoo, sharing)))
        run = evomerge.search(config, run=Path(place) / "run")
        store = Store(run.path / "run.db", create=False)
        recorded = store.canonical()
        generations: dict[int, list[Recipe]] = {}
        for row in store.candidates():
            generations.setdefault(row.generation, []).append(store.recipe(row.recipe))
        store.close()
        results = run.results
    return {
        "search": str(search),
        "sharing": sharing,
        "cpu_seconds": round(WATCH.seconds - before, 2),
        "wall_seconds": round(results["merge_seconds"] + results["score_seconds"], 2),
        "layer_evaluations": results["layer_evaluations"],
        "saved": results["saved_layer_evaluations"],
        "candidates": results["candidates"],
        "screened": results["screened_candidates"],
        "most_bytes": WATCH.nbytes,
        "saved_by_workers": {
            count: round(saved_by(count, list(generations.values()), search.layers), 4) for count in WORKERS
        },
    }, recorded


def tables(rows: list[dict[str, Any]]) -> str:
    """Return the tables of README.md."""
    lines = [
        "| search | candidates | layer evaluations saved | CPU s without | with | kept at most |",
        "|---|---|---|---|---|---|",
    ]
    for search in SEARCHES:
        both = [
            [row for row in rows if row["search"] == str(search) and row["sharing"] == s] for s in (0, "auto")
        ]
        if not all(both):
            continue
        without, with_ = (fmean(row["cpu_seconds"] for row in side) for side in both)
        row = both[1][0]
        share = row["saved"] / (row["saved"] + row["layer_evaluations"])
        less = f"{with_:.0f} (−{1 - with_ / without:.0%})"
        most = f"{row['most_bytes'] / 1e6:.0f} MB"
        lines.append(f"| {search} | {row['candidates']} | {share:.0%} | {without:.0f} | {less} | {most} |")
    lines += ["", f"| search | {' | '.join(map(str, WORKERS))} |", "|---|" + "---|" * len(WORKERS)]
    for search in SEARCHES:
        found = next((row["saved_by_workers"] for row in rows if row["search"] == str(search)), None)
        if found is not None and search.metrics == "likelihoods":
            lines.append(f"| {search} | {' | '.join(f'{found[str(count)]:.0%}' for count in WORKERS)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--zoo", type=Path, required=True, help="as scripts/build_zoo makes it")
    parser.add_argument("--rounds", type=int, default=2, help="more rounds than there are in results.jsonl")
    options = parser.parse_args()
    zoo = options.zoo.resolve()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        models = {
            6: {name: zoo / name for name in ("base", "arithmetic", "text")},
            DEPTH: deep_models(zoo, Path(place)),
        }
        # What is imported and compiled the first time is nobody's.
        measured(Search(6, "edits", "generated", 24), models[6], zoo, "auto")
        before = len(RESULTS.read_text().splitlines()) if RESULTS.exists() else 0
        first = before // (2 * len(SEARCHES))
        for turn in range(first, first + options.rounds):
            for search in SEARCHES:
                recorded = []
                for sharing in (0, "auto") if turn % 2 == 0 else ("auto", 0):
                    row, found = measured(search, models[search.layers], zoo, sharing)
                    recorded.append(found)
                    print(row, flush=True)
                    with RESULTS.open("a") as file:
                        file.write(json.dumps(row) + "\n")
                if recorded[0] != recorded[1]:
                    raise SystemExit(f"{search}: the scores differ")
    print(tables([json.loads(line) for line in RESULTS.read_text().splitlines()]))


if __name__ == "__main__":
    main()
