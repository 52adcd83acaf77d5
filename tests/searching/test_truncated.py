"""Answers that were cut at their token limit are told before the search, and counted in its results."""

from __future__ import annotations

from pathlib import Path

import pytest

import evomerge
from evomerge.searching.progress import LineDisplay
from tests.evaluation.tiny import write_task
from tests.searching.records import canonical
from tests.tasks import make_config


def test_cut_answers_are_warned_of_and_counted(
    family: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    # No stop string, three tokens: a random model does not end by itself.
    kwargs = {"until": [], "max_gen_toks": 3, "do_sample": False}
    write_task(tmp_path / "tasks", "long", "generate", generation_kwargs=kwargs)
    write_task(tmp_path / "tasks", "choice")
    config = make_config(
        tmp_path,
        family,
        tmp_path / "tasks",
        suite={"include": [str(tmp_path / "tasks")], "tasks": ["long", "choice"]},
        budget={"candidates": 4},
    )
    run = evomerge.search(config, run=tmp_path / "run", yes=True, display=LineDisplay(sys.stderr))
    told = "2 of 2 answers of base to 'long' were cut at 3 tokens"
    assert told in capsys.readouterr().err
    preview = (run.path / "preview.md").read_text()
    assert f"Warning: {told}" in preview
    assert preview.count("; cut at 3 tokens") == 4
    test = run.results["winner"]["test"]["tasks"]
    assert (test["long"]["truncated"], test["choice"]["truncated"]) == (1.0, None)
    flags = {(row[3], row[6]) for row in canonical(run.path)["scores"]}
    assert flags == {("long", 1), ("choice", None)}
    scores = run.scores()
    assert scores.truncated[scores.task == "long"].all()
    result = evomerge.evaluate(family["a"], config)
    assert result.to_dict()["score"]["tasks"]["long"]["truncated"] == 1.0
    assert "(100% of the answers cut)" in str(result)
