from __future__ import annotations

import errno
import itertools
import json
import os
import pickle
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from evomerge.checkpoints import Checkpoint, open_checkpoint
from evomerge.errors import CheckpointError
from tests.models import make_model

Q = "model.layers.1.self_attn.q_proj.weight"
EMBEDDING = "model.embed_tokens.weight"


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


class TestConfig:
    def test_missing(self, model: Path) -> None:
        (model / "config.json").unlink()
        with pytest.raises(CheckpointError, match=r"model/config.json: is missing"):
            open_checkpoint(str(model))

    @pytest.mark.parametrize("text", ["{", "[]", "", "\x00", "[" * 100_000])
    def test_broken(self, model: Path, text: str) -> None:
        (model / "config.json").write_text(text)
        with pytest.raises(
            CheckpointError, match=r"model/config.json: (not valid JSON|should hold a JSON object)"
        ):
            open_checkpoint(str(model))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"quantization_config": {"quant_method": "gptq"}}, r"quantization_config: .*quantised \(gptq\)"),
            ({"num_hidden_layers": "four"}, "num_hidden_layers: 'four' is not a positive whole number"),
            ({"num_hidden_layers": 0}, "num_hidden_layers: 0 is not a positive"),
            ({"tie_word_embeddings": "no"}, "tie_word_embeddings: 'no' is neither true nor false"),
        ],
    )
    def test_wrong_values(
        self, model: Path, change: dict[str, Any], message: str, edit_json: Callable[..., None]
    ) -> None:
        edit_json(model / "config.json", lambda config: config.update(change))
        with pytest.raises(CheckpointError, match="config.json: " + message):
            open_checkpoint(str(model))

    def test_without_a_number_of_layers(self, model: Path, edit_json: Callable[..., None]) -> None:
        edit_json(model / "config.json", lambda config: config.pop("num_hidden_layers"))
        with pytest.raises(CheckpointError, match=r"config.json: num_hidden_layers: this key is missing"):
            open_checkpoint(str(model))
        edit_json(model / "config.json", lambda config: config.update(text_config={"num_hidden_layers": 0}))
        with pytest.raises(CheckpointError, match=r"text_config.num_hidden_layers: 0 is not a positive"):
            open_checkpoint(str(model))


