"""Tiny lm-eval tasks for tests: YAML and JSONL files, generated."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import yaml

COUNTS = {"search": 24, "validation": 12, "test": 16}


def make_tasks(folder: Path, *, counts: dict[str, int] | None = None, seed: int = 0) -> Path:
    """Write two multiple-choice tasks, ``tiny_a`` and ``tiny_b``, with disjoint splits."""
    numbers = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tiny_a", "tiny_b"):
        files = {}
        seen: set[str] = set()
        for split, count in (counts or COUNTS).items():
            rows = []
            while len(rows) < count:
                word = "".join(numbers.choice(list("abcdefgh"), size=5))
                if word in seen:
                    continue
                seen.add(word)
                choices = [word[::-1], word.upper(), word[2:] + word[:2]]
                gold = len(rows) % 3
                choices[0], choices[gold] = choices[gold], choices[0]
                rows.append({"prompt": f"{name} {word}=", "choices": choices, "gold": gold})
            path = folder / f"{name}_{split}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            files[split] = path.name
        config = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": files},
            "test_split": "test",
            "num_fewshot": 0,
            "doc_to_text": "{{prompt}}",
            "target_delimiter": "",
            "output_type": "multiple_choice",
            "doc_to_choice": "choices",
            "doc_to_target": "gold",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    return folder


def make_config(
    folder: Path, family: dict[str, Path], tasks: Path, *, name: str = "tiny", **changes: object
) -> Path:
    """Write a search config over a tiny family (see `tests.models.make_family`) and tiny tasks."""
    config = {
        "version": 1,
        "name": name,
        "models": {
            "base": str(family["base"]),
            "experts": {key: str(path) for key, path in family.items() if key != "base"},
        },
        "space": {
            "method": "task_arithmetic",
            "parameters": {"weight": {"range": [-0.5, 1.5], "initial": 0.4, "per": "expert"}},
        },
        "optimizer": {"type": "cma", "population": 4},
        "budget": {"candidates": 12},
        "suite": {
            "include": [str(tasks)],
            "tasks": [
                {"task": "tiny_a", "metric": "acc"},
                {"task": "tiny_b", "metric": "acc", "weight": 2.0},
            ],
            "block_items": 8,
            "items_per_candidate": 16,
        },
        "workers": {"type": "local"},
        "cache": {"scores": False},
        "seed": 3,
        **changes,
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path
