"""Tiny lm-eval tasks in a folder, and engines whose answers are known."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from evomerge.evaluation.items import Block
from evomerge.evaluation.requests import Generated, Generation, Loglikelihood, Rolling
from evomerge.evaluation.suite import Suite
from evomerge.suite_config import Splits
from evomerge.suite_config import Suite as SuiteConfig

NAMED = Splits(search="search", validation="validation", test="test")
MEAN = {"aggregation": "mean", "higher_is_better": True}
KINDS: dict[str, dict[str, Any]] = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc", **MEAN}, {"metric": "acc_norm", **MEAN}],
    },
    "generate": {
        "output_type": "generate_until",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "do_sample": False},
        "metric_list": [{"metric": "exact_match", **MEAN}],
    },
    "likelihood": {
        "output_type": "loglikelihood",
        "doc_to_target": "{{answer}}",
        "metric_list": [
            {"metric": "acc", **MEAN},
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
        ],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}",
        "metric_list": [
            {"metric": metric, "aggregation": aggregation, "higher_is_better": False}
            for metric, aggregation in (
                ("bits_per_byte", "bits_per_byte"),
                ("word_perplexity", "weighted_perplexity"),
                ("byte_perplexity", "weighted_perplexity"),
            )
        ],
    },
}


def documents(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Questions with four answers of unequal length each, the right one at changing places."""
    return [
        {
            "id": f"n{i}",
            "question": f"What follows {i} and {i * 7 % 13}?",
            "choices": [str(i + 1), f"about {i}", f"nothing like {i * 3}", "no"],
            "gold": i * 5 % 4,
            "answer": f"it is {i + 1}",
        }
        for i in range(start, start + count)
    ]


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_task(
    folder: Path,
    name: str = "tiny",
    kind: str = "choice",
    *,
    data: dict[str, list[dict[str, Any]]] | None = None,
    drop: Sequence[str] = (),
    **keys: Any,
) -> Path:
    """Write a task with the data splits search, validation and test (12 documents each)."""
    data = data or {s: documents(12, 100 * i) for i, s in enumerate(("search", "validation", "test"))}
    for split, rows in data.items():
        write_jsonl(folder / "data" / f"{name}_{split}.jsonl", rows)
    config = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {split: f"data/{name}_{split}.jsonl" for split in data}},
        "test_split": "test",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "num_fewshot": 0,
        **KINDS[kind],
        **keys,
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in config.items() if k not in drop}))
    return path


def suite_config(folder: Path, *tasks: str | dict[str, Any], **keys: Any) -> SuiteConfig:
    return SuiteConfig.model_validate({"include": (str(folder),), "tasks": tasks or ("tiny",), **keys})


def build(folder: Path, *tasks: str | dict[str, Any], splits: Splits = NAMED, **keys: Any) -> Suite:
    needed = keys.pop("splits_needed", ("search", "validation", "test"))
    tokenizer = keys.pop("tokenizer", None)
    return Suite.build(
        suite_config(folder, *tasks, **keys), splits, tokenizer, splits_needed=needed, file="search.yaml"
    )


class FakeEngine:
    """Answers by functions of the request; counts its calls."""

    packing = "fake-v1:64"
    fingerprint = "fake"

    def __init__(
        self,
        logprob: Callable[[Loglikelihood], float] = lambda r: -float(len(r.continuation)),
        text: Callable[[Generation], str] = lambda r: r.context,
        truncated: Callable[[Generation], bool] = lambda r: False,
    ) -> None:
        self.logprob = logprob
        self.text = text
        self.truncated = truncated
        self.asked: list[Any] = []

    def loglikelihood(self, requests: Sequence[Loglikelihood]) -> list[tuple[float, bool]]:
        self.asked += requests
        return [(self.logprob(request), False) for request in requests]

    def loglikelihood_rolling(self, requests: Sequence[Rolling]) -> list[float]:
        self.asked += requests
        return [-float(len(request.text)) for request in requests]

    def generate(self, requests: Sequence[Generation]) -> list[Generated]:
        self.asked += requests
        return [Generated(self.text(request), self.truncated(request)) for request in requests]


def whole(suite: Suite, split: Any = "search") -> Any:
    """Return one block of all items of a split."""
    blocks = suite.fixed_blocks(split, packing="fake-v1:64")
    return Block(split, 0, tuple(part for block in blocks for part in block.parts))
