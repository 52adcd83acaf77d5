"""Searches over accuracy, a smooth objective, the user's texts and the user's own scoring together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import evomerge
from evomerge.cli import main
from evomerge.searching.progress import Silent
from tests.searching.records import canonical
from tests.tasks import make_config

CODE = """
from pathlib import Path

from prompts import PROMPT


def score(model, items):
    Path(__file__).with_name("switch").read_text()
    texts = model.generate([PROMPT.format(**item) for item in items], max_tokens=4)
    bits = model.bits_per_byte([item["word"] for item in items])
    return [{"score": 2 ** -b, "answer": text} for b, text in zip(bits, texts)]
"""
NAMES = ["tiny_a", "tiny_a:gold", "notes", "score"]


@pytest.fixture
def config(tmp_path: Path, family: dict[str, Path], tasks: Path) -> Path:
    (tmp_path / "scoring.py").write_text(CODE)
    (tmp_path / "prompts.py").write_text("PROMPT = 'Spell {word}:'\n")
    (tmp_path / "switch").write_text("on")
    rows = [{"word": f"w{i * i}"} for i in range(40)]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "notes.txt").write_text("\n\n".join(f"Note {i}: {i * 31 % 17}." for i in range(40)))
    suite = {
        "include": [str(tasks)],
        "trust_task_code": True,
        "tasks": [
            {"task": "tiny_a", "metric": "acc"},
            {"task": "tiny_a", "metric": "gold_nll", "name": "tiny_a:gold"},
            {"text": "./notes.txt", "weight": 2},
            {"python": "scoring:score", "items": "./items.jsonl"},
        ],
        "block_items": 16,
        "items_per_candidate": 32,
    }
    return make_config(tmp_path, family, tasks, suite=suite, budget={"candidates": 8})


def test_a_search_over_all_kinds_of_tasks(config: Path, tmp_path: Path) -> None:
    run = evomerge.search(config, run=tmp_path / "local", display=Silent())
    assert list(run.results["winner"]["test"]["tasks"]) == NAMES
    assert set(run.scores().task) == set(NAMES)
    # The suite mixes directions, so its scores are mapped to [0, 1]; each task tells its own units too.
    notes = run.results["winner"]["test"]["tasks"]["notes"]
    assert run.results["units"] == "mapped to [0, 1]"
    assert 0 < notes["mean"] < 1 < notes["raw"]
    assert run.candidates().fitness.between(0, 1).all()
    preview = (run.path / "preview.md").read_text()
    assert "notes" in preview
    again = evomerge.search(
        config,
        run=tmp_path / "ray",
        overrides=["workers={type: ray, count: 2, cpus: 0.4}"],
        display=Silent(),
    )
    assert canonical(again.path) == canonical(run.path)


def test_a_mistake_of_the_function_stops_the_run_which_can_be_resumed(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    undisturbed = evomerge.search(config, run=tmp_path / "undisturbed", display=Silent())
    (tmp_path / "switch").unlink()
    run = tmp_path / "run"
    assert main(["search", str(config), "--run", str(run)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "switch" in line]
    assert (
        f"task 'score': scoring:score fails in {tmp_path / 'scoring.py'}, line 8: FileNotFoundError" in line
    )
    (tmp_path / "switch").write_text("on")
    assert main(["resume", str(run)]) == 0
    assert canonical(run) == canonical(undisturbed.path)


def test_a_single_model_is_evaluated_on_all_kinds_of_tasks(
    config: Path, family: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    result = evomerge.evaluate(family["a"], config, split="test")
    assert list(result.score["tasks"]) == NAMES
    assert main(["evaluate", str(family["a"]), "--config", str(config), "--split", "test"]) == 0
    shown = capsys.readouterr().out
    for name in NAMES:
        assert name in shown
    print(shown)