class TestTensors:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda w: w.pop(Q), f"tensor '{Q}' is missing; 3 of 4 layers"),
            (lambda w: w.pop(EMBEDDING), "the token embedding is missing"),
            (lambda w: w.pop("lm_head.weight"), "'lm_head.weight' is missing, and config.json says tie_word"),
            (
                lambda w: w.update({"model.layers.2.mlp.extra.weight": torch.ones(3)}),
                "tensor 'model.layers.2.mlp.extra.weight' is unknown; only 1 of 4 layers",
            ),
            (
                lambda w: w.update({Q.replace(".1.", ".4."): w[Q].clone()}),
                r"'model.layers.4.self_attn.q_proj.weight' belongs to layer 4, but .* declares 4 layers",
            ),
            (
                lambda w: [w.pop(name) for name in list(w) if ".layers.3." in name],
                "layer 3 of 4 has no tensors at all",
            ),
            (lambda w: w.update({Q: w[Q].to(torch.int32)}), f"'{Q}' has dtype I32, which cannot be merged"),
            (lambda w: w.update({Q: w[Q].to(torch.float8_e4m3fn)}), f"'{Q}' has dtype F8_E4M3"),
        ],
    )
    def test_the_set_must_be_complete_and_mergeable(
        self,
        model: Path,
        change: Callable[[dict[str, torch.Tensor]], Any],
        message: str,
        edit_weights: Callable[..., None],
    ) -> None:
        edit_weights(model, change)
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(str(model))

    def test_layers_may_differ_where_the_config_gives_them_types(
        self, model: Path, edit_weights: Callable[..., None], edit_json: Callable[..., None]
    ) -> None:
        def replace_attention(weights: dict[str, torch.Tensor]) -> None:
            for layer in (0, 2):
                for name in [name for name in weights if f".layers.{layer}.self_attn." in name]:
                    weights[name.replace("self_attn", "linear_attn")] = weights.pop(name)

        edit_weights(model, replace_attention)
        with pytest.raises(CheckpointError, match="linear_attn"):
            open_checkpoint(str(model))
        types = ["linear_attention", "full_attention"] * 2
        edit_json(model / "config.json", lambda config: config.update(layer_types=types))
        assert "model.layers.2.linear_attn.q_proj.weight" in open_checkpoint(str(model)).tensors

        edit_weights(model, lambda w: w.pop("model.layers.2.linear_attn.q_proj.weight"))
        with pytest.raises(
            CheckpointError, match=r"'model.layers.2.linear_attn.q_proj.weight' is missing; 1 of 2"
        ):
            open_checkpoint(str(model))

    def test_kinds_of_attention_mask_do_not_excuse_a_missing_tensor(
        self, model: Path, edit_weights: Callable[..., None], edit_json: Callable[..., None]
    ) -> None:
        types = ["full_attention", "sliding_attention", "full_attention", "full_attention"]
        edit_json(model / "config.json", lambda config: config.update(layer_types=types))
        edit_weights(model, lambda w: w.pop(Q))
        with pytest.raises(CheckpointError, match=f"tensor '{Q}' is missing"):
            open_checkpoint(str(model))

    def test_leading_dense_layers_of_a_mixture_of_experts_are_accepted(
        self, model: Path, edit_weights: Callable[..., None], edit_json: Callable[..., None]
    ) -> None:
        def expand(weights: dict[str, torch.Tensor]) -> None:
            for name in [name for name in weights if ".mlp." in name and ".layers.0." not in name]:
                weights[name.replace(".mlp.", ".mlp.experts.0.")] = weights.pop(name)

        edit_weights(model, expand)
        with pytest.raises(CheckpointError, match=r"missing|unknown"):
            open_checkpoint(str(model))
        edit_json(model / "config.json", lambda config: config.update(first_k_dense_replace=1))
        open_checkpoint(str(model))


def split(file: Path) -> tuple[dict[str, Any], bytes]:
    """Take a safetensors file apart: header and data."""
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


