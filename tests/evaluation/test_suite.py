"""Scoring: what goes in, what comes out, and what makes a candidate fail."""

from __future__ import annotations

import math
import random
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evomerge.engines.hf import HFEngine
from evomerge.errors import CandidateFailed, UserError
from evomerge.evaluation.items import Block, Part, truncated_share
from evomerge.evaluation.requests import Generation, Loglikelihood
from tests.evaluation.tiny import MEAN, FakeEngine, build, documents, whole, write_task


def knows(rows: list[dict[str, Any]]) -> Any:
    """Return log-probabilities that favour the right choice of the rows."""
    right = {(row["question"], row["choices"][row["gold"]]) for row in rows}
    return lambda r: (
        0.0 if (r.context.split("\n")[0].removeprefix("Question: "), r.continuation[1:]) in right else -1.0
    )


def test_scores_come_in_the_order_of_the_block(tmp_path: Path) -> None:
    rows = documents(12)
    write_task(tmp_path)
    suite = build(tmp_path)
    known = rows[:5]
    engine = FakeEngine(knows(known))
    first = whole(suite)
    index = {item.id: item.index for item in suite.items("search")}
    shuffled = Block("search", 1, (Part("tiny", tuple(random.Random(1).sample(first.items, 12)), "p:1"),))
    for block in (first, shuffled):
        scores = suite.score(engine, block)
        assert tuple(score.item for score in scores) == block.items
        # Where nothing is favoured, argmax takes the first choice.
        wanted = [float(index[i] < 5 or rows[index[i]]["gold"] == 0) for i in block.items]
        assert [score.value for score in scores] == wanted
        assert {score.task for score in scores} == {"tiny"}


def test_blocks_of_part_of_the_items_and_of_several_tasks(tmp_path: Path) -> None:
    write_task(tmp_path, "one")
    write_task(tmp_path, "two", "generate")
    suite = build(tmp_path, "one", {"task": "two", "weight": 2.5})
    assert suite.weights == {"one": 1.0, "two": 2.5}
    answer = {row["question"]: row["answer"] for row in documents(6)}
    engine = FakeEngine(
        knows(documents(12)), lambda r: answer.get(r.context.split("\n")[0].removeprefix("Question: "), "x")
    )
    index = {item.id: item.index for item in suite.items("search")}
    for block in suite.blocks("search", seed=0, block_items=5, packing="p:1"):
        for score in suite.score(engine, block):
            assert score.value == (1.0 if score.task == "one" else float(index[score.item] < 6))


def test_an_answer_never_outlives_its_candidate(tmp_path: Path) -> None:
    write_task(tmp_path, kind="generate")
    suite = build(tmp_path)
    block = whole(suite)
    right = FakeEngine(text=lambda r: f"it is {int(r.context.split()[3]) + 1}")
    wrong = FakeEngine(text=lambda r: f"other {r.context}")
    assert all(score.value == 1 for score in suite.score(right, block))
    assert all(score.value == 0 for score in suite.score(wrong, block))
    assert all(score.value == 1 for score in suite.score(right, block))


def test_blocks_of_other_data_are_refused(tmp_path: Path) -> None:
    write_task(tmp_path)
    block = whole(build(tmp_path))
    write_task(tmp_path, target_delimiter=": ")
    with pytest.raises(UserError, match="12 of 12 items of a part of task 'tiny' are not in the suite"):
        build(tmp_path).score(FakeEngine(), block)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_log_probability_that_is_not_finite_fails_the_candidate(tmp_path: Path, bad: float) -> None:
    write_task(tmp_path, data={"search": [{**r, "gold": 0} for r in documents(3)], "validation": documents(1, 50),
                               "test": documents(1, 60)})  # fmt: skip
    suite = build(tmp_path)
    with pytest.raises(CandidateFailed, match="not finite"):
        suite.score(FakeEngine(lambda r: bad if "about 2" in r.continuation else -1.0), whole(suite))


