"""Roles and positions, against a table written down by hand from the families' published checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest

from evomerge.checkpoints.names import is_buffer, is_transposed, parse
from evomerge.checkpoints.reader import open_checkpoint
from tests.models import make_model

ATTENTION = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight")
LLAMA = {
    **{f"self_attn.{name}": "attention" for name in ATTENTION},
    "mlp.gate_proj.weight": "mlp",
    "mlp.up_proj.weight": "mlp",
    "mlp.down_proj.weight": "mlp",
    "input_layernorm.weight": "norm",
    "post_attention_layernorm.weight": "norm",
}
LAYERS = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": {**LLAMA, **{f"self_attn.{name}_proj.bias": "attention" for name in "qkv"}},
    "qwen3": {**LLAMA, "self_attn.q_norm.weight": "norm", "self_attn.k_norm.weight": "norm"},
}
GEMMA = {
    **LLAMA,
    "pre_feedforward_layernorm.weight": "norm",
    "post_feedforward_layernorm.weight": "norm",
}
QK_NORM = {"self_attn.q_norm.weight": "norm", "self_attn.k_norm.weight": "norm"}
EXPERTS = {"mlp.gate.weight": "router"} | {
    f"mlp.experts.{expert}.{name}_proj.weight": "mlp"
    for expert in range(3)
    for name in ("gate", "up", "down")
}
OTHER_LAYERS = {
    "gemma2": GEMMA,
    "gemma3_text": {**GEMMA, **QK_NORM},
    "phi3": {
        "self_attn.qkv_proj.weight": "attention",
        "self_attn.o_proj.weight": "attention",
        "mlp.gate_up_proj.weight": "mlp",
        "mlp.down_proj.weight": "mlp",
        "input_layernorm.weight": "norm",
        "post_attention_layernorm.weight": "norm",
    },
    "gpt_neox": {
        f"{module}.{leaf}": role
        for module, role in {
            "attention.query_key_value": "attention",
            "attention.dense": "attention",
            "mlp.dense_h_to_4h": "mlp",
            "mlp.dense_4h_to_h": "mlp",
            "input_layernorm": "norm",
            "post_attention_layernorm": "norm",
        }.items()
        for leaf in ("weight", "bias")
    },
    "stablelm": {**LLAMA, "input_layernorm.bias": "norm", "post_attention_layernorm.bias": "norm"},
    "gpt2": {
        f"{module}.{leaf}": role
        for module, role in {
            "attn.c_attn": "attention",
            "attn.c_proj": "attention",
            "mlp.c_fc": "mlp",
            "mlp.c_proj": "mlp",
            "ln_1": "norm",
            "ln_2": "norm",
        }.items()
        for leaf in ("weight", "bias")
    },
    "olmo2": {
        **{name: role for name, role in GEMMA.items() if name[:4] not in ("inpu", "pre_")},
        **QK_NORM,
    },
    "mixtral": {
        **{name: role for name, role in LLAMA.items() if role != "mlp"},
        "block_sparse_moe.gate.weight": "router",
        **{f"block_sparse_moe.experts.{e}.w{w}.weight": "mlp" for e in range(3) for w in (1, 2, 3)},
    },
    "qwen3_moe": {**{name: role for name, role in LLAMA.items() if role != "mlp"}, **QK_NORM, **EXPERTS},
}
OTHER_OUTSIDE = {
    "gpt_neox": {
        "gpt_neox.embed_in.weight": ("pre", "embedding"),
        "gpt_neox.final_layer_norm.weight": ("post", "norm"),
        "gpt_neox.final_layer_norm.bias": ("post", "norm"),
        "embed_out.weight": ("post", "head"),
    },
    "gpt2": {
        "transformer.wte.weight": ("pre", "embedding"),
        "transformer.wpe.weight": ("pre", "embedding"),
        "transformer.ln_f.weight": ("post", "norm"),
        "transformer.ln_f.bias": ("post", "norm"),
        "lm_head.weight": ("post", "head"),
    },
}
OUTSIDE = {
    "model.embed_tokens.weight": ("pre", "embedding"),
    "model.norm.weight": ("post", "norm"),
    "lm_head.weight": ("post", "head"),
}

OTHERS = [
    ("transformer.wte.weight", "pre", "embedding"),
    ("wpe.weight", "pre", "embedding"),
    ("h.11.ln_1.bias", 11, "norm"),
    ("transformer.h.3.attn.c_attn.weight", 3, "attention"),
    ("transformer.h.3.attn.c_proj.bias", 3, "attention"),
    ("transformer.h.3.mlp.c_fc.weight", 3, "mlp"),
    ("transformer.ln_f.weight", "post", "norm"),
    ("gpt_neox.embed_in.weight", "pre", "embedding"),
    ("gpt_neox.layers.5.attention.query_key_value.weight", 5, "attention"),
    ("gpt_neox.layers.5.attention.dense.bias", 5, "attention"),
    ("gpt_neox.layers.5.mlp.dense_h_to_4h.weight", 5, "mlp"),
    ("gpt_neox.layers.5.input_layernorm.bias", 5, "norm"),
    ("gpt_neox.final_layer_norm.weight", "post", "norm"),
    ("embed_out.weight", "post", "head"),
    ("model.layers.31.block_sparse_moe.gate.weight", 31, "router"),
    ("model.layers.31.block_sparse_moe.experts.7.w2.weight", 31, "mlp"),
    ("model.layers.2.mlp.gate.weight", 2, "router"),
    ("model.layers.2.mlp.experts.63.gate_proj.weight", 2, "mlp"),
    ("model.layers.2.mlp.shared_expert_gate.weight", 2, "router"),
    ("model.layers.2.mlp.shared_expert.up_proj.weight", 2, "mlp"),
    ("model.layers.0.pre_feedforward_layernorm.weight", 0, "norm"),
    ("model.layers.0.post_feedforward_layernorm.weight", 0, "norm"),
    ("transformer.word_embeddings.weight", "pre", "embedding"),
    ("transformer.word_embeddings_layernorm.weight", "pre", "norm"),
    ("transformer.h.0.self_attention.query_key_value.weight", 0, "attention"),
    ("backbone.embeddings.weight", "pre", "embedding"),
    ("backbone.layers.4.mixer.in_proj.weight", 4, "mixer"),
    ("model.tok_embeddings.weight", "pre", "embedding"),
    ("output.weight", "post", "head"),
    ("embeddings.LayerNorm.weight", "pre", "norm"),
    ("score.weight", "post", "other"),
]


def test_every_tensor_of_the_four_families_has_its_role_and_position(any_model: Path) -> None:
    checkpoint = open_checkpoint(str(any_model))
    kind = checkpoint.config["model_type"]
    expected = {
        f"model.layers.{layer}.{suffix}": (layer, role)
        for layer in range(4)
        for suffix, role in LAYERS[kind].items()
    } | {name: place for name, place in OUTSIDE.items() if not (checkpoint.tied and "head" in name)}
    assert {name: (parse(name).position, parse(name).role) for name in checkpoint.tensors} == expected


@pytest.mark.parametrize("kind", OTHER_LAYERS)
def test_every_tensor_of_the_other_families_has_its_role_and_position(kind: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_model(tmp_path / "model", kind=kind, layers=2, tokenizer=False))
    prefix = {"gpt_neox": "gpt_neox.layers", "gpt2": "transformer.h"}.get(kind, "model.layers")
    outside = OTHER_OUTSIDE.get(kind, OUTSIDE)
    if kind == "stablelm":
        outside = {**outside, "model.norm.bias": ("post", "norm")}
    expected = {
        f"{prefix}.{layer}.{suffix}": (layer, role)
        for layer in range(2)
        for suffix, role in OTHER_LAYERS[kind].items()
    } | outside
    assert {name: (parse(name).position, parse(name).role) for name in checkpoint.tensors} == expected


@pytest.mark.parametrize(
    ("kind", "name", "transposed"),
    [
        ("gpt2", "transformer.h.0.attn.c_attn.weight", True),
        ("gpt2", "transformer.h.11.mlp.c_proj.weight", True),
        ("gpt2", "transformer.h.0.mlp.c_fc.bias", False),
        ("gpt2", "transformer.wte.weight", False),
        ("gpt2", "lm_head.weight", False),
        ("gpt_bigcode", "transformer.h.0.attn.c_attn.weight", False),
        ("llama", "model.layers.0.mlp.up_proj.weight", False),
    ],
)
def test_matrices_of_gpt2_are_stored_transposed(kind: str, name: str, transposed: bool) -> None:
    assert is_transposed({"model_type": kind}, name) is transposed


@pytest.mark.parametrize(("name", "position", "role"), OTHERS)
def test_names_of_other_families(name: str, position: int | str, role: str) -> None:
    assert (parse(name).position, parse(name).role) == (position, role)


def test_a_stem_leads_to_the_same_tensor_of_another_layer() -> None:
    tensor = parse("model.layers.2.mlp.experts.2.up_proj.weight")
    assert tensor.stem == "model.layers.{}.mlp.experts.2.up_proj.weight"
    assert tensor.at_layer(17) == "model.layers.17.mlp.experts.2.up_proj.weight"


@pytest.mark.parametrize(
    ("name", "buffer"),
    [
        ("model.layers.0.self_attn.rotary_emb.inv_freq", True),
        ("transformer.h.0.attn.bias", True),
        ("transformer.h.0.attn.masked_bias", True),
        ("gpt_neox.layers.0.attention.bias", True),
        ("gpt_neox.layers.0.attention.rotary_emb.inv_freq", True),
        ("model.rotary_emb.sliding_attention_inv_freq", True),
        ("model.embed_tokens.embed_scale", True),
        ("embeddings.position_ids", True),
        ("transformer.h.0.attn.c_attn.bias", False),
        ("gpt_neox.layers.0.attention.dense.bias", False),
        ("model.layers.0.self_attn.q_proj.bias", False),
    ],
)
def test_known_buffers(name: str, buffer: bool) -> None:
    assert is_buffer(name) is buffer
