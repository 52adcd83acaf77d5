"""Gold objectives: the log-probability of the right answer, on tasks of every type that has one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from evomerge.engines.hf import HFEngine
from evomerge.errors import CandidateFailed, UserError
from evomerge.evaluation.requests import Loglikelihood
from tests.evaluation.tiny import FakeEngine, build, documents, whole, write_task

METRICS = ("gold_nll", "gold_bits_per_byte")
PROMPT = "Question: {{question}}\nAnswer:"


def expected_pair(kind: str, row: dict[str, Any]) -> tuple[str, str]:
    """Return prompt and right answer of a document, written out by hand."""
    prompt = f"Question: {row['question']}\nAnswer:"
    answer = row["choices"][row["gold"]] if kind == "choice" else row["answer"]
    return prompt, answer if kind == "likelihood" else f" {answer}"


@pytest.fixture(scope="module")
def lm(model: Any, tokenizer: Any) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", softmax_dtype="float32", batch_size=1)


def theirs(lm: Any, pairs: list[tuple[str, str]]) -> list[float]:
    """Return lm-eval's log-probabilities."""
    from lm_eval.api.instance import Instance

    instances = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    return [logprob for logprob, _ in lm.loglikelihood(instances, disable_tqdm=True)]


@pytest.mark.parametrize("kind", ["choice", "likelihood", "generate"])
@pytest.mark.parametrize("metric", METRICS)
def test_each_item_is_lm_evals_log_probability_of_the_right_answer(
    tmp_path: Path, model: Any, tokenizer: Any, lm: Any, kind: str, metric: str
) -> None:
    rows = [{**row, "answer": row["answer"] + " – ça"} for row in documents(12)]
    data = {"search": rows, "validation": documents(3, 50), "test": documents(3, 60)}
    write_task(tmp_path, kind=kind, data=data)
    suite = build(tmp_path, {"task": "tiny", "metric": metric})
    assert (suite.tasks[0].metric, suite.tasks[0].higher_is_better) == (metric, False)
    scores = suite.score(HFEngine(model, tokenizer, batch_tokens=300), whole(suite))
    index = {item.id: item.index for item in suite.items("search")}
    pairs = [expected_pair(kind, rows[index[score.item]]) for score in scores]
    for score, (_, answer), logprob in zip(scores, pairs, theirs(lm, pairs), strict=True):
        size = len(answer.encode())
        assert size > len(answer) or kind == "choice"
        wanted = -logprob if metric == "gold_nll" else -logprob / size / math.log(2)
        np.testing.assert_allclose(score.raw, wanted, rtol=1e-5)
        np.testing.assert_allclose(score.value, math.exp(logprob / size), rtol=1e-5)


def test_one_log_probability_is_asked_of_each_item_and_nothing_else(tmp_path: Path) -> None:
    for kind in ("choice", "generate"):
        write_task(tmp_path, kind, kind)
    tasks = [{"task": kind, "metric": "gold_nll"} for kind in ("choice", "generate")]
    suite = build(tmp_path, *tasks, splits_needed=("search",))
    engine = FakeEngine()
    suite.score(engine, whole(suite))
    wanted = {
        Loglikelihood(*expected_pair(kind, row)) for kind in ("choice", "generate") for row in documents(12)
    }
    assert set(engine.asked) == wanted
    assert len(engine.asked) == 24


def test_the_first_of_several_references_counts(tmp_path: Path) -> None:
    write_task(tmp_path, kind="generate", doc_to_target="choices", target_delimiter="->")
    suite = build(tmp_path, {"task": "tiny", "metric": "gold_nll"})
    engine = FakeEngine()
    suite.score(engine, whole(suite))
    assert {request.continuation for request in engine.asked} == {f"->{i + 1}" for i in range(12)}
    write_task(tmp_path, "several", doc_to_target="{{[2, gold]}}")
    suite = build(tmp_path, {"task": "several", "metric": "gold_nll"})
    engine = FakeEngine()
    suite.score(engine, whole(suite))
    assert {request.continuation for request in engine.asked} == {f" nothing like {i * 3}" for i in range(12)}


