from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from evomerge.checkpoints import open_checkpoint
from evomerge.checkpoints.conversion import convert
from evomerge.cli import main
from evomerge.errors import CheckpointError, UserError
from tests.adapters import make_adapter
from tests.models import make_model

Weights = dict[str, Any]


def pickle_weights(folder: Path, shards: int = 1, *, zipped: bool = True, tie: bool = False) -> Weights:
    """Turn a folder's safetensors into .bin files, and return the weights."""
    weights: Weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if tie:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    names = sorted(weights)
    if shards == 1:
        torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        return weights
    index = {}
    for i in range(shards):
        file = f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin"
        part = {name: weights[name] for name in names[i::shards]}
        torch.save(part, folder / file, _use_new_zipfile_serialization=zipped)
        index |= dict.fromkeys(part, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    return weights


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_keep_their_bytes(model: Path, tmp_path: Path, shards: int, zipped: bool) -> None:
    weights = pickle_weights(model, shards, zipped=zipped)
    out = convert(model, tmp_path / "out", max_shard_size="60KB")
    assert len(list(out.glob("*.safetensors"))) > 1
    checkpoint = open_checkpoint(str(out))
    assert checkpoint.tensors.keys() == weights.keys()
    assert all(torch.equal(checkpoint.tensor(name), tensor) for name, tensor in weights.items())
    assert (out / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    assert open_checkpoint(str(out)).config["hidden_size"] == 32


def test_views_and_parameters_are_written_as_they_read(model: Path, tmp_path: Path) -> None:
    weights = pickle_weights(model)
    q = "model.layers.0.self_attn.q_proj.weight"
    weights[q] = weights[q].T.contiguous().T
    weights["lm_head.weight"] = torch.nn.Parameter(torch.randn(300, 32))[:259]
    torch.save(weights, model / "pytorch_model.bin")
    checkpoint = open_checkpoint(str(convert(model, tmp_path / "out")))
    assert torch.equal(checkpoint.tensor(q), weights[q])
    assert torch.equal(checkpoint.tensor("lm_head.weight"), weights["lm_head.weight"])


@pytest.mark.parametrize("shards", [1, 3])
def test_a_tied_head_is_written_once(tmp_path: Path, shards: int) -> None:
    model = make_model(tmp_path / "model", tied=True)
    weights = pickle_weights(model, shards, tie=True)
    checkpoint = open_checkpoint(str(convert(model, tmp_path / "out")))
    assert checkpoint.tied
    assert checkpoint.tensors.keys() == weights.keys() - {"lm_head.weight"}
    if shards == 1:
        assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")


def test_an_untied_head_with_the_embeddings_storage_is_kept(model: Path, tmp_path: Path) -> None:
    weights = pickle_weights(model, tie=True)
    checkpoint = open_checkpoint(str(convert(model, tmp_path / "out")))
    assert torch.equal(checkpoint.tensor("lm_head.weight"), weights["model.embed_tokens.weight"])


def test_adapters_are_converted(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base, r=4)
    expected = open_checkpoint(str(adapter)).sha256
    weights = load_file(adapter / "adapter_model.safetensors")
    torch.save(weights, adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").rename(tmp_path / "before")
    with pytest.raises(CheckpointError, match=f"evomerge convert {adapter} NEW_FOLDER"):
        open_checkpoint(str(adapter))
    converted = open_checkpoint(str(convert(adapter, tmp_path / "out")))
    assert converted.sha256 == expected


def test_the_command_says_where_the_model_is(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pickle_weights(model)
    assert main(["merge", str(model), str(tmp_path / "no")]) == 2
    capsys.readouterr()
    assert main(["convert", str(model), str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out'}\n"
    with pytest.raises(CheckpointError, match=rf"pickled weights \(pytorch_model.bin\).*convert {model} NEW"):
        open_checkpoint(str(model))


class Attack:
    """Unpickling it would create a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.file),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_runs_code_is_refused_and_not_run(model: Path, tmp_path: Path, zipped: bool) -> None:
    weights = pickle_weights(model)
    weights["extra"] = Attack(tmp_path / "done")
    torch.save(weights, model / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin: refused: it would run code .*mkdir"):
        convert(model, tmp_path / "out")
    assert not (tmp_path / "done").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state_dict": {"a": torch.zeros(2)}}, "'state_dict' is dict, not a tensor; only plain state dicts"),
        ([torch.zeros(2)], "holds list, not tensors by name"),
        ({"model.x": torch.zeros(2, 2).to_sparse()}, "'model.x' is sparse_coo, which safetensors has not"),
        ({}, "holds no tensors"),
    ],
)
def test_other_pickles_are_told(model: Path, tmp_path: Path, content: Any, message: str) -> None:
    pickle_weights(model)
    torch.save(content, model / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=message):
        convert(model, tmp_path / "out")


@pytest.mark.parametrize("keep", [0, 7, 3000])
def test_a_damaged_file_is_told(model: Path, tmp_path: Path, keep: int) -> None:
    pickle_weights(model)
    file = model / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin: (refused: it is damaged|cannot be read)"):
        convert(model, tmp_path / "out")


def test_junk_is_told_in_words(model: Path, tmp_path: Path) -> None:
    pickle_weights(model)
    (model / "pytorch_model.bin").write_bytes(b"junk" * 100)
    with pytest.raises(
        CheckpointError, match=r"cannot be read: it is damaged, or no file of tensors; download"
    ):
        convert(model, tmp_path / "out")


def test_what_cannot_be_converted_is_told(model: Path, sharded: Path, tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=f"^{model}: has safetensors weights; there is nothing to convert"
    ):
        convert(model, tmp_path / "out")
    pickle_weights(model, 3)
    with pytest.raises(UserError, match="is not an empty folder"):
        convert(model, sharded)
    (model / "pytorch_model-00002-of-00003.bin").unlink()
    with pytest.raises(CheckpointError, match=r"pytorch_model-00002-of-00003.bin: is missing"):
        convert(model, tmp_path / "out")
    (model / "pytorch_model.bin.index.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"there is no pytorch_model.bin or pytorch_model.bin.index.json"
    ):
        convert(model, tmp_path / "out")
