"""Text files as tasks: documents, splits, and the numbers of lm-eval's loglikelihood_rolling tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evomerge.engines.hf import HFEngine
from evomerge.errors import UserError
from evomerge.evaluation.requests import Rolling
from evomerge.evaluation.suite import Suite
from evomerge.schema import validate
from evomerge.suite_config import Splits
from evomerge.suite_config import Suite as SuiteConfig
from tests.evaluation.test_parity import lm_eval_samples
from tests.evaluation.tiny import NAMED, FakeEngine, whole, write_jsonl, write_task

SPLITS = ("search", "validation", "test")
PARAGRAPHS = [f"Paragraph {i} says {i * 37 % 101},\n  and goes on – naïvely – to {i}." for i in range(40)]


def suite_of(*tasks: Any, splits: Splits = NAMED, **keys: Any) -> Suite:
    config = validate(SuiteConfig, {"tasks": list(tasks), **keys}, "search.yaml")
    return Suite.build(config, splits, None, file="search.yaml")


def texts(suite: Suite, split: Any) -> list[str]:
    engine = FakeEngine()
    suite.score(engine, whole(suite, split))
    assert all(isinstance(request, Rolling) for request in engine.asked)
    return [request.text for request in engine.asked]


def refusal(*tasks: Any, **keys: Any) -> str:
    with pytest.raises(UserError) as caught:
        suite_of(*tasks, **keys)
    return str(caught.value)


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    path = tmp_path / "corpus.txt"
    path.write_text(
        "\n \n" + "\n\n".join(PARAGRAPHS[:20]) + "\n \t\n\n" + "\r\n\r\n".join(PARAGRAPHS[20:]) + "\n"
    )
    return str(path)


def test_paragraphs_are_cut_into_splits_by_their_text(corpus: str) -> None:
    suite = suite_of({"text": corpus})
    assert suite.weights == {"corpus": 1.0}
    (task,) = suite.tasks
    assert (task.metric, task.output_type, task.higher_is_better) == (
        "bits_per_byte", "loglikelihood_rolling", False)  # fmt: skip
    found = {split: texts(suite, split) for split in SPLITS}
    assert sorted(text for own in found.values() for text in own) == sorted(PARAGRAPHS)
    assert len(found["search"]) > len(found["validation"]) > 2
    Path(corpus).write_text("\n\n".join(reversed(PARAGRAPHS)))
    again = suite_of({"text": corpus})
    assert all(again.sha256(split) == suite.sha256(split) for split in SPLITS)
    fewer = suite_of({"text": corpus, "fractions": {"search": 0.2, "validation": 0.4, "test": 0.4}})
    assert set(texts(fewer, "search")) < set(found["search"])
    cut = Splits.model_validate({"from": "x", "fractions": {"search": 0.2, "validation": 0.4, "test": 0.4}})
    assert suite_of({"text": corpus}, splits=cut).sha256("test") == fewer.sha256("test")


def test_trivial_variants_of_a_text_stay_in_one_split(tmp_path: Path) -> None:
    path = tmp_path / "corpus.txt"
    path.write_text("\n\n".join(PARAGRAPHS + [text.upper().replace(" ", "   ") for text in PARAGRAPHS]))
    suite = suite_of({"text": str(path)})
    for split in SPLITS:
        own = texts(suite, split)
        assert len(own) == 2 * len({" ".join(text.lower().split()) for text in own})


@pytest.mark.parametrize(("unit", "expected"), [("line", 80), ("file", 4)])
def test_units_of_text_files(tmp_path: Path, unit: str, expected: int) -> None:
    for split, rows in zip((*SPLITS, "test2"), range(0, 40, 10), strict=True):
        (tmp_path / f"{split}.txt").write_text("\n\n".join(PARAGRAPHS[rows : rows + 10]))
    files = {split: str(tmp_path / f"{split}*.txt") for split in SPLITS}
    suite = suite_of({"text": files, "unit": unit, "name": "notes"})
    own = {split: texts(suite, split) for split in SPLITS}
    assert sum(map(len, own.values())) == sum(suite.tasks[0].counts.values()) == expected
    if unit == "file":
        assert own["search"] == ["\n\n".join(PARAGRAPHS[:10])]
        assert len(own["test"]) == 2


def test_the_numbers_are_lm_evals(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    rows = {
        s: [{"id": i, "question": f"{s}: {text}"} for i, text in enumerate(PARAGRAPHS[:12])] for s in SPLITS
    }
    path = write_task(tmp_path, kind="rolling", data=rows)
    expected = lm_eval_samples(path, model, tokenizer, max_length=40)
    files = {split: str(tmp_path / "data" / f"tiny_{split}.jsonl") for split in SPLITS}
    engine = HFEngine(model, tokenizer, batch_tokens=300, max_length=40)
    for metric in ("bits_per_byte", "byte_perplexity", "word_perplexity"):
        suite = suite_of({"text": files, "field": "question", "metric": metric})
        index = {item.id: item.index for item in suite.items("search")}
        scores = {index[score.item]: score for score in suite.score(engine, whole(suite))}
        assert len(scores) == len(expected) == 12
        for sample in expected:
            logprob, size = sample[metric]
            rate = -logprob / size
            raw = rate / np.log(2) if metric == "bits_per_byte" else np.exp(rate)
            np.testing.assert_allclose(scores[sample["doc_id"]].raw, raw, rtol=1e-5)
            np.testing.assert_allclose(scores[sample["doc_id"]].value, np.exp(-rate), rtol=1e-5)


def test_patterns_lists_and_limits(tmp_path: Path) -> None:
    for i in range(4):
        write_jsonl(
            tmp_path / f"part{i}.jsonl", [{"text": text} for text in PARAGRAPHS[i * 10 : i * 10 + 10]]
        )
    pattern = suite_of({"text": str(tmp_path / "part*.jsonl")})
    listed = suite_of({"text": [str(tmp_path / f"part{i}.jsonl") for i in (3, 1, 2, 0)], "name": "part"})
    assert sum(pattern.tasks[0].counts.values()) == 40
    assert all(pattern.sha256(split) == listed.sha256(split) for split in SPLITS)
    assert list(pattern.weights) == ["part"]
    limited = suite_of({"text": str(tmp_path / "part*.jsonl"), "limit": 3})
    assert {item.id for item in limited.items("search")} < {item.id for item in pattern.items("search")}
    assert len(limited.items("search")) == 3


def test_the_preview_and_the_references(corpus: str) -> None:
    suite = suite_of({"text": corpus})
    item = suite.items("search")[0]
    shown = suite.preview(FakeEngine(), item)
    assert shown.reference == PARAGRAPHS[item.index]
    assert shown.raw == pytest.approx(len(shown.reference) / len(shown.reference.encode()) / np.log(2))
    assert ("", shown.reference) in suite.references("corpus")


def test_mistakes_are_told_in_one_sentence(tmp_path: Path, corpus: str) -> None:
    rows = tmp_path / "rows.jsonl"
    write_jsonl(rows, [{"text": "a", "body": "b", "n": 3}])
    place = "search.yaml: suite.tasks.0"
    assert refusal({"text": "./no.txt"}) == f"{place}: ./no.txt: no such file"
    assert refusal({"text": str(tmp_path)}).startswith(
        f"{place}: {tmp_path}: no file has such a name; a folder"
    )
    assert refusal({"text": f"{tmp_path}/*.md"}).startswith(
        f"{place}: {tmp_path}/*.md: no file has such a name"
    )
    assert refusal({"text": str(rows), "field": "bdoy"}) == (
        f"{rows}: a row has no field 'bdoy' (did you mean 'body'?); it has text, body, n"
    )
    assert refusal({"text": str(rows), "field": "n"}).startswith(
        f"{rows}: the field 'n' of a row is no text but 3"
    )
    assert refusal({"text": str(rows), "unit": "line"}).startswith(
        f"{rows}: unit: line: rows of a JSONL file"
    )
    assert refusal({"text": corpus, "field": "text"}).startswith(
        f"{corpus}: field: text: only JSONL files have"
    )
    assert refusal({"text": str(rows)}) == (
        f"{place}: task 'rows' has no validation items among its 1; give it more, or three files"
    )
    assert refusal({"text": dict.fromkeys(SPLITS, corpus)}).startswith(
        f"{place}: task 'corpus': 40 of 40 validation items are search items too, e.g."
    )
    rows.write_text('{"text": "a"}\n\n{"text": \n')
    assert refusal({"text": str(rows)}).startswith(f"{rows}: line 3 is not JSON")
    rows.write_text('["text"]\n')
    assert refusal({"text": str(rows)}).startswith(f"{rows}: line 1: a row is an object of fields")
    rows.write_bytes(b"\xff\xfe")
    assert "is not UTF-8 text" in refusal({"text": str(rows)})
    assert refusal({"text": corpus, "name": "a"}, {"text": corpus, "name": "b"}).startswith(
        "search.yaml: suite.tasks.1: task 'b' asks and scores the very items of 'a'"
    )
    assert refusal({"text": corpus}, {"text": corpus}).startswith(
        "search.yaml: tasks: two tasks are called 'corpus'"
    )
    assert refusal({"text": corpus, "metrics": "x"}) == (
        "search.yaml: tasks.0: unknown key 'metrics' (did you mean 'metric'?)"
    )
    assert refusal({"txet": corpus}) == "search.yaml: tasks.0: unknown key 'txet' (did you mean 'text'?)"
    assert refusal({"text": corpus, "task": "x"}).startswith(
        "search.yaml: tasks.0: has both 'task' and 'text'"
    )
    assert refusal({"text": {"search": corpus, "test": corpus}}) == (
        "search.yaml: tasks.0.text.validation: this key is required"
    )
    assert refusal({"text": {"serach": corpus}}) == (
        "search.yaml: tasks.0.text: unknown key 'serach' (did you mean 'search'?)"
    )
    assert refusal({"text": 3}).startswith("search.yaml: tasks.0.text: 3 is not accepted: give ")
    assert refusal({"text": []}).startswith("search.yaml: tasks.0.text: is empty; give ")
    assert refusal({"text": corpus, "weight": 0}).startswith("search.yaml: tasks.0.weight: 0 is not accepted")
    assert refusal({"text": corpus, "metric": "acc"}).startswith(
        "search.yaml: tasks.0.metric: 'acc' is not accepted"
    )
    three = {
        "text": dict.fromkeys(SPLITS, corpus),
        "fractions": {"search": 0.5, "validation": 0.25, "test": 0.25},
    }
    assert refusal(three).startswith("search.yaml: tasks.0.fractions: they cut files into splits, but each")


def test_empty_rows_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*PARAGRAPHS, "", "  \n"]))
    assert sum(suite_of({"text": str(path)}).tasks[0].counts.values()) == 40
    assert "task 'rows': 2 empty texts are left out" in caplog.text


def test_paths_are_relative_to_the_config(tmp_path: Path, family: dict[str, Path]) -> None:
    from evomerge.config import load_config, parse_config
    from tests.tasks import make_config

    (tmp_path / "texts").mkdir()
    tasks = [
        {"text": "./texts/*.txt"},
        {"text": "texts/b.jsonl", "weight": 2},
        {"text": {split: f"{split}.txt" for split in SPLITS}},
    ]
    path = make_config(tmp_path, family, tmp_path, suite={"tasks": tasks})
    config = load_config(path)
    glob, plain, three = (task.text for task in config.suite.tasks)  # type: ignore[union-attr]
    assert glob == (f"{tmp_path}/texts/*.txt",)
    assert plain == (f"{tmp_path}/texts/b.jsonl",)
    assert three.validation == (f"{tmp_path}/validation.txt",)  # type: ignore[union-attr]
    assert [task.name for task in config.suite.tasks] == ["text", "b", "search"]
    import yaml

    assert parse_config(yaml.safe_load(config.to_yaml()), tmp_path / "elsewhere" / "x.yaml") == config
