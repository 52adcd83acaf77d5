"""An engine tells how far it is; nobody has to listen, and what is heard changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from evomerge.engines.hf import HFEngine
from evomerge.evaluation.items import Part
from evomerge.evaluation.requests import Generation, Loglikelihood, Rolling, listen
from tests.evaluation.tiny import FakeEngine, build, documents, whole, write_task

QUESTIONS = [row["question"] * (1 + i % 3) for i, row in enumerate(documents(20))]
ASKED: dict[str, list[Any]] = {
    "loglikelihood": [Loglikelihood(question, " yes") for question in QUESTIONS],
    "loglikelihood_rolling": [Rolling(question) for question in QUESTIONS],
    "generate": [Generation(question, ("e",), 2 + i % 5) for i, question in enumerate(QUESTIONS)],
}


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("kind", ASKED)
def test_every_request_is_told_once_as_it_goes(kind: str, plain: bool, model: Any, tokenizer: Any) -> None:
    engine = HFEngine(model, tokenizer, batch_tokens=120)
    if plain:
        engine._live.forks = engine._live.splits_head = False
    silent = getattr(engine, kind)(ASKED[kind])
    told: list[int] = []
    with listen(engine, told.append):
        heard = getattr(engine, kind)(ASKED[kind])
    assert heard == silent
    assert sum(told) == len(QUESTIONS)
    assert len(told) > 3
    getattr(engine, kind)(ASKED[kind])
    assert sum(told) == len(QUESTIONS)


def test_engines_that_say_nothing_are_not_asked_to() -> None:
    with listen(FakeEngine(), lambda count: pytest.fail("nobody said anything")):
        FakeEngine().generate([])


@pytest.mark.parametrize("kind", ["choice", "generate", "likelihood", "rolling"])
def test_a_suite_tells_items(kind: str, tmp_path: Path, model: Any, tokenizer: Any) -> None:
    write_task(tmp_path, kind=kind)
    suite = build(tmp_path, tokenizer=tokenizer, chat_template=False)
    (part,) = whole(suite).parts
    assert isinstance(part, Part)
    told: list[int] = []
    outcome = suite.score_part(HFEngine(model, tokenizer, batch_tokens=20), part, told.append)
    assert len(outcome.scores) == 12
    assert told == sorted(told)
    assert 0 < told[-1] < 12
    # Short texts may all be done at once.
    assert len(set(told)) > 1 or kind in ("generate", "rolling")
