"""Scales folded into every form of block: the stock export, loaded again, computes the path."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from evomerge.errors import UserError
from evomerge.merging import merge, open_parents, plan_merge
from tests.merging.helpers import error, make_recipe, read
from tests.merging.hops import HopModel, greedy
from tests.models import VOCAB, make_model

IDS = torch.randint(3, VOCAB - 3, (2, 11), generator=torch.Generator().manual_seed(0))
WINDOWS = {"layer_types": [*["sliding_attention"] * 3, "full_attention"]}

# A tiny epsilon: what folding neglects.
TINY_EPSILON = dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"), 1e-12)
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama with biases": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 4},
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
    "qwen3": {},
    "gemma": {"head_dim": 8},
    "gemma2": {},
    "gemma3_text": WINDOWS,
    "gemma3": WINDOWS,
    "phi3": {},
    "phi": {},
    "gpt_neox": {"use_parallel_residual": True},
    "gpt_neox sequential": {"use_parallel_residual": False},
    "gpt2": {},
    "stablelm": {},
    "starcoder2": {"sliding_window": 4},
    "cohere": {},
    "cohere2": {"sliding_window": 4, **WINDOWS},
    "glm4": {"head_dim": 8},
    "olmo2": {},
    "olmo3": {"sliding_window": 4, **WINDOWS},
    "exaone4": {"sliding_window": 4, "layer_types": WINDOWS["layer_types"]},
    "arcee": {},
    "glm": {"head_dim": 8},
    "granite": {"residual_multiplier": 0.7, "embedding_multiplier": 3.0, "logits_scaling": 2.0},
    "helium": {"head_dim": 8},
    "ministral": {"head_dim": 8, "sliding_window": 4, **WINDOWS},
    "seed_oss": {"head_dim": 8},
    "smollm3": {"no_rope_layers": [1, 0, 1, 0]},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "mixtral": {},
    "qwen3_moe": {"mlp_only_layers": [1], "decoder_sparse_step": 2},
}
UNIT = ("gemma", "gemma2", "gemma3_text", "gemma3")
PATHS = {
    "scaled": [("a", 0, 0.8), ("b", 1, 1.3), ("b", 1, 0.7), ("a", 2, 1.0), ("a", 3, 1.9)],
    "negative": [("a", 0, 1.0), ("b", 1, -0.8), ("b", 1, 1.3), ("a", 2, -1.1), ("b", 3, -1.2)],
}


def make_pair(folder: Path, kind: str, **options: Any) -> dict[str, Path]:
    name, options = kind.split()[0], {"tokenizer": False, **KINDS[kind], **options}
    return {n: make_model(folder / n, seed, kind=name, **options) for seed, n in enumerate("ab")}


def folded(models: dict[str, Path], hops, out: Path, **parts: Any) -> Path:
    path = [{"model": name, "layer": layer, "scale": scale} for name, layer, scale in hops]
    return merge(make_recipe(models, path=path, **parts), out)


@pytest.fixture(scope="module", params=KINDS)
def family(request, tmp_path_factory) -> tuple[str, dict[str, Path]]:
    folder = tmp_path_factory.mktemp(request.param.replace(" ", "-"))
    return request.param, make_pair(folder, request.param, **TINY_EPSILON)


@pytest.mark.parametrize("hops", PATHS.values(), ids=PATHS.keys())
def test_the_stock_export_computes_the_scaled_path(family, tmp_path, hops):
    kind, models = family
    out = folded(models, hops, tmp_path / "out")
    stock, info = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    stock.eval()
    by_hops = HopModel(models, hops, unit=kind in UNIT)
    with torch.no_grad():
        assert error(stock(IDS).logits, by_hops.logits(IDS)) < 1e-5

    grown = stock.generate(IDS, max_new_tokens=8, do_sample=False, use_cache=True, eos_token_id=None)
    for continuation in (
        greedy(stock, IDS, 8, cached=True),
        greedy(stock, IDS, 8, cached=False),
        by_hops.grow(IDS, 8),
        by_hops.grow(IDS, 8, cached=False),
    ):
        assert torch.equal(grown, continuation)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "olmo2"])
def test_in_bfloat16_folding_rounds_as_much_as_computing_does(tmp_path, kind):
    models = make_pair(tmp_path, kind, dtype=torch.bfloat16, hidden=128)
    hops = PATHS["negative"]
    out = folded(models, hops, tmp_path / "out")
    stock = AutoModelForCausalLM.from_pretrained(out).eval()
    assert stock.dtype == torch.bfloat16
    exact = HopModel(models, hops, unit=kind in UNIT).logits(IDS)
    by_hops = HopModel(models, hops, unit=kind in UNIT, dtype=torch.bfloat16).logits(IDS)

    def spread(logits: torch.Tensor) -> float:
        return float((logits.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt())

    with torch.no_grad():
        assert spread(stock(IDS).logits) < min(1.5 * spread(by_hops), 0.05)


@pytest.mark.parametrize("kind", ["gemma3_text", "olmo2"])
def test_layers_of_a_merge_take_up_scales_too(tmp_path, kind):
    models = make_pair(tmp_path, kind, **TINY_EPSILON)
    merged = {"method": "linear", "inputs": ["a", "b"], "parameters": {"weight": {"a": 0.3, "b": 0.7}}}
    mean = merge(make_recipe(models, merge=merged), tmp_path / "mean")
    hops = [("m", 0, 1.0), ("m", 1, -0.7), ("m", 1, 1.2), ("m", 3, 1.1)]
    path = [{"merge": "m", "layer": layer, "scale": scale} for _, layer, scale in hops]
    out = merge(make_recipe(models, merges={"m": merged}, path=path), tmp_path / "out")
    stock = AutoModelForCausalLM.from_pretrained(out).eval()
    with torch.no_grad():
        assert error(stock(IDS).logits, HopModel({"m": mean}, hops, unit=kind in UNIT).logits(IDS)) < 1e-5


def test_the_norms_of_a_model_that_adds_one_to_them_are_rounded_once(tmp_path):
    models = make_pair(tmp_path, "gemma2", dtype=torch.bfloat16)
    out = folded(models, [("a", 0, 1.0), ("b", 1, -1.6)], tmp_path / "out")
    found, b = read(out), read(models["b"])
    for role, product in (("post_feedforward", -1.6), ("pre_feedforward", -1.0)):
        weight = b[f"model.layers.1.{role}_layernorm.weight"].double()
        expected = ((1 + weight) / product - 1).bfloat16()
        assert torch.equal(found[f"model.layers.1.{role}_layernorm.weight"], expected)
    assert torch.equal(found["model.norm.weight"], (-2 - b["model.norm.weight"].double()).bfloat16())


def test_scales_are_refused_where_it_is_not_known_what_reads_and_writes_the_stream(tmp_path):
    model = make_model(tmp_path / "a", tokenizer=False)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "unheard_of"}))
    path = [{"model": "a", "layer": 0}, {"model": "a", "layer": 1, "scale": 0.5}]
    recipe = make_recipe({"a": model}, path=path)
    with pytest.raises(
        UserError, match=r"path\.1\.scale: .*those of model type 'unheard_of' are not known; use"
    ):
        plan_merge(recipe, open_parents(recipe))
    unscaled = make_recipe({"a": model}, path=path[:1])
    plan_merge(unscaled, open_parents(unscaled))


def test_scales_are_refused_where_a_layer_has_a_tensor_of_unknown_effect(tmp_path):
    model = make_model(tmp_path / "a", kind="gemma2", tokenizer=False)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    recipe = make_recipe({"a": model}, path=[{"model": "a", "layer": 1, "scale": 0.5}])
    with pytest.raises(UserError, match=r"path\.0\.scale: .*'post_feedforward_layernorm.weight'|'pre_feed"):
        plan_merge(recipe, open_parents(recipe))
