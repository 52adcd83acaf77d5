"""The hash of a checkpoint's content, non-finite weights, and what is remembered of both."""

from __future__ import annotations

import itertools
import os
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from evomerge.checkpoints import open_checkpoint
from evomerge.errors import CheckpointError
from tests.checkpoints.helpers import Q
from tests.models import make_model


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
