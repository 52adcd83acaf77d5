from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from evomerge.checkpoints import locate, open_checkpoint
from evomerge.errors import CheckpointError


def test_a_folder_becomes_an_absolute_path(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model.parent)
    assert locate("model") == locate("./model") == locate(str(model)) == model


@pytest.mark.parametrize(
    "source", ["./nowhere", "/no/where", "~/no-such-folder-here", "zoo/base/model", "a b"]
)
def test_a_missing_path_is_told_as_such(source: str) -> None:
    with pytest.raises(CheckpointError, match=f"^{source}: no such folder"):
        locate(source)


@pytest.mark.parametrize("revision", [None, "v2"])
def test_a_hub_id_that_is_not_cached_needs_the_network(revision: str | None) -> None:
    with pytest.raises(
        CheckpointError, match=r"^nobody/nothing: .*not in the Hugging Face cache.*HF_HUB_OFFLINE"
    ):
        locate("nobody/nothing", revision)


def test_a_hub_id_is_found_in_the_cache(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--org--tiny"
    commit = "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(model, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    assert locate("org/tiny") == locate("org/tiny", commit) == repository / "snapshots" / commit
    assert open_checkpoint("org/tiny").name == "tiny"


def test_a_revision_of_a_local_folder_is_refused(model: Path) -> None:
    with pytest.raises(CheckpointError, match="revision 'main' is given, but this is a local folder"):
        locate(str(model), "main")


def test_a_file_is_refused(model: Path) -> None:
    with pytest.raises(CheckpointError, match="is a file; name the folder"):
        locate(str(model / "model.safetensors"))


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("pytorch_model.bin", r"pickled weights \(pytorch_model.bin\).*evomerge convert"),
        ("consolidated.00.pth", "pickled weights"),
        ("model.pt", "pickled weights"),
        ("model-q4.gguf", r"only GGUF weights \(model-q4.gguf\)"),
        ("notes.txt", "holds no weights: there is neither model.safetensors nor"),
    ],
)
def test_other_weight_formats_are_refused_with_the_way_out(model: Path, file: str, message: str) -> None:
    (model / "model.safetensors").rename(model / file)
    with pytest.raises(CheckpointError, match=message):
        locate(str(model))


def test_an_adapter_is_no_model(model: Path, tmp_path: Path) -> None:
    peft = tmp_path / "adapter"
    peft.mkdir()
    (peft / "adapter_config.json").write_text("{}")
    (peft / "adapter_model.safetensors").touch()
    with pytest.raises(CheckpointError, match=f"^{peft}: is a LoRA adapter, not a model"):
        locate(str(peft))
