"""Layer paths of every architecture, against a model whose layers are moved about in memory."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from evomerge.checkpoints import open_checkpoint
from evomerge.errors import CheckpointError
from evomerge.merging import Materializer, merge, open_parents, plan_merge
from evomerge.merging.layer_config import path_config
from evomerge.recipe import Hop
from tests.merging.helpers import error, make_recipe, read
from tests.models import ARCHITECTURES, VOCAB, make_model

IDS = torch.randint(3, VOCAB - 3, (2, 11), generator=torch.Generator().manual_seed(0))

OPTIONS: dict[str, dict[str, Any]] = {
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
    "qwen3": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "gemma3_text": {"layer_types": [*["sliding_attention"] * 3, "full_attention"]},
    "gemma3": {"layer_types": [*["sliding_attention"] * 3, "full_attention"]},
    "qwen3_moe": {"mlp_only_layers": [1], "decoder_sparse_step": 2},
    "mistral": {"sliding_window": 4},
    "mixtral": {"sliding_window": 4},
}
PATHS = {"longer": [3, 0, 1, 1, 2, 0], "shorter": [1, 3]}


def moved(folder: Path, layers: list[int]) -> torch.nn.Module:
    """Load a model and put copies of its layers in another order."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    decoder = model.base_model
    decoder = getattr(decoder, "language_model", decoder)
    name = "h" if hasattr(decoder, "h") else "layers"
    old = getattr(decoder, name)
    new = torch.nn.ModuleList(copy.deepcopy(old[layer]) for layer in layers)
    for index, layer in enumerate(new):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
    setattr(decoder, name, new)
    config = model.config.get_text_config()
    config.num_hidden_layers = len(layers)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[layer] for layer in layers]
    return model


