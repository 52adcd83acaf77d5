"""`evomerge evaluate --tasks`: the numbers that lm-eval reports, on any kind of model, without a config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import evomerge
from evomerge.cli import main
from evomerge.errors import UserError
from evomerge.recipe import Merge, Recipe, Source
from tests.adapters import make_adapter
from tests.evaluation.test_chat import TEMPLATE
from tests.evaluation.test_library import write_group
from tests.evaluation.tiny import documents, write_task
from tests.models import make_model

FILTERS = [
    {"name": name, "filter": [{"function": "regex", "regex_pattern": pattern}, {"function": "take_first"}]}
    for name, pattern in (("strict", "^([0-9]+)$"), ("flexible", "([0-9]+)"))
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks of every kind, and groups of two of them that weigh by size or not."""
    folder = tmp_path_factory.mktemp("tasks")
    shots = {"num_fewshot": 2, "fewshot_split": "shots"}
    data = {"test": documents(24), "shots": documents(9, 500)}
    write_task(folder, "choice", data=data, **shots)
    # As hellaswag and piqa are: no test split, examples from the training split.
    write_task(folder, "more", data={"validation": documents(40, 900), "train": documents(9, 700)},
               drop=["test_split"], validation_split="validation", training_split="train", num_fewshot=2)  # fmt: skip
    # A document that comes twice counts twice, as in lm-eval.
    write_task(folder, "twice", data={"test": documents(5) + documents(5)})
    write_task(folder, "digits", "generate", filter_list=FILTERS, doc_to_target="{{gold}}")
    for kind in ("likelihood", "rolling"):
        write_task(folder, kind, kind)
    for name, by_size in (("sized", True), ("alike", False)):
        aggregate = {"metric": "acc", "weight_by_size": by_size}
        write_group(folder, name, ["choice", "more"], aggregate_metric_list=[aggregate])
    return folder


