"""The user's mistakes, one by one: one sentence, exit code 2, nothing lost."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import evomerge
from evomerge.checkpoints import CheckpointWriter
from evomerge.cli import main
from evomerge.errors import UserError
from evomerge.recipe import Recipe
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


def test_what_does_not_fit_the_models_names_the_recipe_and_the_key(
    own: tuple[Path, dict[str, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, models = own
    recipe = tmp_path / "recipe.yaml"
    merge: dict[str, Any] = {"method": "ties", "base": "base", "inputs": ["a", "b"]}
    nowhere = {**{name: str(path) for name, path in models.items()}, "b": "./nowhere"}
    texts = {"method": "fisher", "inputs": ["a", "b"], "data": {"texts": "./none.jsonl"}}
    partial = {
        **merge,
        "method": "linear",
        "base": None,
        "parameters": {"weight": [{"filter": "mlp", "value": 1}]},
    }
    vocabulary = {"source": "base", "tokens": {"<none>": {"source": {"model": "a"}}}}
    pinned = {**nowhere, "b": {"source": str(models["b"]), "sha256": "0" * 64}}
    trim = {**merge, "parameters": {"trim": "global", "density": [0.1, 0.9]}}
    home = {**nowhere, "b": "~nobody-of-this-name/b"}
    for change, start in [
        (
            {"path": [{"merge": "m", "layer": 0}, {"merge": "m", "layer": 7}]},
            "path.1.layer: 'm' has the layers 0",
        ),
        (
            {"path": [{"merge": "m", "layer": 0, "layers": {"a": 9}}]},
            "path.0.layers.a: 'a' has the layers 0 to",
        ),
        ({"models": nowhere}, f"models.b: {tmp_path / 'nowhere'}: no such folder"),
        ({"models": home}, "models.b: ~nobody-of-this-name/b: there is no such home folder"),
        ({"models": pinned}, "models.b.sha256: the recipe expects 000"),
        ({"merges": {"m": texts}}, f"merges.m.data.texts: {tmp_path / 'none.jsonl'}: no such file of texts"),
        ({"merges": {"m": partial}}, "merges.m: tensor '"),
        ({"merges": {"m": trim}}, "trim: global ranks all tensors together"),
        (
            {"output": {"tokenizer": vocabulary}},
            "output.tokenizer.tokens.<none>: the output's tokenizer has no such",
        ),
        ({"output": {"chat_template": "{% if %}"}}, "output.chat_template: line 1: not a Jinja template"),
        (
            {"output": {"chat_template": "none.jinja"}},
            f"output.chat_template: {tmp_path / 'none.jinja'}: no such",
        ),
    ]:
        good = {
            "evomerge": 1,
            "models": {name: str(path) for name, path in models.items()},
            "merges": {"m": merge},
        }
        recipe.write_text(yaml.safe_dump({**good, **change}))
        sentence = refused(capsys, "merge", str(recipe), str(tmp_path / "out"))
        assert sentence.startswith(f"evomerge: {recipe}: {start}"), sentence
        assert sentence.count(str(recipe)) == 1
        with pytest.raises(UserError) as raised:
            evomerge.merge(recipe, tmp_path / "out")
        assert f"evomerge: {raised.value}" == sentence
        assert not (tmp_path / "out").exists()


def test_a_recipe_that_is_no_file_has_no_name(own: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    _, models = own
    sources = {name: str(path) for name, path in models.items()}
    merges = {"m": {"method": "ties", "base": "base", "inputs": ["a", "b"]}}
    recipe = Recipe.from_dict({"models": sources, "merges": merges, "path": [{"merge": "m", "layer": 7}]})
    with pytest.raises(UserError, match=r"^path\.0\.layer: 'm' has the layers 0 to"):
        evomerge.merge(recipe, tmp_path / "out")


def test_a_mergekit_yaml_is_told_its_own_keys(
    own: tuple[Path, dict[str, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, models = own
    base, a, b = (str(models[name]) for name in ("base", "a", "b"))
    recipe = tmp_path / "merge.yml"

    def told(document: dict[str, Any]) -> str:
        recipe.write_text(yaml.safe_dump(document))
        sentence = refused(capsys, "merge", str(recipe), str(tmp_path / "out"))
        assert sentence.count(str(recipe)) == 1
        return sentence.removeprefix(f"evomerge: {recipe}: ")

    def piece(*ranges: tuple[str, int, int]) -> dict[str, Any]:
        return {"sources": [{"model": model, "layer_range": [start, end]} for model, start, end in ranges]}

    copied = {"merge_method": "passthrough", "slices": [piece((a, 0, 2)), piece((b, 2, 99))]}
    assert told(copied).startswith("slices.1.sources.0.layer_range: 'b' has the layers 0 to ")
    merged = {
        "merge_method": "ties",
        "base_model": base,
        "parameters": {"weight": 1, "density": 0.5},
        "slices": [piece((base, 0, 2), (a, 0, 2), (b, 0, 2)), piece((base, 1, 3), (a, 50, 52), (b, 1, 3))],
    }
    assert told(merged).startswith("slices.1.sources.1.layer_range: 'a' has the layers 0 to ")
    whole = {
        "merge_method": "linear",
        "models": [{"model": str(tmp_path / "nowhere"), "parameters": {"weight": 1}}],
    }
    assert told(whole).startswith(f"{tmp_path / 'nowhere'}: no such folder")
    filtered = [{"filter": "mlp", "value": 1}]
    odd = {
        "merge_method": "linear",
        "models": [{"model": m, "parameters": {"weight": filtered}} for m in (a, b)],
    }
    assert told(odd).startswith("models: tensor '")


@pytest.mark.parametrize("name", ["-", "/dev/stdin"])
@pytest.mark.parametrize("kind", ["ours", "mergekit"])
def test_a_recipe_can_be_piped_in(
    name: str, kind: str, own: tuple[Path, dict[str, Path]], tmp_path: Path
) -> None:
    merges = {"m": {"method": "linear", "inputs": ["a", "b"], "parameters": {"weight": 0.5}}}
    models = [{"model": f"./{name}", "parameters": {"weight": 0.5}} for name in "ab"]
    documents: dict[str, dict[str, Any]] = {
        "ours": {"evomerge": 1, "models": {"a": "./a", "b": "./b"}, "merges": merges},
        "mergekit": {"merge_method": "linear", "models": models},
    }
    command = [sys.executable, "-m", "evomerge", "merge", name, "out"]
    text = yaml.safe_dump(documents[kind])
    done = subprocess.run(command, input=text, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    merged, one, other = (
        load_file(tmp_path / folder / "model.safetensors")["model.norm.weight"]
        for folder in ("out", "a", "b")
    )
    assert torch.allclose(merged, (one + other) / 2)


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
    # A recipe that a program made, such as a search's, has no slips of the pen.
    caplog.clear()
    evomerge.merge(evomerge.load_recipe(recipe), tmp_path / "again")
    assert "no tensor is selected" not in caplog.text


@pytest.mark.usefixtures("heard")
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
