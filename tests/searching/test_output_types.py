"""Results of every output type are in the run's database, item by item: raw, and mapped to [0, 1]."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from evomerge.searching.run import search
from evomerge.searching.rundir import open_run
from tests.evaluation.tiny import documents, write_task
from tests.tasks import make_config

TASKS = [
    {"task": "choice", "metric": "acc"},
    {"task": "choice", "metric": "gold_bits_per_byte"},
    {"task": "generate", "metric": "exact_match"},
    {"task": "likelihood", "metric": "perplexity"},
    {"task": "rolling", "metric": "bits_per_byte"},
    {"task": "rolling", "metric": "word_perplexity"},
]
MAPPED = {
    "choice:acc": lambda raw: raw,
    "choice:gold_bits_per_byte": lambda raw: 2**-raw,
    "generate": lambda raw: raw,
    "likelihood": lambda raw: 1 / raw,
    "rolling:bits_per_byte": lambda raw: 2**-raw,
    "rolling:word_perplexity": lambda raw: 1 / raw,
}


def test_every_output_type_is_recorded_raw_and_mapped(family: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "tasks"
    splits = {"search": 0, "validation": 100, "test": 200}
    for kind in ("choice", "generate", "likelihood", "rolling"):
        data = {split: documents(6, start) for split, start in splits.items()}
        write_task(folder, kind, kind, data=data)
    config = make_config(
        tmp_path,
        family,
        folder,
        suite={"include": [str(folder)], "tasks": TASKS, "items_per_candidate": 36, "block_items": 18},
        budget={"candidates": 4},
    )
    run = search(config, run=tmp_path / "run")
    store = open_run(run.path)
    try:
        scores = store.query("SELECT recipe, item, task, raw, value, truncated FROM scores")[1]
        known = {row[0]: row[1] for row in store.query("SELECT id, task FROM items")[1]}
    finally:
        store.close()
    assert {task for _, _, task, *_ in scores} == set(MAPPED)
    for _, item, task, raw, value, truncated in scores:
        assert known[item] == task
        assert 0 <= value <= 1
        assert value == pytest.approx(MAPPED[task](raw), rel=1e-12)
        assert truncated in ((0, 1) if task == "generate" else (None,))
    # Every task has all its items of the split in each table that is complete.
    each = Counter((recipe, task) for recipe, _, task, *_ in scores)
    assert set(each.values()) <= {6, 12, 18}
    assert run.results["item_evaluations"] == len(scores)
