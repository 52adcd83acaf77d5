"""What an opened checkpoint gives: its tensors, whole, in pieces, as views, and which of them count."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from evomerge.checkpoints import Checkpoint, open_checkpoint
from tests.checkpoints.helpers import EMBEDDING, Q, split
from tests.models import make_model


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


def test_tensors_are_those_that_safetensors_reads(any_model: Path) -> None:
    checkpoint = open_checkpoint(str(any_model), name="x")
    expected = {k: v for file in any_model.glob("*.safetensors") for k, v in load_file(file).items()}
    assert checkpoint.tensors.keys() == expected.keys()
    assert all(same_bytes(checkpoint.tensor(name), tensor) for name, tensor in expected.items())
    assert checkpoint.config == json.loads((any_model / "config.json").read_text())
    assert checkpoint.tied is checkpoint.config["tie_word_embeddings"]
    assert ("lm_head.weight" in checkpoint.tensors) is not checkpoint.tied
    assert (checkpoint.name, checkpoint.path, checkpoint.num_layers) == ("x", any_model, 4)
    assert checkpoint.nbytes == sum(tensor.nbytes for tensor in expected.values())


def test_tensors_come_in_order_of_file_and_offset(any_model: Path) -> None:
    places = [(info.file, info.offset) for info in open_checkpoint(str(any_model)).tensors.values()]
    assert places == sorted(places)
    assert len({file for file, _ in places}) > 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    checkpoint = open_checkpoint(str(make_model(tmp_path / "m", dtype=dtype)))
    assert checkpoint.dtype == checkpoint.tensor(Q).dtype == dtype


def test_the_dtype_is_that_of_most_elements(model: Path, edit_weights: Callable[..., None]) -> None:
    edit_weights(model, lambda w: w.update({k: v.bfloat16() for k, v in w.items() if v.dim() > 1}))
    checkpoint = open_checkpoint(str(model))
    assert checkpoint.dtype == torch.bfloat16
    assert checkpoint.tensor("model.norm.weight").dtype == torch.float32


def test_a_view_does_not_copy_the_file(model: Path) -> None:
    checkpoint = open_checkpoint(str(model))
    assert checkpoint.tensor(Q).data_ptr() == checkpoint.tensor(Q).data_ptr()
    assert checkpoint.tensor(Q).data_ptr() % 8 == checkpoint.tensors[Q].offset % 8


def test_opening_views_warns_of_nothing(model: Path, recwarn: pytest.WarningsRecorder) -> None:
    open_checkpoint(str(model)).tensor(Q)
    assert not recwarn.list


@pytest.mark.parametrize("padding", [1, 2, 3])
def test_tensors_at_odd_offsets_are_read(model: Path, padding: int) -> None:
    expected = open_checkpoint(str(model)).tensor(Q).clone()
    file = model / "model.safetensors"
    header, data = split(file)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8 + padding)
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)
    assert same_bytes(open_checkpoint(str(model)).tensor(Q), expected)


def test_pieces_of_a_tensor_are_read_into_a_buffer(sharded: Path) -> None:
    checkpoint = open_checkpoint(str(sharded))
    whole = checkpoint.tensor(Q).flatten()
    buffer = torch.empty(100)
    for start in range(0, whole.numel() - 100, 100):
        assert checkpoint.read_into(Q, start, buffer) is buffer
        assert torch.equal(buffer, whole[start : start + 100])
    with pytest.raises(ValueError, match="has 1024 elements, not 1000 to 1100"):
        checkpoint.read_into(Q, 1000, buffer)
    with pytest.raises(ValueError, match="that dtype"):
        checkpoint.read_into(Q, 0, torch.empty(10, dtype=torch.bfloat16))


def test_a_checkpoint_is_picklable_in_any_state(sharded: Path) -> None:
    checkpoint = open_checkpoint(str(sharded))
    before = checkpoint.tensor(Q).clone()
    digest = checkpoint.sha256
    data = pickle.dumps(checkpoint)
    assert len(data) < 20_000
    copy: Checkpoint = pickle.loads(data)
    del checkpoint
    assert same_bytes(copy.tensor(Q), before)
    assert copy.sha256 == digest


def test_known_buffers_are_left_out_whatever_their_dtype(
    model: Path, edit_weights: Callable[..., None]
) -> None:
    names = set(open_checkpoint(str(model)).tensors)
    edit_weights(
        model,
        lambda w: w.update(
            {
                "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
                "model.layers.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.bool),
                "model.position_ids": torch.arange(8),
            }
        ),
    )
    assert set(open_checkpoint(str(model)).tensors) == names


def test_a_head_that_repeats_a_tied_embedding_is_left_out_and_another_one_counts(
    tmp_path: Path, edit_weights: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    tied = make_model(tmp_path / "tied", tied=True)
    digest = open_checkpoint(str(tied)).sha256
    edit_weights(tied, lambda w: w.update({"lm_head.weight": w[EMBEDDING].clone()}))
    checkpoint = open_checkpoint(str(tied))
    assert "lm_head.weight" not in checkpoint.tensors
    assert checkpoint.sha256 == digest

    edit_weights(tied, lambda w: w["lm_head.weight"][200].neg_())
    checkpoint = open_checkpoint(str(tied))
    assert not checkpoint.tied
    assert "lm_head.weight" in checkpoint.tensors
    assert "the embeddings are tied, but 'lm_head.weight' differs from 'model.embed_tokens" in caplog.text


@pytest.mark.parametrize(
    ("model_type", "head", "tied"),
    [("llama", True, False), ("llama", False, True), ("gemma", False, True), ("qwen2", True, False)],
)
def test_where_the_config_does_not_say_the_family_and_the_head_decide(
    model: Path,
    model_type: str,
    head: bool,
    tied: bool,
    edit_json: Callable[..., None],
    edit_weights: Callable[..., None],
) -> None:
    edit_json(
        model / "config.json", lambda c: (c.pop("tie_word_embeddings"), c.update(model_type=model_type))
    )
    if not head:
        edit_weights(model, lambda w: w.pop("lm_head.weight"))
    assert open_checkpoint(str(model)).tied is tied