@pytest.fixture(scope="module", params=[*ARCHITECTURES, "gemma3"])
def parent(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp(request.param) / "a"
    return make_model(folder, 1, kind=request.param, tokenizer=False, **OPTIONS.get(request.param, {}))


@pytest.mark.parametrize("layers", PATHS.values(), ids=PATHS.keys())
def test_moved_layers_compute_what_they_computed(parent, tmp_path, layers):
    recipe = make_recipe({"a": parent}, path=[{"model": "a", "layer": layer} for layer in layers])
    out = merge(recipe, tmp_path / "out")
    exported, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    live = Materializer(open_parents(recipe)).materialize(recipe)
    with torch.no_grad():
        logits = exported(IDS).logits
        assert error(logits, moved(parent, layers)(IDS).logits) < 1e-5
        assert torch.equal(live(IDS).logits, logits)
        length = exported.generate(IDS, max_new_tokens=3, do_sample=False, eos_token_id=None).shape[1]
    assert length == IDS.shape[1] + 3


def edit(folder: Path, change) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


# Config of a version of transformers that did not write the kinds of layers down.
OLD = [
    ("gemma2", {"sliding_window": 4}),
    ("gemma3_text", {}),
    ("gemma3_text", {"sliding_window_pattern": 2}),
    ("cohere2", {}),
    ("cohere2", {"sliding_window_pattern": 3}),
    ("olmo3", {}),
    ("qwen2", {"use_sliding_window": True, "max_window_layers": 3}),
    ("qwen2", {"use_sliding_window": True}),
    ("qwen3", {"use_sliding_window": True, "max_window_layers": 0}),
]


@pytest.mark.parametrize(("kind", "settings"), OLD)
def test_kinds_that_an_old_config_leaves_to_a_layers_index_are_transformers_own(tmp_path, kind, settings):
    folder = make_model(tmp_path / "a", layers=8, tokenizer=False)
    settings = {"sliding_window": 4, "num_hidden_layers": 8, **settings}
    edit(folder, lambda config: (config.update(model_type=kind, **settings), config.pop("layer_types", None)))
    checkpoint = open_checkpoint(folder)
    layers = [7, 0, 6, 1, 5, 5]
    config = path_config([Hop(model="a", layer=layer) for layer in layers], [checkpoint] * len(layers))
    expected = AutoConfig.for_model(kind, **settings).layer_types
    assert config["layer_types"] == [expected[layer] for layer in layers]


def test_the_kinds_of_a_multimodal_models_layers_follow_in_its_nested_config(tmp_path):
    folder = make_model(tmp_path / "a", kind="gemma3", tokenizer=False, **OPTIONS["gemma3"])
    recipe = make_recipe({"a": folder}, path=[{"model": "a", "layer": layer} for layer in (3, 0)])
    out = merge(recipe, tmp_path / "out")
    before, after = (json.loads((path / "config.json").read_text()) for path in (folder, out))
    assert after["text_config"]["layer_types"] == ["full_attention", "sliding_attention"]
    assert after["text_config"]["num_hidden_layers"] == 2
    assert after["vision_config"] == before["vision_config"]
    assert {n for n in read(out) if "vision" in n} == {n for n in read(folder) if "vision" in n}


def test_dense_layers_of_a_mixture_stay_dense_where_they_go(tmp_path):
    folder = make_model(tmp_path / "a", kind="qwen3_moe", tokenizer=False, **OPTIONS["qwen3_moe"])
    recipe = make_recipe({"a": folder}, path=[{"model": "a", "layer": layer} for layer in (3, 0, 1, 3)])
    config = plan_merge(recipe, open_parents(recipe)).config
    assert (config["mlp_only_layers"], config["decoder_sparse_step"]) == ([1, 2], 1)


def test_leading_dense_layers_must_lead_in_a_path(tmp_path):
    folder = make_model(tmp_path / "a", kind="qwen3_moe", tokenizer=False, mlp_only_layers=[0, 1])

    def older(config):
        config.update(model_type="deepseek_v3", first_k_dense_replace=2)
        config.pop("mlp_only_layers")

    edit(folder, older)

    def config_of(*layers):
        recipe = make_recipe({"a": folder}, path=[{"model": "a", "layer": layer} for layer in layers])
        return plan_merge(recipe, open_parents(recipe)).config

    assert config_of(1, 0, 0, 2, 3)["first_k_dense_replace"] == 3
    assert config_of(3, 2)["first_k_dense_replace"] == 0
    with pytest.raises(
        CheckpointError, match=r"first_k_dense_replace' makes the first layers dense.* hop 0 is"
    ):
        config_of(2, 0)


def test_layers_of_one_kind_must_have_the_same_tensors(tmp_path):
    one = make_model(tmp_path / "one", kind="qwen3_moe", tokenizer=False)
    other = make_model(tmp_path / "other", kind="qwen3_moe", tokenizer=False, num_experts=4)
    recipe = make_recipe(
        {"a": one, "b": other}, path=[{"model": "a", "layer": 0}, {"model": "b", "layer": 1}]
    )
    with pytest.raises(CheckpointError, match=r"layer 1 cannot join .*experts\.3\..*of hop 0 is missing"):
        plan_merge(recipe, open_parents(recipe))


def test_gpt2_layers_scaled_by_their_index_cannot_be_moved(tmp_path):
    folder = make_model(tmp_path / "a", kind="gpt2", tokenizer=False, scale_attn_by_inverse_layer_idx=True)
    recipe = make_recipe({"a": folder}, path=[{"model": "a", "layer": 1}, {"model": "a", "layer": 0}])
    with pytest.raises(
        CheckpointError, match="'scale_attn_by_inverse_layer_idx' gives layers their kind by index"
    ):
        plan_merge(recipe, open_parents(recipe))


EACH_OF_FOUR = {"layer_types": ["sliding_attention", "full_attention"] * 2}
BY_PLACE = [
    ("diffllama", {}, "'model_type' is 'diffllama', whose layers compute by their index"),
    (
        "minimax",
        {"num_local_experts": 2, "layer_types": ["linear_attention", "full_attention"] * 2, "block_size": 8},
        "'model_type' is 'minimax', whose layers compute by their index",
    ),
    (
        "gemma3n_text",
        {
            "hidden_size_per_layer_input": 4,
            "vocab_size_per_layer_input": VOCAB,
            "num_kv_shared_layers": 0,
            "activation_sparsity_pattern": [0.0] * 4,
            "laurel_rank": 4,
            "altup_num_inputs": 2,
            **EACH_OF_FOUR,
        },
        "'hidden_size_per_layer_input' gives each layer a part of the embeddings by its index",
    ),
]


@pytest.mark.parametrize(("kind", "options", "said"), BY_PLACE, ids=[kind for kind, *_ in BY_PLACE])
def test_layers_that_compute_by_their_index_may_be_swapped_and_not_moved(tmp_path, kind, options, said):
    options = {"kind": kind, "tokenizer": False, **options}
    models = {name: make_model(tmp_path / name, seed, **options) for seed, name in enumerate("ab")}

    def config_of(*hops):
        recipe = make_recipe(models, path=[{"model": name, "layer": layer} for name, layer in hops])
        return plan_merge(recipe, open_parents(recipe)).config

    for hops in ([("a", 0), ("a", 2), ("a", 1), ("a", 3)], [("a", 0), ("a", 1), ("a", 2)]):
        with pytest.raises(
            CheckpointError, match=f"{said}, so moved layers would change; keep all layers in order"
        ):
            config_of(*hops)
    assert config_of(("a", 0), ("b", 1), ("b", 2), ("a", 3))["num_hidden_layers"] == 4


def test_the_experts_of_each_layer_follow_it(tmp_path):
    own = {"num_experts": 3, "moe_topk": [1, 2, 3, 1], "head_dim": 8}
    folder = make_model(tmp_path / "a", kind="hunyuan_v1_moe", tokenizer=False, **own)
    recipe = make_recipe({"a": folder}, path=[{"model": "a", "layer": layer} for layer in PATHS["longer"]])
    out = merge(recipe, tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["moe_topk"] == [1, 1, 2, 2, 3, 1]
    exported = AutoModelForCausalLM.from_pretrained(out).eval()
    live = Materializer(open_parents(recipe)).materialize(recipe)
    with torch.no_grad():
        assert error(exported(IDS).logits, moved(folder, PATHS["longer"])(IDS).logits) < 1e-5
        assert torch.equal(live(IDS).logits, exported(IDS).logits)
