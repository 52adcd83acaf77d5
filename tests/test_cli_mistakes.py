"""The user's mistakes, one by one: one sentence, exit code 2, nothing lost."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from evomerge.checkpoints import CheckpointWriter
from evomerge.cli import main
from evomerge.searching.rundir import open_run
from tests.models import make_model, make_tokenizer
from tests.tasks import make_config, make_tasks

Edit = Callable[[dict[str, Any], Path], None]


@pytest.fixture
def own(tmp_path: Path, family: dict[str, Path]) -> tuple[Path, dict[str, Path]]:
    """A config with copies of the models and tasks that a test may spoil."""
    models = {name: Path(shutil.copytree(path, tmp_path / name)) for name, path in family.items()}
    return make_config(tmp_path, models, make_tasks(tmp_path / "tasks")), models


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that must be refused; return its one sentence."""
    capsys.readouterr()
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [line for line in captured.err.splitlines() if line.startswith("evomerge: ")]
    assert len(lines) == 1
    assert "Traceback" not in captured.err
    return lines[0]


def rewrite(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    data = yaml.safe_load(path.read_text())
    edit(data)
    path.write_text(yaml.safe_dump(data, sort_keys=False))


def test_config_mistakes(
    own: tuple[Path, dict[str, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, _ = own
    run = tmp_path / "run"
    for override, words in {
        "optimiser.type=cma": ["optimiser", "did you mean 'optimizer'"],
        "space.method=task_arithmetics": ["space", "did you mean 'task_arithmetic'"],
        "budget.candidates=0": ["budget.candidates", "0"],
        "models.base=./nowhere": ["nowhere", "no such folder"],
        "suite.tasks=[{task: tiny_aa}]": ["tiny_aa", "did you mean 'tiny_a'"],
        "suite.tasks=[{task: tiny_a, metric: accuracy}]": ["accuracy", "acc"],
        "splits={search: search, validation: val, test: test}": ["val", "validation"],
        "budget.candidates=3": ["budget.candidates", "at least 4"],
        "space={method: slerp, parameters: {t: {range: [0, 1]}}}": ["slerp", "exactly 2"],
        "seed=-1": ["seed", "-1"],
    }.items():
        sentence = refused(capsys, "search", str(config), "--run", str(run), "--set", override)
        for word in words:
            assert word in sentence, (override, sentence)
        assert not run.exists()
    assert "no such config" in refused(capsys, "search", str(tmp_path / "none.yaml"))
    assert "CONFIG" in refused(capsys, "search")
    assert "did you mean" in refused(capsys, "methods", "tis")


def truncate(models: dict[str, Path]) -> None:
    weights = models["b"] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def other_size(models: dict[str, Path]) -> None:
    shutil.rmtree(models["b"])
    make_model(models["b"], hidden=64)


def not_a_number(models: dict[str, Path]) -> None:
    weights = load_file(models["b"] / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(weights, models["b"] / "model.safetensors", metadata={"format": "pt"})


def missing_tensor(models: dict[str, Path]) -> None:
    weights = load_file(models["b"] / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, models["b"] / "model.safetensors", metadata={"format": "pt"})


def broken_tokenizer(models: dict[str, Path]) -> None:
    make_tokenizer(models["b"])
    path = models["b"] / "tokenizer.json"
    path.write_text(path.read_text()[:-1000])


def adapter_only(models: dict[str, Path]) -> None:
    shutil.rmtree(models["b"])
    models["b"].mkdir()
    (models["b"] / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8}')


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (truncate, ["model.safetensors", "truncated"]),
        (other_size, ["hidden_size", "64", "32"]),
        (not_a_number, ["model.layers.1.mlp.up_proj.weight", "NaN"]),
        (missing_tensor, ["model.layers.1.mlp.up_proj.weight"]),
        (broken_tokenizer, ["tokenizer.json"]),
        (adapter_only, ["adapter"]),
    ],
)
def test_unusable_models(
    spoil: Callable[[dict[str, Path]], None],
    words: list[str],
    own: tuple[Path, dict[str, Path]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config, models = own
    spoil(models)
    sentence = refused(capsys, "search", str(config), "--run", str(tmp_path / "run"))
    for word in words:
        assert word in sentence
    assert not (tmp_path / "run").exists()


def test_tasks_that_cannot_be_used(
    own: tuple[Path, dict[str, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, _ = own
    task = tmp_path / "tasks" / "tiny_a.yaml"
    good = task.read_text()

    items = tmp_path / "tasks" / "tiny_a_validation.jsonl"
    rows = items.read_text()
    items.write_text("")
    assert "tiny_a" in refused(capsys, "search", str(config))
    items.write_text((tmp_path / "tasks" / "tiny_a_search.jsonl").read_text())
    sentence = refused(capsys, "search", str(config))
    assert "search" in sentence
    assert "validation" in sentence
    items.write_text(rows)

    marker = tmp_path / "ran"
    (tmp_path / "tasks" / "code.py").write_text(
        f"open({str(marker)!r}, 'w')\ndef f(doc): return doc['prompt']\n"
    )
    task.write_text(good.replace("doc_to_text: '{{prompt}}'", "doc_to_text: !function code.f"))
    assert "trust_task_code" in refused(capsys, "search", str(config))
    assert not marker.exists()


def test_a_run_that_exists_and_a_run_that_is_driven(
    own: tuple[Path, dict[str, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, _ = own
    run = tmp_path / "run"
    assert main(["search", str(config), "--run", str(run), "--set", "budget.candidates=4"]) == 0
    results = (run / "results.json").read_bytes()
    assert "evomerge resume" in refused(capsys, "search", str(config), "--run", str(run))
    store = open_run(run)
    try:
        assert "another evomerge process" in refused(capsys, "resume", str(run))
    finally:
        store.close()
    assert (run / "results.json").read_bytes() == results
    assert "no such run" in refused(capsys, "resume", str(tmp_path / "nothing"))
    assert "not a run" in refused(capsys, "status", str(tmp_path))
    assert "candidates" in refused(capsys, "resume", str(run), "--budget", "candidates")
    assert "candidates" in refused(capsys, "resume", str(run), "--budget", "candidates=none")
    assert "there is no candidate 99" in refused(
        capsys, "export", str(run), "--out", str(tmp_path / "out"), "--candidate", "99"
    )
    assert "exists already" in refused(capsys, "export", str(run), "--out", str(tmp_path / "tasks"))
    assert not (tmp_path / "out").exists()


def test_a_recipe_with_mistakes(
    own: tuple[Path, dict[str, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, models = own
    recipe = tmp_path / "recipe.yaml"
    good = {
        "evomerge": 1,
        "models": {name: str(path) for name, path in models.items()},
        "merges": {
            "m": {"method": "ties", "base": "base", "inputs": ["a", "b"], "parameters": {"weight": 0.5}}
        },
    }
    for change, word in [
        ({"evomerge": 2}, "version"),
        ({"merge": {}}, "did you mean 'merges'"),
        ({"merges": {"m": {**good["merges"]["m"], "base": None}}}, "base"),
        ({"merges": {"m": {**good["merges"]["m"], "inputs": ["a", "x"]}}}, "'x'"),
        ({"merges": {"m": {**good["merges"]["m"], "parameters": {"densty": 0.5}}}}, "did you mean 'density'"),
        ({"merges": {"m": {**good["merges"]["m"], "parameters": {"density": 1.5}}}}, "1.5"),
        ({"path": [{"merge": "m", "layer": 7}]}, "7"),
    ]:
        recipe.write_text(yaml.safe_dump({**good, **change}))
        sentence = refused(capsys, "merge", str(recipe), str(tmp_path / "out"))
        assert word in sentence, sentence
        assert not (tmp_path / "out").exists()
    recipe.write_text(yaml.safe_dump(good))
    assert "output folder" in refused(capsys, "merge", str(recipe), str(models["a"]))
    assert "not an empty folder" in refused(capsys, "merge", str(recipe), str(tmp_path / "tasks"))
    assert main(["merge", str(recipe), str(tmp_path / "out")]) == 0


def test_rules_that_select_nothing_are_named(
    own: tuple[Path, dict[str, Path]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, models = own
    rules = [
        {"layers": [99], "parameters": {"weight": 0.1}},
        {"layers": [1], "tensors": "*self_attn*", "parameters": {"weight": 0.2}},
        {"tensors": "*self_atn*", "parameters": {"weight": 0.3}},
    ]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump(
            {
                "evomerge": 1,
                "models": {name: str(path) for name, path in models.items()},
                "merges": {"m": {"method": "ties", "base": "base", "inputs": ["a", "b"], "rules": rules}},
            }
        )
    )
    assert main(["merge", str(recipe), str(tmp_path / "out")]) == 0
    said = [
        record.getMessage() for record in caplog.records if "no tensor is selected" in record.getMessage()
    ]
    assert [sentence.split(":")[0] for sentence in said] == ["merges.m.rules.0", "merges.m.rules.2"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_merge_that_is_stopped_leaves_nothing(
    number: signal.Signals,
    own: tuple[Path, dict[str, Path]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, models = own
    recipe = tmp_path / "recipe.yaml"
    merge = {"method": "ties", "base": "base", "inputs": ["a", "b"]}
    sources = {name: str(path) for name, path in models.items()}
    recipe.write_text(yaml.safe_dump({"evomerge": 1, "models": sources, "merges": {"m": merge}}))
    before = set(tmp_path.iterdir())
    handlers = {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)}
    allocate, discard = CheckpointWriter._allocate, CheckpointWriter._discard

    def stop(self: CheckpointWriter, *arguments: Any) -> None:
        allocate(self, *arguments)
        signal.raise_signal(number)

    def again(self: CheckpointWriter) -> None:
        signal.raise_signal(number)
        discard(self)

    monkeypatch.setattr(CheckpointWriter, "_allocate", stop)
    monkeypatch.setattr(CheckpointWriter, "_discard", again)
    assert main(["merge", str(recipe), str(tmp_path / "out")]) == 75
    assert "was not written" in capsys.readouterr().err
    assert set(tmp_path.iterdir()) == before
    assert {one: signal.getsignal(one) for one in handlers} == handlers
