"""Damaged files are refused: truncated, contradicting themselves, missing from the index."""

from __future__ import annotations

import errno
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from evomerge.checkpoints import open_checkpoint
from evomerge.errors import CheckpointError
from tests.checkpoints.helpers import Q, split


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
