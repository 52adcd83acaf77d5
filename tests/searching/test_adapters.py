"""Searches whose experts are LoRA adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

import evomerge
from evomerge.checkpoints import open_checkpoint
from evomerge.config import load_config
from evomerge.merging import merge
from evomerge.recipe import Merge, Output, Recipe, Source
from tests.adapters import make_adapter
from tests.tasks import make_config


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory, family: dict[str, Path]) -> dict[str, Path]:
    """Two adapters, and the models that they make of the base."""
    folder = tmp_path_factory.mktemp("zoo")
    zoo = {"base": family["base"]}
    for seed, name in enumerate("xy"):
        zoo[name] = make_adapter(folder / name, family["base"], seed, r=4, targets="all-linear", size=0.2)
        copy = Recipe(
            models={"model": Source(source=str(family["base"]), adapter=str(zoo[name]))},
            merges={"merged": Merge(method="linear", inputs=("model",), parameters={"weight": 1.0})},
            output=Output(dtype="float32"),
        )
        zoo[name.upper()] = merge(copy, folder / name.upper())
    return zoo


def config_over(folder: Path, zoo: dict[str, Path], experts: dict[str, Any], tasks: Path) -> Path:
    folder.mkdir()
    family = {"base": zoo["base"], "x": zoo["X"], "y": zoo["Y"]}
    file = make_config(folder, family, tasks, budget={"candidates": 4})
    data = yaml.safe_load(file.read_text())
    data["models"]["experts"] = experts
    file.write_text(yaml.safe_dump(data))
    return file


def test_a_search_over_adapters_is_that_over_the_adapted_models(
    zoo: dict[str, Path], tasks: Path, tmp_path: Path
) -> None:
    full = config_over(tmp_path / "full", zoo, {"x": str(zoo["X"]), "y": str(zoo["Y"])}, tasks)
    on_base = {"path": str(zoo["base"]), "adapter": str(zoo["y"])}
    low = config_over(tmp_path / "low", zoo, {"x": str(zoo["x"]), "y": on_base}, tasks)
    expected = evomerge.search(full, run=tmp_path / "full run")
    run = evomerge.search(low, run=tmp_path / "run")
    assert list(run.candidates().fitness) == list(expected.candidates().fitness)
    assert run.results["winner"]["test"]["mean"] == expected.results["winner"]["test"]["mean"]
    for name in "xy":
        mine, theirs = (r.results["baselines"]["experts"][name]["test"] for r in (run, expected))
        assert mine["mean"] == theirs["mean"]
    resolved = load_config(run.path / "config.resolved.yaml").models.experts
    assert {(ref.path, ref.adapter) for ref in resolved.values()} == {
        (str(zoo["base"]), str(zoo[name])) for name in "xy"
    }
    out = run.export(tmp_path / "model")
    assert open_checkpoint(str(out)).tensors.keys() == open_checkpoint(str(zoo["base"])).tensors.keys()
    assert evomerge.evaluate(out, low, split="test").score["mean"] == run.results["winner"]["test"]["mean"]


def test_an_adapter_alone_is_evaluated_on_its_own_base(
    zoo: dict[str, Path], tasks: Path, tmp_path: Path
) -> None:
    file = config_over(tmp_path / "full", zoo, {"x": str(zoo["X"])}, tasks)
    alone, whole = (evomerge.evaluate(zoo[name], file) for name in ("x", "X"))
    assert alone.score == whole.score