def test_few_shot_examples_come_before_the_prompt(tmp_path: Path) -> None:
    data = {"search": documents(4), "validation": documents(4, 20), "test": documents(4, 40),
            "shots": documents(6, 500)}  # fmt: skip
    write_task(
        tmp_path, data=data, fewshot_split="shots", fewshot_config={"sampler": "first_n"}, num_fewshot=2
    )
    suite = build(tmp_path, {"task": "tiny", "metric": "gold_nll"})
    engine = FakeEngine()
    suite.score(engine, whole(suite))
    shots = "".join("".join(expected_pair("choice", row)) + "\n\n" for row in documents(2, 500))
    assert {r.context for r in engine.asked} == {shots + expected_pair("choice", r)[0] for r in documents(4)}


class Chat:
    """A tokenizer that can do nothing but render chats."""

    chat_template = "yes"

    def apply_chat_template(self, history: list[dict[str, str]], **options: Any) -> str:
        turns = "".join(f"<{turn['role']}>{turn['content']}" for turn in history)
        return turns + ("<assistant>" if options["add_generation_prompt"] else "")


@pytest.mark.parametrize("kind", ["choice", "generate"])
@pytest.mark.parametrize("prefix", [None, "It is:"])
def test_the_answer_follows_the_generation_prompt_of_a_chat(
    tmp_path: Path, kind: str, prefix: str | None
) -> None:
    write_task(tmp_path, kind=kind, **({"gen_prefix": prefix} if prefix else {}))
    suite = build(tmp_path, {"task": "tiny", "metric": "gold_nll"}, chat_template=True, tokenizer=Chat())
    engine = FakeEngine()
    suite.score(engine, whole(suite))
    wanted = set()
    for row in documents(12):
        prompt, answer = expected_pair(kind, row)
        opening = f"<user>{prompt}<assistant>{prefix or ''}"
        wanted.add((opening, answer if prefix else answer.removeprefix(" ")))
    assert {(request.context, request.continuation) for request in engine.asked} == wanted


def test_accuracy_and_gold_of_one_task_stand_side_by_side(tmp_path: Path) -> None:
    write_task(tmp_path)
    suite = build(
        tmp_path, {"task": "tiny", "metric": "acc"}, {"task": "tiny", "metric": "gold_bits_per_byte"}
    )
    assert list(suite.weights) == ["tiny:acc", "tiny:gold_bits_per_byte"]
    for split in ("search", "validation", "test"):
        items = suite.items(split)
        assert len({item.id for item in items}) == len(items) == 24
        of = {name: {item.index for item in items if item.task == name} for name in suite.weights}
        assert of["tiny:acc"] == of["tiny:gold_bits_per_byte"]


def test_documents_fall_into_the_same_splits_whatever_the_metric(tmp_path: Path) -> None:
    from evomerge.suite_config import Splits

    write_task(tmp_path, data={"pool": documents(60)}, test_split="pool")
    cut = Splits.model_validate({"from": "pool"})
    indices = []
    for metric in ("acc", *METRICS):
        suite = build(tmp_path, {"task": "tiny", "metric": metric}, splits=cut)
        indices.append([{item.index for item in suite.items(s)} for s in ("search", "validation", "test")])
    assert indices[0] == indices[1] == indices[2]
    ids = [build(tmp_path, {"task": "tiny", "metric": m}, splits=cut).sha256("search") for m in METRICS]
    assert ids[0] != ids[1]


def refusal(folder: Path, metric: str) -> str:
    with pytest.raises(UserError) as caught:
        build(folder, {"task": "tiny", "metric": metric})
    return str(caught.value)


