"""`evomerge.evaluate`: how a model is named, and what is said of one that is mistyped or broken."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from evomerge import scoring
from evomerge.errors import UserError
from tests.tasks import make_tasks


@pytest.fixture
def config(tmp_path: Path, family: dict[str, Path]) -> Path:
    data = {
        "version": 1,
        "models": {"base": str(family["base"]), "experts": {name: str(family[name]) for name in "ab"}},
        "space": {"method": "linear", "parameters": {"weight": {"range": [0, 1], "initial": 0.5}}},
        "optimizer": {"type": "random"},
        "budget": {"candidates": 6},
        "suite": {"include": [str(make_tasks(tmp_path / "tasks"))], "tasks": ["tiny_a"]},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def test_a_recipe_is_named_by_its_hash_and_scores_like_its_folder(config, family):
    by_folder = scoring.evaluate(family["a"], config, split="test")
    by_recipe = scoring.evaluate(scoring.reading_of(str(family["a"])).recipe, config, split="test")
    assert by_folder.model == str(family["a"])
    assert len(by_recipe.model) < 80
    assert by_recipe.score == by_folder.score


def test_a_broken_model_gets_one_short_sentence_also_as_a_recipe(config, family, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(family["a"], broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], torch.inf)
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    for model in (broken, scoring.reading_of(str(broken)).recipe):
        with pytest.raises(UserError) as refusal:
            scoring.evaluate(model, config)
        assert len(str(refusal.value)) < 300
        assert "finite" in str(refusal.value)


def test_a_run_without_a_recipe_says_so(config, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.db").touch()
    with pytest.raises(UserError, match="this run has no recipe yet"):
        scoring.evaluate(run, config)


def test_what_a_recipe_file_says_wrongly_is_told_with_its_key(config, family, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    merge = {"method": "linear", "inputs": ["a"], "parameters": {"weight": 1.0}}
    path = [{"merge": "m", "layer": 99}]
    data = {"evomerge": 1, "models": {"a": str(family["a"])}, "merges": {"m": merge}, "path": path}
    recipe.write_text(yaml.safe_dump(data))
    with pytest.raises(UserError) as refusal:
        scoring.evaluate(recipe, config)
    assert str(refusal.value).startswith(f"{recipe}: path.0.layer: 'm' has the layers 0 to ")


def test_a_mistyped_model_is_refused_before_the_slow_imports(config):
    code = (
        "import sys; from evomerge.errors import UserError; from evomerge.scoring import evaluate\n"
        f"try: evaluate('./no-such-model', {str(config)!r})\n"
        "except UserError as error: print(error, {'transformers', 'lm_eval', 'datasets'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("./no-such-model: no such folder")
    assert done.stdout.rstrip().endswith("set()")


@pytest.mark.parametrize(("model", "offline"), [("someone/a-model", False), (".", True)])
def test_the_network_is_forbidden_unless_the_model_is_a_hub_id(config, monkeypatch, model, offline):
    class Prepared(Exception):
        pass

    asked = {}

    def prepare(**options: bool) -> None:
        asked.update(options)
        raise Prepared

    monkeypatch.setattr(scoring, "prepare", prepare)
    with pytest.raises(Prepared):
        scoring.evaluate(model, config)
    assert asked == {"offline": offline}
