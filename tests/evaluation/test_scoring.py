"""`evomerge.evaluate`: how a model is named, and what is said of one that is mistyped or broken."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from evomerge import scoring
from evomerge.engines.hf import HFEngine
from evomerge.errors import UserError
from evomerge.task_scoring import evaluate_tasks
from tests.adapters import make_adapter
from tests.evaluation.tiny import write_task
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


def test_what_lm_eval_reports_otherwise_is_shown_beside(config, family, tmp_path):
    tasks = tmp_path / "more"
    for kind in ("likelihood", "rolling", "choice"):
        write_task(tasks, kind, kind)
    listed = ["choice", {"task": "likelihood", "metric": "perplexity"}, "rolling"]
    changes = [f"suite.include=[{tasks}]", f"suite.tasks={json.dumps(listed)}"]
    steps: list[tuple[int, int]] = []
    for _ in range(2):
        found = scoring.evaluate(
            family["a"], config, overrides=changes, progress=lambda *step: steps.append(step)
        )
        assert set(found.lm_eval) == {"likelihood", "rolling"}
        # The suite's own mean is over items, lm-eval's over all words or bytes together.
        with_tasks = evaluate_tasks(
            family["a"], ["likelihood", "rolling"], include=[str(tasks)], split="validation"
        )
        for task, metric in (("likelihood", "perplexity"), ("rolling", "bits_per_byte")):
            (value,) = found.lm_eval[task]
            theirs = next(v for v in with_tasks.tasks[task].metrics if v.metric == metric)
            assert value.value == pytest.approx(theirs.value, rel=1e-5)
            assert value.metric == metric
    assert steps[0] == (0, 36)
    assert steps[-1] == (36, 36)
    # Tasks of two directions: the suite is mapped to [0, 1], each task is in its own units.
    assert 0 <= found.score["mean"] <= 1
    assert found.score["tasks"]["rolling"]["mean"] > 1
    assert found.to_dict()["units"] == "mapped to [0, 1]"
    assert str(found).splitlines()[1].endswith("  mapped to [0, 1]")
    # So it is where less is better in all tasks, as in a run's results.
    bits = [changes[0], "suite.tasks=[{task: rolling, metric: bits_per_byte}]"]
    alone = scoring.evaluate(family["a"], config, overrides=bits)
    assert alone.units == "mapped to [0, 1]"
    assert 0 < alone.score["mean"] < 1 < alone.score["tasks"]["rolling"]["mean"]
    plain = scoring.evaluate(family["a"], config, overrides=[changes[0], "suite.tasks=[choice]"])
    assert plain.units == "raw"
    assert plain.score["mean"] == pytest.approx(plain.score["tasks"]["choice"]["mean"])
    every = scoring.evaluate(family["a"], config, overrides=changes, all_metrics=True)
    assert [value.name for value in every.lm_eval["choice"]] == ["acc,none", "acc_norm,none"]
    assert every.lm_eval["choice"][0].value == pytest.approx(every.score["tasks"]["choice"]["mean"])
    assert every.score == found.score
    assert str(every).count("lm-eval: ") == 7
    assert json.loads(json.dumps(every.to_dict()))["lm_eval"]["rolling"]["bits_per_byte,none"]["n"] == 12


def test_all_metrics_cost_no_second_forward_pass(config, family, tmp_path, monkeypatch):
    write_task(tmp_path / "more", "rolling", "rolling")
    asked: list[str] = []
    own = HFEngine.loglikelihood_rolling

    def counted(engine, requests):
        asked.extend(request.text for request in requests)
        return own(engine, requests)

    monkeypatch.setattr(HFEngine, "loglikelihood_rolling", counted)
    changes = [f"suite.include=[{tmp_path / 'more'}]", "suite.tasks=[rolling]", "cache.scores=false"]
    found = scoring.evaluate(family["a"], config, overrides=changes, all_metrics=True)
    assert len(found.lm_eval["rolling"]) == 3
    assert len(asked) == len(set(asked)) == 12


def test_an_adapter_on_a_base_of_ones_own_choosing(config, family, tmp_path):
    adapter = make_adapter(tmp_path / "lora", family["base"], size=0.3)
    alone = scoring.evaluate(adapter, config)
    assert scoring.evaluate(adapter, config, base=family["base"]).score == alone.score
    other = scoring.reading_of(str(adapter), family["a"]).recipe.models["model"]
    assert (other.source, other.adapter) == (str(family["a"]), str(adapter))
    with pytest.raises(UserError, match="--base: it is for adapters"):
        scoring.evaluate(scoring.reading_of(str(family["a"])).recipe, config, base=family["base"])
