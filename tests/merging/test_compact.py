"""Compact folders: every tensor once, and the same model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import evomerge
from evomerge.checkpoints import open_checkpoint
from evomerge.cli import main
from evomerge.errors import CheckpointError
from evomerge.merging import merge
from tests.merging.helpers import make_recipe, read
from tests.merging.hops import greedy
from tests.models import VOCAB, make_model

IDS = torch.randint(3, VOCAB - 3, (2, 11), generator=torch.Generator().manual_seed(0))
MEAN = {"method": "linear", "inputs": ["a", "b"], "parameters": {"weight": {"a": 0.3, "b": 0.7}}}
HOPS = [
    *(("a", 0, 1.0), ("b", 1, 1.0), ("m", 2, 1.0), ("b", 1, 1.0)),
    *(("m", 2, 1.0), ("b", 1, 0.5), ("b", 1, 2.0), ("a", 3, 1.0)),
]
KINDS = {
    "llama": {"tied": True},
    "mixtral": {},
    "gpt_neox": {},
    "gemma3": {"layer_types": [*["sliding_attention"] * 3, "full_attention"]},
}


def recipe_of(models, hops=HOPS):
    path = [{"merge" if name == "m" else "model": name, "layer": i, "scale": w} for name, i, w in hops]
    return make_recipe(models, merges={"m": MEAN}, path=path)


@pytest.fixture(scope="module", params=KINDS)
def family(request, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    options = {"kind": request.param, **KINDS[request.param]}
    a = make_model(folder / "a", 1, **options)
    return {"a": a, "b": make_model(folder / "b", 2, base=a, noise=0.1, **options)}


def test_it_loads_as_the_ordinary_model_and_becomes_it(family, tmp_path):
    recipe = recipe_of(family)
    ordinary = merge(recipe, tmp_path / "ordinary")
    compact = merge(recipe, tmp_path / "compact", compact=True)
    stored, whole = read(compact), read(ordinary)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in stored.items())
    # The unscaled layers that come again are not there again; of the scaled one only what the scale is folded into.
    assert not any(".layers.3." in name or ".layers.4." in name or ".layers.6." in name for name in stored)
    assert 0 < sum(".layers.5." in name for name in stored) < sum(".layers.0." in name for name in stored)

    stock = AutoModelForCausalLM.from_pretrained(ordinary).eval()
    model = evomerge.load_compact(compact)
    assert type(model) is type(stock)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, stock(IDS).logits)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(IDS, **options), stock.generate(IDS, **options))
    assert torch.equal(greedy(model, IDS, 6, cached=True), greedy(stock, IDS, 6, cached=True))
    sizes = [sum({p.data_ptr(): p.nbytes for p in m.parameters()}.values()) for m in (model, stock)]
    assert sizes[0] < 0.75 * sizes[1] or "vision_config" in stock.config.to_dict()

    assert main(["convert", str(compact), str(tmp_path / "expanded")]) == 0
    for file in ordinary.iterdir():
        assert (tmp_path / "expanded" / file.name).read_bytes() == file.read_bytes(), file.name


def test_of_several_files_it_is_the_same(tmp_path):
    models = {name: make_model(tmp_path / name, seed) for seed, name in enumerate("ab")}
    ordinary = merge(recipe_of(models), tmp_path / "ordinary", max_shard_size="50KB")
    compact = merge(recipe_of(models), tmp_path / "compact", max_shard_size="50KB", compact=True)
    assert len(list(compact.glob("*.safetensors"))) > 2
    out = evomerge.convert(compact, tmp_path / "expanded", max_shard_size="50KB")
    assert {f.name: f.read_bytes() for f in out.iterdir()} == {
        f.name: f.read_bytes() for f in ordinary.iterdir()
    }
    assert AutoTokenizer.from_pretrained(compact).vocab_size == VOCAB


@pytest.fixture
def compact(tmp_path) -> Path:
    models = {name: make_model(tmp_path / name, seed) for seed, name in enumerate("ab")}
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe_of(models).to_yaml())
    assert main(["merge", str(file), str(tmp_path / "compact"), "--compact"]) == 0
    return tmp_path / "compact"


def test_nothing_takes_it_for_an_ordinary_model(compact):
    with pytest.raises(CheckpointError, match=r"compact folder, .* 'evomerge convert .*compact NEW_FOLDER'"):
        open_checkpoint(compact)
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(compact)


def test_damage_is_named(compact, tmp_path):
    with pytest.raises(CheckpointError, match=r"evomerge_compact.json: is missing"):
        evomerge.load_compact(tmp_path / "a")
    file = compact / "evomerge_compact.json"
    good = json.loads(file.read_text())
    file.write_text(json.dumps({**good, "evomerge_compact": 2}))
    with pytest.raises(CheckpointError, match=r"evomerge_compact: is 2; this version reads 1"):
        evomerge.load_compact(compact)
    file.write_text(json.dumps({**good, "tensors": {**good["tensors"], "model.norm.weight": "gone"}}))
    with pytest.raises(CheckpointError, match=r"tensor 'gone' is missing"):
        evomerge.load_compact(compact)
    file.write_text(json.dumps(good))
    evomerge.load_compact(compact)
