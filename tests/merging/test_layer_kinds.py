"""Models whose layers differ in their tensors, in ways that no key of the config lists layer by layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from evomerge.checkpoints import open_checkpoint
from evomerge.errors import CheckpointError
from evomerge.merging import Materializer, merge, open_parents
from tests.merging.helpers import make_recipe

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "num_dense_layers": 1}
KINDS: dict[str, dict[str, Any]] = {
    "afmoe": {**_EXPERTS, "layer_types": ["full_attention"] * 3},
    "lfm2_moe": {**_EXPERTS, "layer_types": ["conv", "full_attention", "full_attention"]},
    "ernie4_5_moe": {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
        "moe_layer_interval": 1,
    },
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention", "moe", "mamba"],
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_shared_expert_intermediate_size": 32,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 2,
    },
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 8, "num_key_value_heads": 1},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "intermediate_size": [64] * 4,
        "vocab_size_per_layer_input": 64,
        "hidden_size_per_layer_input": 8,
        "activation_sparsity_pattern": [0.0] * 4,
        "laurel_rank": 8,
    },
}
IDS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))


def make_pair(folder: Path, kind: str) -> dict[str, Path]:
    """Write two random models, in the form in which transformers saves them."""
    settings = {**SIZES, **KINDS[kind]}
    if "layers_block_type" in settings:
        del settings["num_hidden_layers"]
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings), dtype=torch.float32)
        for name in ("a", "b"):
            for parameter in model.parameters():
                parameter.data.add_(torch.randn_like(parameter), alpha=0.02)
            model.save_pretrained(folder / name)
    return {"a": folder / "a", "b": folder / "b"}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS, use_cache=False).logits
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_live_model_is_the_exported_one(kind: str, tmp_path: Path) -> None:
    recipe = make_recipe(
        make_pair(tmp_path, kind),
        merge={"method": "linear", "inputs": ["a", "b"], "parameters": {"weight": 1}},
    )
    live = Materializer(open_parents(recipe)).materialize(recipe)
    exported = AutoModelForCausalLM.from_pretrained(merge(recipe, tmp_path / "out"), dtype=torch.float32)
    assert torch.equal(logits(live), logits(exported))


def test_a_missing_tensor_is_missed_in_them_too(tmp_path: Path) -> None:
    file = make_pair(tmp_path, "ernie4_5_moe")["a"] / "model.safetensors"
    weights = load_file(file)
    gone = next(name for name in weights if ".layers.2.mlp.experts.1." in name)
    del weights[gone]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=rf"tensor '{gone}' is missing; 1 of 2 layers of this kind have it"
    ):
        open_checkpoint(str(file.parent))


def test_leading_dense_layers_follow_a_path(tmp_path: Path) -> None:
    def recipe_of(*layers: int) -> Any:
        return make_recipe(family, path=[{"model": "a", "layer": layer} for layer in layers])

    family = make_pair(tmp_path, "afmoe")
    recipe = recipe_of(0, 0, 2, 1, 2)
    live = Materializer(open_parents(recipe)).materialize(recipe)
    exported = AutoModelForCausalLM.from_pretrained(merge(recipe, tmp_path / "out"), dtype=torch.float32)
    assert exported.config.num_dense_layers == 2
    assert torch.equal(logits(live), logits(exported))
    with pytest.raises(
        CheckpointError, match=r"'num_dense_layers' makes the first layers dense, so in a path all"
    ):
        merge(recipe_of(1, 0), tmp_path / "other")


def test_layers_that_are_a_mixture_by_their_index_stay_in_order(tmp_path: Path) -> None:
    family = make_pair(tmp_path, "ernie4_5_moe")
    recipe = make_recipe(family, path=[{"model": "a", "layer": layer} for layer in (0, 2, 1)])
    with pytest.raises(CheckpointError, match=r"'moe_layer_start_index' gives layers their kind by index"):
        merge(recipe, tmp_path / "out")