@pytest.mark.parametrize("kind", ["choice", "generate", "likelihood", "rolling"])
@pytest.mark.parametrize("where", ["all", "head", "one"])
def test_a_model_with_nan_weights_fails_and_never_scores(
    tmp_path: Path, family: dict[str, Path], tokenizer: Any, kind: str, where: str
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(family["base"], dtype=torch.float32)
    write_task(tmp_path, kind=kind, data={"search": [{**r, "gold": 0} for r in documents(12)],
                                          "validation": documents(1, 50), "test": documents(1, 60)})  # fmt: skip
    suite = build(tmp_path)
    engine = HFEngine(model, tokenizer, batch_tokens=512)
    with torch.no_grad():
        if where == "all":
            for parameter in model.parameters():
                parameter.fill_(math.nan)
        elif where == "head":
            model.lm_head.weight.fill_(math.inf)
        else:
            model.lm_head.weight[77, 3] = math.nan
    with pytest.raises(CandidateFailed, match="not finite"):
        suite.score(engine, whole(suite), check_degenerate=False)


def test_answers_that_do_not_depend_on_the_items_fail_the_candidate(tmp_path: Path) -> None:
    write_task(tmp_path, "one")
    write_task(tmp_path, "two", "generate")
    constant: dict[str, Any] = {"logprob": lambda r: -1.0, "text": lambda r: ""}
    both = build(tmp_path, "one", "two")
    with pytest.raises(
        CandidateFailed, match="degenerate answers: task 'one' has choice 0 for each of 12 items"
    ):
        both.score(FakeEngine(**constant), whole(both))
    assert both.score(FakeEngine(**constant), whole(both), check_degenerate=False)
    # A task that is not learnt at all is a low score as long as the other one is read.
    assert both.score(FakeEngine(knows(documents(12)), lambda r: ""), whole(both))
    generated = build(tmp_path, "two")
    with pytest.raises(CandidateFailed, match="task 'two' has 'same' for each of 12 items"):
        generated.score(FakeEngine(text=lambda r: " same\n"), whole(generated))
    few = generated.blocks("search", seed=0, block_items=6, packing="p:1")[0]
    assert generated.score(FakeEngine(**constant), few)


def test_the_same_gold_everywhere_is_no_reason_to_fail(tmp_path: Path) -> None:
    write_task(tmp_path, data={"search": [{**r, "gold": 2} for r in documents(30)], "validation": documents(1, 50),
                               "test": documents(1, 60)})  # fmt: skip
    suite = build(tmp_path)
    engine = FakeEngine(lambda r: 0.0 if "nothing like" in r.continuation else -1.0)
    assert {score.value for score in suite.score(engine, whole(suite))} == {1.0}


def test_nothing_is_rebuilt_tokenised_or_drawn_for_a_candidate(
    tmp_path: Path, model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.api.task import ConfigurableTask

    write_task(tmp_path, "one")
    write_task(tmp_path, "two", "generate")
    suite = build(tmp_path, "one", "two")
    engine = HFEngine(model, tokenizer, batch_tokens=512)
    block = whole(suite)
    first = suite.score(engine, block, check_degenerate=False)

    def forbidden(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("built again")

    for name in ("fewshot_context", "construct_requests", "build_all_requests", "download", "__init__"):
        monkeypatch.setattr(ConfigurableTask, name, forbidden)
    for name in ("doc_to_text", "doc_to_target", "doc_to_choice"):
        monkeypatch.setattr(ConfigurableTask, name, forbidden)
    monkeypatch.setattr("lm_eval.utils.apply_template", forbidden)
    monkeypatch.setattr("evomerge.engines.encoding.Encoder.pair", forbidden)
    monkeypatch.setattr("evomerge.engines.encoding.Encoder.prompt", forbidden)
    assert suite.score(engine, block, check_degenerate=False) == first


def test_building_and_scoring_draw_no_global_random_numbers(
    tmp_path: Path, model: Any, tokenizer: Any
) -> None:
    write_task(tmp_path, "one", data={s: documents(9, 100 * i) for i, s in enumerate(
        ("search", "validation", "test", "shots"))}, fewshot_split="shots", num_fewshot=2)  # fmt: skip
    for kind in ("generate", "likelihood", "rolling"):
        write_task(tmp_path, kind, kind)
    (tmp_path / "texts.txt").write_text("\n\n".join(f"Text {i} of many." for i in range(30)))

    def state() -> tuple[Any, ...]:
        name, keys, *rest = np.random.get_state()
        return random.getstate(), name, tuple(keys), *rest, tuple(torch.get_rng_state().tolist())

    before = state()
    gold = {"task": "one", "name": "gold", "metric": "gold_nll"}
    suite = build(
        tmp_path, "one", gold, "generate", "likelihood", "rolling", {"text": str(tmp_path / "texts.txt")}
    )
    for plain in (False, True):
        engine = HFEngine(model, tokenizer, batch_tokens=512)
        if plain:
            engine._live.forks = engine._live.splits_head = False
        suite.score(engine, whole(suite), check_degenerate=False)
        assert state() == before


def test_building_and_scoring_open_no_connection_and_start_no_process(
    tmp_path: Path, model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError(f"connection or process: {args}")

    monkeypatch.setattr(socket.socket, "connect", forbidden)
    monkeypatch.setattr(socket.socket, "connect_ex", forbidden)
    monkeypatch.setattr(socket, "getaddrinfo", forbidden)
    monkeypatch.setattr(subprocess.Popen, "__init__", forbidden)
    monkeypatch.setattr("os.fork", forbidden)
    for kind in ("choice", "generate", "likelihood", "rolling"):
        write_task(tmp_path, kind, kind)
    suite = build(
        tmp_path,
        "choice",
        "generate",
        "likelihood",
        {"task": "rolling", "metric": "bits_per_byte"},
        splits_needed=("search",),
    )
    suite.score(HFEngine(model, tokenizer, batch_tokens=512), whole(suite), check_degenerate=False)


def test_progress_bars_and_lm_evals_log_stay_quiet(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_task(tmp_path)
    suite = build(tmp_path)
    suite.score(FakeEngine(), whole(suite), check_degenerate=False)
    assert capfd.readouterr() == ("", "")


def test_previews(tmp_path: Path) -> None:
    for kind in ("choice", "generate", "likelihood", "rolling"):
        write_task(tmp_path, kind, kind)
    suite = build(tmp_path, "choice", "generate", {"task": "likelihood", "metric": "perplexity"}, "rolling")
    engine = FakeEngine(knows(documents(12)), lambda r: "it is 4")
    items = {(item.task, item.index): item for item in suite.items("search")}

    choice = suite.preview(engine, items["choice", 3])
    assert choice.prompt == "Question: What follows 3 and 8?\nAnswer:"
    assert (choice.extracted, choice.reference, choice.raw, choice.extracted_ok) == ("no", "no", 1.0, True)

    text = suite.preview(engine, items["generate", 3].id)
    assert (text.task, text.answer, text.extracted, text.reference, text.raw) == (
        "generate", "it is 4", "it is 4", "it is 4", 1.0)  # fmt: skip
    assert not suite.preview(FakeEngine(text=lambda r: " "), items["generate", 3]).extracted_ok

    likelihood = suite.preview(FakeEngine(lambda r: -2.0), items["likelihood", 3])
    assert likelihood.answer == "log-probability -2.0000"
    assert likelihood.raw == pytest.approx(math.exp(2))
    assert suite.preview(engine, items["rolling", 3]).reference == "What follows 3 and 8?"


def test_an_engine_is_asked_what_the_task_says(tmp_path: Path) -> None:
    write_task(tmp_path, kind="generate", generation_kwargs={"until": ["\n", "END"], "max_gen_toks": 5})
    suite = build(tmp_path, {"task": "tiny", "gen_kwargs": {"max_gen_toks": 7}}, splits_needed=("search",))
    engine = FakeEngine()
    suite.score(engine, whole(suite))
    assert set(engine.asked) == {
        Generation(f"Question: {row['question']}\nAnswer:", ("\n", "END"), 7) for row in documents(12)
    }


def test_acc_mutual_info_asks_the_choices_alone_too(tmp_path: Path) -> None:
    write_task(tmp_path, metric_list=[{"metric": "acc_mutual_info", **MEAN}])
    suite = build(tmp_path, splits_needed=("search",))
    engine = FakeEngine(knows(documents(12)))
    assert {score.value for score in suite.score(engine, whole(suite))} <= {0.0, 1.0}
    assert Loglikelihood("", " no") in engine.asked


def test_importing_items_and_the_schemas_stays_light() -> None:
    code = (
        "import sys, evomerge.evaluation.items, evomerge.evaluation.blocks, evomerge.evaluation.preview; "
        "print([m for m in ('torch', 'lm_eval', 'datasets', 'transformers') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_one_task_may_stand_in_the_suite_with_several_metrics(tmp_path: Path) -> None:
    write_task(tmp_path)
    suite = build(
        tmp_path, {"task": "tiny", "metric": "acc"}, {"task": "tiny", "metric": "acc_norm", "weight": 3}
    )
    assert suite.weights == {"tiny:acc": 1.0, "tiny:acc_norm": 3.0}
    engine = FakeEngine()
    scores = suite.score(engine, whole(suite), check_degenerate=False)
    assert len(scores) == len({score.item for score in scores}) == 24
    for metric in ("acc", "acc_norm"):
        alone = build(tmp_path, {"task": "tiny", "metric": metric})
        expected = [(s.item, s.raw) for s in alone.score(engine, whole(alone), check_degenerate=False)]
        assert sorted((s.item, s.raw) for s in scores if s.task == f"tiny:{metric}") == sorted(expected)


def test_the_same_items_under_two_names_are_refused(tmp_path: Path) -> None:
    write_task(tmp_path)
    with pytest.raises(
        UserError, match=r"suite\.tasks\.1: task 'again' asks and scores the very items of 'tiny'"
    ):
        build(tmp_path, "tiny", {"task": "tiny", "name": "again"})


def test_answers_that_were_cut_are_counted(tmp_path: Path) -> None:
    write_task(tmp_path, "one")
    write_task(tmp_path, "two", "generate")
    suite = build(tmp_path, "one", "two")
    cut = {row["question"] for row in documents(3)}
    engine = FakeEngine(truncated=lambda r: r.context.split("\n")[0].removeprefix("Question: ") in cut)
    index = {item.id: item.index for item in suite.items("search")}
    scores = suite.score(engine, whole(suite), check_degenerate=False)
    for score in scores:
        assert score.truncated == (None if score.task == "one" else index[score.item] < 3)
    assert truncated_share(s for s in scores if s.task == "one") is None
    assert truncated_share(scores) == 3 / 12
    items = {(item.task, item.index): item for item in suite.items("search")}
    assert suite.preview(engine, items["two", 2]).truncated
    assert suite.preview(engine, items["two", 2]).max_tokens == 8
    assert suite.preview(engine, items["two", 3]).truncated is False
    assert suite.preview(engine, items["one", 2]).truncated is None