def theirs(
    folder: Path, model: Path, tasks: list[str], monkeypatch: pytest.MonkeyPatch, **options: Any
) -> dict[str, Any]:
    """Return lm-eval's results by `simple_evaluate`."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.chdir(folder)
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    lm = HFLM(
        pretrained=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        tokenizer=AutoTokenizer.from_pretrained(model),
        device="cpu",
        batch_size=8,
        softmax_dtype="float32",
    )
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    seeds = {f"{name}_random_seed": None for name in ("numpy", "torch")} | {"random_seed": None}
    results = simple_evaluate(
        lm, tasks=tasks, task_manager=manager, bootstrap_iters=200, log_samples=False, **seeds, **options
    )
    assert results is not None
    return results


@pytest.mark.parametrize("limit", [None, 7, 0.3])
def test_the_numbers_are_those_of_lm_eval(
    folder: Path, family: dict[str, Path], monkeypatch: pytest.MonkeyPatch, limit: float | None
) -> None:
    names = ["alike", "twice", "digits", "likelihood", "rolling"]
    expected = theirs(folder, family["a"], names, monkeypatch, limit=limit)
    # lm-eval refuses tasks that two names share; here they are asked once.
    found = evomerge.evaluate_tasks(family["a"], [*names, "sized"], include=[str(folder)], limit=limit)
    ours = found.to_dict()
    assert set(ours["tasks"]) == {"choice", "more", *names[1:]}
    assert list(ours["groups"]) == ["alike", "sized"]
    for name, task in ours["tasks"].items():
        reference = expected["results"][name]
        assert task["n"] == expected["n-samples"][name]["effective"]
        keys = {key for key in reference if "," in key and "_stderr" not in key}
        assert set(task["metrics"]) == keys
        for key, value in task["metrics"].items():
            assert value["value"] == pytest.approx(reference[key], rel=1e-4)
            metric, filter_ = key.split(",")
            stderr = reference[f"{metric}_stderr,{filter_}"]
            if metric == "perplexity":
                assert value["stderr"] == pytest.approx(stderr, rel=0.3)
            elif stderr == "N/A":
                assert value["stderr"] is None
            else:
                assert value["stderr"] == pytest.approx(stderr)
            low, high = value["ci95"]
            assert low <= value["value"] <= high
    group, reference = ours["groups"]["alike"]["metrics"]["acc,none"], expected["groups"]["alike"]
    assert group["value"] == pytest.approx(reference["acc,none"])
    assert group["stderr"] == pytest.approx(reference["acc_stderr,none"])


def test_a_group_by_size(folder: Path, family: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    reference = theirs(folder, family["a"], ["sized"], monkeypatch)["groups"]["sized"]
    found = evomerge.evaluate_tasks(family["a"], ["sized"], include=[str(folder)])
    (value,) = found.groups["sized"].metrics
    assert value.value == pytest.approx(reference["acc,none"])
    assert value.stderr == pytest.approx(reference["acc_stderr,none"])
    assert value.n == 64
    assert str(found).splitlines()[2].split()[:4] == ["sized", "acc", "↑", f"{value.value:.3f}"]


def test_few_shot_and_another_split(
    folder: Path, family: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = theirs(folder, family["a"], ["choice"], monkeypatch, num_fewshot=4)["results"]["choice"]
    found = evomerge.evaluate_tasks(family["a"], ["choice"], include=[str(folder)], num_fewshot=4)
    assert found.tasks["choice"].metrics[1].value == pytest.approx(reference["acc_norm,none"])
    other = evomerge.evaluate_tasks(family["a"], ["rolling"], include=[str(folder)], split="search")
    assert (other.tasks["rolling"].split, other.tasks["rolling"].n) == ("search", 12)
    assert (
        evomerge.evaluate_tasks(family["a"], ["more"], include=[str(folder)]).tasks["more"].split
        == "validation"
    )


def test_models_of_every_form_score_alike(
    folder: Path, family: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bits(model: Any, **options: Any) -> float:
        found = evomerge.evaluate_tasks(model, ["rolling"], include=[str(folder)], limit=3, **options)
        return {value.metric: value.value for value in found.tasks["rolling"].metrics}["bits_per_byte"]

    plain = bits(family["a"])
    recipe = Recipe(
        models={"a": Source(source=str(family["a"]))},
        merges={"m": Merge(method="linear", inputs=("a",), parameters={"weight": 1.0})},
    )
    assert bits(recipe) == plain
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert bits(tmp_path / "recipe.yaml") == plain
    document = {
        "merge_method": "linear",
        "models": [{"model": str(family["a"]), "parameters": {"weight": 1.0}}],
    }
    (tmp_path / "merge.yml").write_text(yaml.safe_dump(document | {"dtype": "float32"}))
    assert bits(tmp_path / "merge.yml") == pytest.approx(plain, rel=1e-6)
    assert bits(family["a"], dtype="bfloat16") == pytest.approx(plain, rel=0.02)
    assert bits(family["a"], dtype="bfloat16") != plain
    assert bits(family["a"], overrides=["engine.dtype=bfloat16"]) == bits(family["a"], dtype="bfloat16")
    adapter = make_adapter(tmp_path / "lora", family["base"])
    lora = bits(adapter)
    assert lora != bits(family["base"])
    assert bits(adapter, base=family["base"]) == lora
    with pytest.raises(UserError, match="--base: it is for adapters"):
        bits(tmp_path / "recipe.yaml", base=family["base"])


def test_a_model_with_a_chat_template(folder: Path, family: dict[str, Path], tmp_path: Path) -> None:
    chatty = make_model(tmp_path / "chatty", seed=3, base=family["base"])
    file = chatty / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": TEMPLATE}))
    options: dict[str, Any] = {"include": [str(folder)], "limit": 3}
    with pytest.raises(UserError) as caught:
        evomerge.evaluate_tasks(chatty, ["choice"], **options)
    assert str(caught.value).startswith(
        f"--chat-template: has to be written, since '{chatty}' has a chat template"
    )
    assert "true for prompts like '<user>" in str(caught.value)
    for template in (True, False):
        assert (
            evomerge.evaluate_tasks(chatty, ["choice"], chat_template=template, **options).tasks["choice"].n
            == 3
        )
    assert evomerge.evaluate_tasks(chatty, ["rolling"], **options).tasks["rolling"].n == 3


def test_the_command(
    folder: Path, family: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["evaluate", str(family["a"]), "--include", str(folder), "--limit", "3", "--device", "cpu"]
    assert main([*common, "--tasks", "digits, choice"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[1].split() == ["task", "metric", "value", "95", "%", "interval", "stderr", "n"]
    assert [line.split()[0] for line in shown[2:6]] == [
        "digits",
        "exact_match,flexible",
        "choice",
        "acc_norm",
    ]
    assert shown[-1] == "  digits: 100% of the answers were cut at their token limit"
    assert main([*common, "--tasks", str(folder / "choice.yaml"), "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["tasks"]["choice"]["n"] == 3
    assert captured.err == ""


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--tasks", "choce"], "--tasks: unknown task 'choce' (did you mean 'choice'?)"),
        (["--tasks", ","], "--tasks: is empty"),
        (["--tasks", "choice", "--split", "tset"], "no data split 'tset' (did you mean 'test'?)"),
        (["--tasks", "choice", "--limit", "0"], "--limit 0: give a number of documents"),
        (["--tasks", "choice", "--limit", "1.5"], "--limit 1.5: give a number of documents"),
        (["--tasks", "choice", "--set", "budget.hours=1"], "unknown key 'budget'"),
        (["--tasks", "choice", "--set", "suite.chat_tmplate=1"], "did you mean 'chat_template'"),
        (["--tasks", "choice", "--chat-template", "true"], "tokenizer has no chat template"),
        (["--tasks", "choice", "--config", "x.yaml"], "not allowed with argument --tasks"),
        (["--config", "x.yaml"], "--include: it is for --tasks"),
        ([], "one of the arguments --config --tasks is required"),
    ],
)
def test_mistakes(
    folder: Path,
    family: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    told: str,
) -> None:
    from evomerge.evaluation.library import Index

    monkeypatch.setattr("evomerge.evaluation.library.lm_eval_index", lambda: Index())
    assert main(["evaluate", str(family["a"]), "--include", str(folder), *arguments]) == 2
    captured = capsys.readouterr()
    assert told in captured.err
    assert captured.err.startswith("evomerge: ")
    assert captured.err.count("\n") == 1