class TestFile:
    def test_truncation_anywhere_is_refused(self, model: Path) -> None:
        file = model / "model.safetensors"
        data = file.read_bytes()
        start = 8 + struct.unpack("<Q", data[:8])[0]
        for length in (0, 1, 7, 8, 9, start // 2, start - 1, start, start + 1, len(data) // 2, len(data) - 1):
            file.write_bytes(data[:length])
            with pytest.raises(CheckpointError, match=r"model/model.safetensors: truncated"):
                open_checkpoint(str(model))

    def test_the_first_tensor_that_is_cut_is_named(self, model: Path) -> None:
        file = model / "model.safetensors"
        header, data = split(file)
        cut = header[Q]["data_offsets"][0] + 4
        file.write_bytes(file.read_bytes()[: cut - len(data)])
        with pytest.raises(CheckpointError, match=f"ends in '{Q}'"):
            open_checkpoint(str(model))

    def test_trailing_bytes_are_refused(self, model: Path) -> None:
        with (model / "model.safetensors").open("ab") as stream:
            stream.write(b"garbage")
        with pytest.raises(CheckpointError, match="7 bytes are left over after the last tensor"):
            open_checkpoint(str(model))

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer.*git lfs pull"),
            (struct.pack("<Q", 2) + b"[]", "header is not a JSON object"),
            (struct.pack("<Q", 3) + b"{a}", "header is not valid JSON"),
            (struct.pack("<Q", 2) + b"\xff\xfe", "header is not valid JSON"),
            (struct.pack("<Q", 1 << 62) + b"{}", "truncated"),
            (struct.pack("<Q", 15) + b'{"a":{},"a":{}}', "lists 'a' twice"),
            (struct.pack("<Q", 7) + b'{"a":1}', "the header of 'a' needs dtype, shape and two data_offsets"),
        ],
    )
    def test_what_is_no_safetensors_file_is_refused(self, model: Path, content: bytes, message: str) -> None:
        (model / "model.safetensors").write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(str(model))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                lambda e: e.update(shape=[32, 31]),
                r"'{q}' of shape \[32, 31\].* needs 3,968 bytes, .* span 4,096",
            ),
            (lambda e: e.update(shape=[-32, -32]), "'{q}' has a shape or offset that is not a whole number"),
            (
                lambda e: e.update(shape=[True, 1024]),
                "'{q}' has a shape or offset that is not a whole number",
            ),
            (lambda e: e.update(dtype="F4"), "'{q}' has dtype F4, which cannot be merged"),
            (lambda e: e.update(data_offsets=[0, 4096]), "overlap"),
            (
                lambda e: e.update(data_offsets=[o + 10**6 for o in e["data_offsets"]]),
                "bytes before .* are unused",
            ),
            (lambda e: e.update(data_offsets=[1]), "the header of '{q}' needs"),
            (lambda e: e.pop("dtype"), "the header of '{q}' needs"),
        ],
    )
    def test_contradictions_in_the_header_are_refused(
        self, model: Path, change: Callable[[dict[str, Any]], Any], message: str
    ) -> None:
        file = model / "model.safetensors"
        header, data = split(file)
        change(header[Q])
        text = json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + data)
        with pytest.raises(CheckpointError, match="model/model.safetensors: .*" + message.replace("{q}", Q)):
            open_checkpoint(str(model))

    def test_a_disk_that_fails_while_reading_is_told(
        self, model: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        checkpoint = open_checkpoint(str(model))

        def fail(*arguments: Any) -> int:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        monkeypatch.setattr(os, "preadv", fail)
        with pytest.raises(
            CheckpointError, match=r"model.safetensors: cannot be read at byte [\d,]+: Input/output"
        ):
            checkpoint.read_into(Q, 0, torch.empty(4))

    def test_a_file_that_shrinks_while_open_is_told(self, model: Path) -> None:
        checkpoint = open_checkpoint(str(model))
        with (model / "model.safetensors").open("r+b") as stream:
            stream.truncate(20_000)
        last = next(reversed(checkpoint.tensors))
        with pytest.raises(CheckpointError, match="became shorter"):
            checkpoint.tensor(last)
        with pytest.raises(CheckpointError, match="became shorter"):
            checkpoint.check_finite()


class TestIndex:
    INDEX = "model.safetensors.index.json"

    def test_a_missing_shard(self, sharded: Path) -> None:
        (sharded / "model-00002-of-00003.safetensors").unlink()
        with pytest.raises(
            CheckpointError, match=r"model-00002-of-00003.safetensors: is missing; .* holds 'model"
        ):
            open_checkpoint(str(sharded))

    def test_a_listed_tensor_that_its_shard_lacks(
        self, sharded: Path, edit_json: Callable[..., None]
    ) -> None:
        shard = "model-00001-of-00003.safetensors"
        edit_json(sharded / self.INDEX, lambda i: i["weight_map"].update({"model.ghost.weight": shard}))
        with pytest.raises(CheckpointError, match=f"{shard}: lacks the tensor 'model.ghost.weight'"):
            open_checkpoint(str(sharded))

    def test_a_tensor_that_is_not_listed(self, sharded: Path, edit_json: Callable[..., None]) -> None:
        edit_json(sharded / self.INDEX, lambda index: index["weight_map"].pop(Q))
        with pytest.raises(CheckpointError, match=f"holds the tensor '{Q}', but .* does not list it"):
            open_checkpoint(str(sharded))

    def test_a_tensor_in_two_shards(self, sharded: Path) -> None:
        weight_map = json.loads((sharded / self.INDEX).read_text())["weight_map"]
        other = next(file for file in sorted(sharded.glob("*.safetensors")) if file.name != weight_map[Q])
        weights = load_file(other)
        save_file({**weights, Q: torch.zeros(32, 32)}, other)
        with pytest.raises(
            CheckpointError, match=f"holds the tensor '{Q}', but .* says it lies in {weight_map[Q]}"
        ):
            open_checkpoint(str(sharded))

    @pytest.mark.parametrize("value", [None, {}, [], {"a": 1}, {"a": "../model.safetensors"}])
    def test_a_broken_map(self, sharded: Path, value: Any) -> None:
        (sharded / self.INDEX).write_text(json.dumps({"weight_map": value}))
        with pytest.raises(CheckpointError, match=r"model.safetensors.index.json: weight_map: "):
            open_checkpoint(str(sharded))

    def test_invalid_json(self, sharded: Path) -> None:
        (sharded / self.INDEX).write_text("{")
        with pytest.raises(CheckpointError, match=r"index.json: not valid JSON"):
            open_checkpoint(str(sharded))


class TestContent:
    def test_the_hash_depends_neither_on_sharding_nor_folder(self, model: Path, sharded: Path) -> None:
        moved = shutil.copytree(model, model.parent / "elsewhere")
        digests = {open_checkpoint(str(path)).sha256 for path in (model, sharded, moved)}
        assert len(digests) == 1

    def test_the_hash_ignores_how_the_config_was_saved(
        self, model: Path, edit_json: Callable[..., None]
    ) -> None:
        before = open_checkpoint(str(model)).sha256

        def resave(config: dict[str, Any]) -> None:
            config.update(transformers_version="4.0", torch_dtype=config.pop("dtype"), _name_or_path="/tmp/x")
            config.update(use_cache=False, rms_norm_eps=config.pop("rms_norm_eps"))

        edit_json(model / "config.json", resave)
        assert open_checkpoint(str(model)).sha256 == before
        edit_json(model / "config.json", lambda config: config.update(rms_norm_eps=1e-5))
        assert open_checkpoint(str(model)).sha256 != before

    def test_one_bit_changes_the_hash(self, model: Path) -> None:
        file = model / "model.safetensors"
        digests = {open_checkpoint(str(model)).sha256}
        original = file.read_bytes()
        for offset in (len(original) - 1 - 4 * k for k in (0, 1000, 10_000)):
            data = bytearray(original)
            data[offset - 3] ^= 1
            file.write_bytes(data)
            digests.add(open_checkpoint(str(model)).sha256)
        assert len(digests) == 4

    def test_names_and_dtypes_count(self, model: Path, edit_weights: Callable[..., None]) -> None:
        before = open_checkpoint(str(model)).sha256
        edit_weights(model, lambda w: w.update({k: v.bfloat16() for k, v in w.items()}))
        rounded = open_checkpoint(str(model)).sha256
        edit_weights(model, lambda w: w.update({k: v.float() for k, v in w.items()}))
        assert len({before, rounded, open_checkpoint(str(model)).sha256}) == 3

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_non_finite_values_are_counted_by_tensor(
        self, tmp_path: Path, dtype: torch.dtype, edit_weights: Callable[..., None]
    ) -> None:
        model = make_model(tmp_path / "m", dtype=dtype)

        def spoil(weights: dict[str, torch.Tensor]) -> None:
            weights[Q][0, :3] = torch.tensor(
                [float("nan"), float("-inf"), torch.finfo(dtype).max], dtype=dtype
            )
            weights[Q][31, 31] = -float("nan")
            weights["model.norm.weight"][0] = float("inf")

        edit_weights(model, spoil)
        checkpoint = open_checkpoint(str(model))
        message = rf"model.safetensors: tensor '{Q}' has 2 NaN and 1 infinite values out of 1,024; 1 further"
        with pytest.raises(CheckpointError, match=message):
            checkpoint.check_finite()
        with pytest.raises(CheckpointError, match=message):
            _ = checkpoint.sha256

    def test_the_largest_finite_values_and_subnormals_are_accepted(
        self, tmp_path: Path, edit_weights: Callable[..., None]
    ) -> None:
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            model = make_model(tmp_path / str(dtype), dtype=dtype)
            limits = torch.finfo(dtype)
            extremes = torch.tensor([limits.max, limits.min, limits.smallest_normal / 2, -0.0], dtype=dtype)
            edit_weights(model, lambda w, extremes=extremes: w[Q][0, :4].copy_(extremes))
            open_checkpoint(str(model)).check_finite()

    def test_tensors_larger_than_a_chunk_are_scanned_to_the_end(self, tmp_path: Path) -> None:
        model = make_model(tmp_path / "m", hidden=1032, layers=1)
        checkpoint = open_checkpoint(str(model))
        name = "model.layers.0.mlp.up_proj.weight"
        info = checkpoint.tensors[name]
        assert info.nbytes > 8 << 20
        first = checkpoint.sha256
        with info.file.open("r+b") as stream:
            stream.seek(info.offset + info.nbytes - 4)
            stream.write(struct.pack("<f", 1.25))
        assert open_checkpoint(str(model)).sha256 != first
        with info.file.open("r+b") as stream:
            stream.seek(info.offset + info.nbytes - 4)
            stream.write(struct.pack("<f", float("nan")))
        with pytest.raises(CheckpointError, match=f"'{name}' has 1 NaN values"):
            open_checkpoint(str(model)).check_finite()


class TestCache:
    @pytest.fixture
    def reads(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """Names of the tensors whose bytes are scanned."""
        from evomerge.checkpoints import content

        names: list[str] = []
        scan = content._scan
        monkeypatch.setattr(
            content, "_scan", lambda info, *rest: names.append(info.name) or scan(info, *rest)
        )
        return names

    def test_a_second_opening_reads_no_weights(self, sharded: Path, reads: list[str]) -> None:
        age(sharded)
        first = open_checkpoint(str(sharded)).sha256
        assert len(reads) == 39
        assert open_checkpoint(str(sharded)).sha256 == first
        assert len(reads) == 39

    @pytest.mark.parametrize("file", ["config.json", "model-00002-of-00003.safetensors"])
    def test_a_touched_file_is_read_again(self, sharded: Path, reads: list[str], file: str) -> None:
        age(sharded)
        first = open_checkpoint(str(sharded)).sha256
        age(sharded / file, seconds=50)
        assert open_checkpoint(str(sharded)).sha256 == first
        assert len(reads) == 2 * 39

    def test_files_too_young_to_trust_their_time_are_not_remembered(
        self, sharded: Path, reads: list[str]
    ) -> None:
        for _ in range(2):
            _ = open_checkpoint(str(sharded)).sha256
        assert len(reads) == 2 * 39

    def test_a_broken_checkpoint_is_never_remembered_as_good(
        self, model: Path, reads: list[str], edit_weights: Callable[..., None]
    ) -> None:
        edit_weights(model, lambda w: w[Q].fill_(float("nan")))
        age(model)
        for _ in range(2):
            with pytest.raises(CheckpointError, match="1,024 NaN"):
                open_checkpoint(str(model)).check_finite()
        assert len(reads) == 2 * 39

    @pytest.mark.parametrize("text", ["", "{", "[]", '{"sha256": 5}', '{"sha256": "short"}'])
    def test_a_spoilt_entry_is_ignored(
        self, model: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("EVOMERGE_CACHE", str(tmp_path / "cache"))
        age(model)
        first = open_checkpoint(str(model)).sha256
        entries = list((tmp_path / "cache" / "checkpoints").iterdir())
        assert len(entries) == 1
        entries[0].write_text(text)
        assert open_checkpoint(str(model)).sha256 == first

    def test_an_unwritable_cache_is_ignored(
        self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "file").touch()
        monkeypatch.setenv("EVOMERGE_CACHE", str(tmp_path / "file"))
        age(model)
        assert len(open_checkpoint(str(model)).sha256) == 64

    def test_the_folder_follows_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from evomerge.environment import cache_folder

        monkeypatch.setenv("EVOMERGE_CACHE", "/own")
        monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
        monkeypatch.setenv("HOME", "/home/x")
        found = [cache_folder()]
        for variable in ("EVOMERGE_CACHE", "XDG_CACHE_HOME"):
            monkeypatch.delenv(variable)
            found.append(cache_folder())
        assert list(map(str, found)) == ["/own", "/xdg/evomerge", "/home/x/.cache/evomerge"]


def age(path: Path, seconds: int = 100) -> None:
    """Set a file's (or each of a folder's files') modification time back."""
    moment = time.time_ns() - seconds * 10**9
    for file in itertools.chain([path], path.iterdir() if path.is_dir() else ()):
        os.utime(file, ns=(moment, moment))
