"""Every form in which a checkpoint is saved opens as the same canonical tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from evomerge.checkpoints import Checkpoint, open_checkpoint, parse
from evomerge.checkpoints.canonical import language_prefix, outside_parts, written_name
from evomerge.checkpoints.model_config import set_dtype, set_tied, text_config
from evomerge.checkpoints.names import OUTSIDE, is_outside
from evomerge.errors import CheckpointError
from tests.models import make_model


def tensors(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return {name: checkpoint.tensor(name).clone() for name in checkpoint.tensors}


def assert_same(one: Checkpoint, other: Checkpoint, outside: bool = True) -> None:
    ours, theirs = tensors(one), tensors(other)
    if not outside:
        ours = {name: tensor for name, tensor in ours.items() if not is_outside(name)}
        theirs = {name: tensor for name, tensor in theirs.items() if not is_outside(name)}
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def rename(folder: Path, change: Callable[[str], str]) -> Path:
    file = folder / "model.safetensors"
    weights = {change(name): tensor.clone() for name, tensor in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_neox"])
def test_the_form_that_transformers_has_in_memory_opens_as_the_published_one(
    tmp_path: Path, kind: str
) -> None:
    options: dict[str, Any] = {"kind": kind, "seed": 3, "layers": 2, "tokenizer": False}
    published = open_checkpoint(make_model(tmp_path / "published", **options))
    live = open_checkpoint(make_model(tmp_path / "live", **options, live_form=True))
    assert {info.name for info in live.tensors.values()} != set(live.tensors)
    assert all(info.name == name for name, info in published.tensors.items())
    assert_same(published, live)
    assert live.sha256 == published.sha256
    assert live.nbytes == published.nbytes


def test_two_tensors_of_one_canonical_name_are_refused(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m", kind="llama", tokenizer=False)
    file = folder / "model.safetensors"
    # Half of the checkpoint was renamed by hand, as a multimodal one has it; a head stands there twice.
    weights = load_file(file)
    weights = {name.replace("model.", "language_model.model.", 1): t.clone() for name, t in weights.items()}
    weights["language_model.lm_head.weight"] = weights["lm_head.weight"] + 1
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError,
        match=r"model.safetensors: the tensors 'language_model.lm_head.weight' and 'lm_head.weight' are both read as "
        r"'lm_head.weight'; take one of them out",
    ):
        open_checkpoint(folder)


def test_fused_experts_are_read_chunk_by_chunk(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_model(tmp_path / "m", kind="mixtral", live_form=True, tokenizer=False))
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    whole = load_file(tmp_path / "m" / "model.safetensors")["model.layers.1.mlp.experts.gate_up_proj"]
    assert torch.equal(checkpoint.tensor(name), whole[2, 64:])
    out = checkpoint.read_into(name, 100, torch.empty(33))
    assert torch.equal(out, whole[2, 64:].reshape(-1)[100:133])
    with pytest.raises(ValueError, match="2048 elements"):
        checkpoint.read_into(name, 2000, torch.empty(100))


def test_fused_experts_of_families_that_are_published_so_stay_fused(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m", kind="mixtral", live_form=True, tokenizer=False)
    config = (folder / "config.json").read_text().replace('"mixtral"', '"unheard_of"')
    (folder / "config.json").write_text(config)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.tensors["model.layers.0.mlp.experts.gate_up_proj"].shape == (3, 128, 32)


@pytest.mark.parametrize(
    ("kind", "prefix", "published"),
    [("gpt2", "transformer.", "wte.weight"), ("llama", "model.", "embed_tokens.weight")],
)
def test_models_saved_without_their_heads_prefix(
    tmp_path: Path, kind: str, prefix: str, published: str
) -> None:
    options: dict[str, Any] = {"kind": kind, "seed": 3, "layers": 2, "tokenizer": False}
    usual = open_checkpoint(make_model(tmp_path / "usual", **options))
    bare = rename(make_model(tmp_path / "bare", **options), lambda name: name.removeprefix(prefix))
    assert published in load_file(bare / "model.safetensors")
    assert_same(usual, open_checkpoint(bare))


def test_buffers_of_old_checkpoints_are_ignored(tmp_path: Path) -> None:
    for kind, names in {
        "gpt2": ["transformer.h.0.attn.bias", "transformer.h.0.attn.masked_bias"],
        "gpt_neox": ["gpt_neox.layers.1.attention.bias", "gpt_neox.layers.1.attention.rotary_emb.inv_freq"],
    }.items():
        folder = make_model(tmp_path / kind, kind=kind, layers=2, tokenizer=False)
        before = set(open_checkpoint(folder).tensors)
        weights = load_file(folder / "model.safetensors")
        save_file({**weights, **{name: torch.zeros(2) for name in names}}, folder / "model.safetensors")
        assert set(open_checkpoint(folder).tensors) == before


GEMMA_FORMS = {
    "published": lambda name: name,
    "live": lambda name: (
        "model." + name
        if name.startswith(("vision_tower", "multi_modal"))
        else name.replace("language_model.model.", "model.language_model.").replace(
            "language_model.lm_head", "lm_head"
        )
    ),
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("form", GEMMA_FORMS)
def test_the_language_model_of_a_multimodal_model_has_the_text_models_names(
    tmp_path: Path, form: str, tied: bool
) -> None:
    wrapper = make_model(tmp_path / "wrapper", kind="gemma3", layers=2, tied=tied, tokenizer=False)
    on_disk = set(load_file(rename(wrapper, GEMMA_FORMS[form]) / "model.safetensors"))
    text = open_checkpoint(
        make_model(tmp_path / "t", kind="gemma3_text", layers=2, tied=tied, tokenizer=False)
    )
    checkpoint = open_checkpoint(wrapper)
    inside = {name for name in checkpoint.tensors if not is_outside(name)}
    assert inside == set(text.tensors)
    prefix = language_prefix(checkpoint.tensors)
    assert {written_name(name, prefix) for name in checkpoint.tensors} == on_disk
    assert {checkpoint.tensors[name].name for name in checkpoint.tensors} == on_disk
    outside = [name for name in checkpoint.tensors if is_outside(name)]
    assert outside_parts(outside) == {"multi_modal_projector": 2, "vision_tower": len(outside) - 2}
    assert {(parse(name).position, parse(name).role) for name in outside} == {("pre", "other")}
    assert (checkpoint.num_layers, checkpoint.tied) == (2, tied)
    assert checkpoint.text_config["model_type"] == "gemma3_text"


def test_both_forms_of_a_multimodal_model_hold_the_same(tmp_path: Path) -> None:
    options: dict[str, Any] = {"kind": "gemma3", "layers": 2, "tied": True, "tokenizer": False}
    published = open_checkpoint(make_model(tmp_path / "published", **options))
    live = open_checkpoint(make_model(tmp_path / "live", **options, live_form=True))
    assert_same(published, live, outside=False)
    assert published.sha256 != live.sha256


def test_a_language_model_with_plain_names_beside_towers(
    tmp_path: Path, edit_json: Callable[..., None]
) -> None:
    folder = make_model(tmp_path / "m", kind="qwen2", layers=2, tokenizer=False)
    text = set(open_checkpoint(folder).tensors)
    edit_json(folder / "config.json", lambda config: config.update(vision_config={"depth": 1}))
    weights = load_file(folder / "model.safetensors")
    tower = {
        "visual.blocks.0.attn.qkv.weight": torch.ones(2, 2),
        "model.visual.ids": torch.ones(2, dtype=torch.long),
    }
    save_file({**weights, **tower}, folder / "model.safetensors")
    checkpoint = open_checkpoint(folder)
    assert set(checkpoint.tensors) - text == {OUTSIDE + name for name in tower}
    assert len(checkpoint.sha256) == 64


def test_the_number_of_layers_that_a_nested_config_leaves_out_is_counted(
    tmp_path: Path, edit_json: Callable[..., None]
) -> None:
    folder = make_model(tmp_path / "m", kind="gemma3", layers=3, tied=True, tokenizer=False)
    edit_json(folder / "config.json", lambda config: config["text_config"].pop("num_hidden_layers"))
    assert open_checkpoint(folder).num_layers == 3
    weights = load_file(folder / "model.safetensors")
    weights.pop("language_model.model.layers.1.mlp.up_proj.weight")
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"'model\.layers\.1\.mlp\.up_proj\.weight' is missing"):
        open_checkpoint(folder)


def test_settings_that_a_merge_changes_are_changed_where_a_nested_config_repeats_them() -> None:
    config: dict[str, Any] = {
        "torch_dtype": "float32",
        "text_config": {"torch_dtype": "float32", "tie_word_embeddings": True},
        "vision_config": {"hidden_size": 3},
    }
    set_dtype(config, torch.bfloat16)
    set_tied(config, False)
    assert config == {
        "dtype": "bfloat16",
        "tie_word_embeddings": False,
        "text_config": {"dtype": "bfloat16", "tie_word_embeddings": False},
        "vision_config": {"hidden_size": 3},
    }


def test_text_config_is_the_whole_config_of_a_text_model() -> None:
    config = {"model_type": "llama", "text_config": None}
    assert text_config(config) is config
