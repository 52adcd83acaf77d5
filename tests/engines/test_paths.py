"""One engine for all layer paths: it answers as an engine made for one of them alone does, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from evomerge.checkpoints.tokenizer import load_tokenizer
from evomerge.config import Engine as EngineConfig
from evomerge.engines import generation, reordering
from evomerge.engines.hf_host import HFHost
from evomerge.engines.reordering import reordered_bytes
from evomerge.errors import UserError
from evomerge.evaluation.requests import Generation, Loglikelihood, Rolling
from evomerge.merging import open_parents, pin
from evomerge.recipe import Recipe
from tests.merging.helpers import make_recipe
from tests.models import make_model

SETTINGS = EngineConfig(device="cpu", batch_tokens=256, max_length=256)
CANDIDATES = [
    [("a", 0, 1), ("b", 1, 1), ("b", 1, 1), ("a", 3, 1)],
    [("a", 0, 1), ("a", 3, 1)],
    [("a", 0, 1), ("b", 2, 0.8), ("b", 2, 1), ("b", 1, -1.3), ("a", 1, 1), ("a", 2, 1), ("a", 3, 1.1)],
    [("a", 0, 1), ("b", 1, 1), ("b", 1, 1), ("a", 3, 1)],
]
SHARED = "What all of these prompts begin with, longer than a window. "
PAIRS = tuple(
    Loglikelihood(SHARED * (k % 2) + "abc" * k, " " + end) for k in (1, 4, 9) for end in ("yes", "no")
)
PROMPTS = tuple(Generation(f"{SHARED}{'x' * i} question?", ("#", "qq"), 5 + 3 * (i % 3)) for i in range(9))
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma3_text": {"layer_types": [*["sliding_attention"] * 3, "full_attention"]},
    "gpt_neox": {},
    "qwen3_moe": {"mlp_only_layers": [1]},
}


def recipes_of(models: dict[str, Path], **parts: Any) -> list[Recipe]:
    found = []
    for hops in CANDIDATES:
        path = [{"model": name, "layer": layer, "scale": scale} for name, layer, scale in hops]
        recipe = make_recipe(models, path=path, **parts)
        found.append(pin(recipe, open_parents(recipe)))
    return found


def answers(host: HFHost, recipe: Recipe) -> Any:
    engine = host.hold(recipe)
    rolling = engine.loglikelihood_rolling([Rolling("some text to be read")])
    return engine.fingerprint, engine.loglikelihood(PAIRS), rolling, engine.generate(PROMPTS)


@pytest.mark.parametrize("kind", KINDS)
def test_paths_share_an_engine_and_get_the_scores_that_they_get_alone(kind, tmp_path, monkeypatch):
    # So little that how many texts grow at once depends on the number of layers.
    monkeypatch.setitem(generation.SLOT_BYTES, "cpu", 200_000)
    models = {n: make_model(tmp_path / n, seed, kind=kind, **KINDS[kind]) for seed, n in enumerate("ab")}
    tokenizer = load_tokenizer(models["a"])
    recipes = recipes_of(models)
    checkpoints = open_parents(recipes[0])
    host = HFHost(SETTINGS, checkpoints, tokenizer)
    found = [answers(host, recipe) for recipe in recipes]
    alone = [answers(HFHost(SETTINGS, checkpoints, tokenizer), recipe) for recipe in recipes]
    assert found == alone
    assert found[0] == found[3]
    assert found[0] != found[1]


@pytest.mark.skipif(not reordered_bytes("cpu", torch.bfloat16, 1), reason="this CPU has no bfloat16 products")
@pytest.mark.parametrize("tied", [False, True])
def test_bfloat16_weights_are_reordered_anew_for_each_recipe(tied, tmp_path, monkeypatch):
    models = {n: make_model(tmp_path / n, seed, tied=tied) for seed, n in enumerate("ab")}
    output = {"dtype": "bfloat16"}
    recipes = recipes_of(models, output=output)
    for weight in (0.5, 0.9, 0.5):
        merge = {"method": "linear", "inputs": ["a", "b"], "parameters": {"weight": {"a": weight, "b": 1}}}
        recipe = make_recipe(models, merge=merge, output=output)
        recipes.append(pin(recipe, open_parents(recipe)))
    checkpoints, tokenizer = open_parents(recipes[0]), load_tokenizer(models["a"])
    broken = pin(make_recipe(models, path=[{"model": "a", "layer": 99}], output=output), checkpoints)
    host = HFHost(SETTINGS, checkpoints, tokenizer)
    found = []
    for recipe in recipes:
        found.append(answers(host, recipe))
        # Of a recipe that fails nothing is left behind.
        with pytest.raises(UserError):
            host.hold(broken)
    assert found[0] == found[3] != found[1]
    assert found[4] == found[6] != found[5]
    monkeypatch.setattr(reordering, "MOST_BYTES", 0)
    assert [answers(HFHost(SETTINGS, checkpoints, tokenizer), recipe) for recipe in recipes] == found


def test_the_engine_stays_while_the_path_changes(tmp_path):
    models = {n: make_model(tmp_path / n, seed) for seed, n in enumerate("ab")}
    recipes = recipes_of(models)
    host = HFHost(SETTINGS, open_parents(recipes[0]), load_tokenizer(models["a"]))
    assert len({host.hold(recipe) for recipe in recipes}) == 1


def test_a_path_with_layers_of_another_kind_gets_an_engine_that_knows_them(tmp_path):
    layers = ["sliding_attention", "sliding_attention", "full_attention"]
    models = {"a": make_model(tmp_path / "a", kind="gemma3_text", layers=3, layer_types=layers)}
    recipes = []
    for hops in ([0, 1], [0, 2, 1], [1, 0]):
        recipe = make_recipe(models, path=[{"model": "a", "layer": layer} for layer in hops])
        recipes.append(pin(recipe, open_parents(recipe)))
    tokenizer, checkpoints = load_tokenizer(models["a"]), open_parents(recipes[0])
    host = HFHost(SETTINGS, checkpoints, tokenizer)
    found = [answers(host, recipe) for recipe in recipes]
    assert found == [answers(HFHost(SETTINGS, checkpoints, tokenizer), recipe) for recipe in recipes]
