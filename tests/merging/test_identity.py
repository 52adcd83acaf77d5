"""What makes two recipes the same to whoever keeps their scores."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from evomerge.checkpoints import Checkpoint, open_checkpoint
from evomerge.merging.identity import Identities
from evomerge.output import Output
from evomerge.recipe import Merge, Recipe, Source


@pytest.fixture
def models(family: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """Copies that a test may write into."""
    return {
        name: Path(shutil.copytree(path, tmp_path / name))
        for name, path in family.items()
        if name in "base a b"
    }


def single(
    checkpoint: Checkpoint, name: str = "model", **output: Any
) -> tuple[Recipe, dict[str, Checkpoint]]:
    source = Source(source=str(checkpoint.path), sha256=checkpoint.sha256)
    merge = Merge(method="linear", inputs=(name,), parameters={"weight": 1.0})
    return Recipe(models={name: source}, merges={"m": merge}, output=Output(**output)), {name: checkpoint}


def identity(recipe: Recipe, checkpoints: dict[str, Checkpoint]) -> str:
    return Identities(checkpoints).of(recipe)


def beside_base(models: dict[str, Path], name: str, **output: Any) -> tuple[Recipe, dict[str, Checkpoint]]:
    """Return a single model as a search has it: beside the base whose tokenizer the output has."""
    opened = {key: open_checkpoint(str(models[key])) for key in ("base", name)}
    sources = {key: Source(source=str(c.path), sha256=c.sha256) for key, c in opened.items()}
    merge = Merge(method="linear", inputs=(name,), parameters={"weight": 1.0})
    output = {"tokenizer": "base", "chat_template": "base", **output}
    return Recipe(models=sources, merges={"merged": merge}, output=Output(**output), seed=5), opened


def test_a_model_alone_is_the_one_beside_its_base(models: dict[str, Path]) -> None:
    a = open_checkpoint(str(models["a"]))
    alone = identity(*single(a))
    dtype = str(a.dtype).removeprefix("torch.")
    assert identity(*single(a, "other", tokenizer="other", chat_template="other")) == alone
    assert identity(*single(a, dtype=dtype)) == alone
    assert identity(*beside_base(models, "a")) == alone
    assert identity(*beside_base(models, "a", dtype=dtype)) == alone
    assert identity(*beside_base(models, "b")) != alone


def test_another_number_format_is_another_model(models: dict[str, Path]) -> None:
    a = open_checkpoint(str(models["a"]))
    other = "float16" if a.dtype != torch.float16 else "float32"
    found = {
        identity(*single(a)),
        identity(*single(a, dtype=other)),
        identity(*beside_base(models, "a", dtype=other)),
    }
    assert len(found) == 2


def test_generation_defaults_count(models: dict[str, Path]) -> None:
    before = identity(*single(open_checkpoint(str(models["a"]))))
    path = models["a"] / "generation_config.json"
    settings = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**settings, "repetition_penalty": 1.3}))
    assert identity(*single(open_checkpoint(str(models["a"])))) != before


def test_a_base_with_other_tokens_counts(models: dict[str, Path]) -> None:
    alone = identity(*single(open_checkpoint(str(models["a"]))))
    path = models["base"] / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(tokenizer))
    moved = identity(*beside_base(models, "a"))
    assert moved != alone
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    third = list(vocabulary)[-3]
    vocabulary[first], vocabulary[third] = vocabulary[third], vocabulary[first]
    path.write_text(json.dumps(tokenizer))
    assert identity(*beside_base(models, "a")) not in (moved, alone)


def test_parameters_count_though_the_form_is_known(models: dict[str, Path]) -> None:
    opened = {name: open_checkpoint(str(models[name])) for name in ("a", "b")}
    sources = {name: Source(source=str(c.path), sha256=c.sha256) for name, c in opened.items()}
    identities = Identities(opened)

    def mix(weight: float) -> Recipe:
        merge = Merge(method="linear", inputs=("a", "b"), parameters={"weight": {"a": weight, "b": 1.0}})
        return Recipe(models=sources, merges={"m": merge})

    found = [identities.of(mix(weight)) for weight in (0.5, 0.25, 0.5)]
    assert found[0] == found[2] != found[1]