def test_misuse_is_told_in_one_sentence(tmp_path: Path) -> None:
    write_task(tmp_path, kind="rolling")
    assert refusal(tmp_path, "gold_nll") == (
        "search.yaml: suite.tasks.0.metric: task 'tiny' scores whole texts, which have no prompt and answer; "
        "use bits_per_byte"
    )
    write_task(tmp_path, kind="generate")
    assert "(did you mean 'gold_nll'?)" in refusal(tmp_path, "gold_nlll")
    assert refusal(tmp_path, "gold_nll,none").endswith(
        "metric 'gold_nll' filters nothing; write 'gold_nll' alone"
    )
    write_task(tmp_path, kind="generate", doc_to_target="{{'' if gold == 0 else answer}}")
    assert "document 0 of task 'tiny' has no reference answer" in refusal(tmp_path, "gold_nll")
    write_task(tmp_path, doc_to_target="{{-100 if gold == 1 else gold}}")
    assert "has no reference answer to compute gold_nll of" in refusal(tmp_path, "gold_nll")


def test_a_task_whose_own_metric_is_no_mean_can_still_be_searched(tmp_path: Path) -> None:
    bleu = {"metric": "bleu", "aggregation": "bleu", "higher_is_better": True}
    write_task(tmp_path, kind="generate", metric_list=[bleu])
    assert refusal(tmp_path, "auto").endswith("usable: 'gold_nll', 'gold_bits_per_byte'")
    assert build(tmp_path, {"task": "tiny", "metric": "gold_nll"}).tasks[0].metric == "gold_nll"


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_an_answer_without_a_finite_probability_fails_the_candidate(tmp_path: Path, bad: float) -> None:
    write_task(tmp_path)
    suite = build(tmp_path, {"task": "tiny", "metric": "gold_nll"})
    with pytest.raises(CandidateFailed, match="not finite"):
        suite.score(FakeEngine(lambda r: bad), whole(suite))


def test_the_preview_shows_prompt_and_reference(tmp_path: Path) -> None:
    write_task(tmp_path, kind="generate")
    suite = build(tmp_path, {"task": "tiny", "metric": "gold_nll"})
    item = suite.items("search")[0]
    shown = suite.preview(FakeEngine(lambda r: -2.5), item)
    prompt, answer = expected_pair("generate", documents(12)[item.index])
    assert (shown.prompt, shown.reference, shown.raw) == (prompt, answer, 2.5)
    assert suite.references("tiny")[0] == (prompt, answer)


def test_small_changes_of_the_weights_are_seen(
    tmp_path: Path, family: dict[str, Path], tokenizer: Any
) -> None:
    """Half a per cent of noise changes no choice of 64 items, but every gold score."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(family["base"], dtype=torch.float32)
    data = {"search": documents(64), "validation": documents(1, 500), "test": documents(1, 600)}
    write_task(tmp_path, data=data)
    suite = build(tmp_path, {"task": "tiny", "metric": "acc"}, {"task": "tiny", "metric": "gold_nll"})
    engine = HFEngine(model, tokenizer, batch_tokens=512)
    before = suite.score(engine, whole(suite), check_degenerate=False)
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.005 * torch.randn(parameter.shape, generator=noise))
    after = suite.score(engine, whole(suite), check_degenerate=False)
    changed = {name: sum(a.value != b.value for a, b in zip(before, after, strict=True) if a.task == name)
               for name in suite.weights}  # fmt: skip
    assert changed["tiny:gold_nll"] == 64
    assert changed["tiny:acc"] <= 3


def test_configs_of_this_kind_are_valid_yaml() -> None:
    from evomerge.suite_config import Suite

    text = "tasks: [{task: a, metric: exact_match}, {task: a, metric: gold_nll, weight: 0.5}, b]"
    suite = Suite.model_validate(yaml.safe_load(text))
    assert [task.name for task in suite.tasks] == ["a:exact_match", "a:gold_nll", "b"]
    again = Suite.model_validate(suite.model_dump(exclude_none=True))
    assert again == suite
