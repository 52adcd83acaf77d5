"""Fetching from the hub, with a hub that is played by a folder."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import shutil
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from evomerge.checkpoints import commits, locate, open_checkpoint
from evomerge.checkpoints.conversion import convert
from evomerge.errors import CheckpointError
from evomerge.merging import open_parents, pin
from tests.adapters import make_adapter
from tests.merging.helpers import make_recipe
from tests.models import make_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"
Usage = namedtuple("Usage", "total used free")


class Hub:
    """A hub with repositories; counts what is fetched."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.repositories: dict[str, Path] = {}
        self.gated: set[str] = set()
        self.sizes: dict[str, int] = {}
        self.fetched: list[str] = []
        self.reachable = True

    def model_info(self, source: str, *, revision: str | None, files_metadata: bool) -> Any:
        from huggingface_hub import errors

        assert files_metadata
        if not self.reachable:
            raise OSError("no route to host")
        if source not in self.repositories:
            raise errors.RepositoryNotFoundError("404", response=_response())
        folder = self.repositories[source]
        siblings = [
            SimpleNamespace(
                rfilename=file.relative_to(folder).as_posix(),
                size=self.sizes.get(file.name, file.stat().st_size),
                blob_id=self.etag(file),
                lfs=SimpleNamespace(sha256=self.etag(file)) if file.suffix != ".json" else None,
            )
            for file in sorted(folder.rglob("*"))
            if file.is_file()
        ]
        return SimpleNamespace(
            sha=COMMIT, siblings=siblings, gated="manual" if source in self.gated else False
        )

    def auth_check(self, source: str) -> None:
        from huggingface_hub import errors

        raise errors.GatedRepoError("403", response=_response())

    def hf_hub_download(self, source: str, name: str, *, revision: str) -> str:
        assert revision == COMMIT
        return str(self._store(source, name))

    def snapshot_download(self, source: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        from huggingface_hub import errors

        snapshot = self.cache / f"models--{source.replace('/', '--')}" / "snapshots" / COMMIT
        if not self.reachable or source not in self.repositories:
            if not snapshot.exists():
                raise errors.LocalEntryNotFoundError("not cached")
            return str(snapshot)
        folder = self.repositories[source]
        for file in sorted(folder.rglob("*")):
            name = file.relative_to(folder).as_posix()
            if file.is_file() and any(fnmatch.fnmatchcase(name, pattern) for pattern in allow_patterns):
                self._store(source, name)
        return str(snapshot)

    def etag(self, file: Path) -> str:
        return hashlib.sha256(file.read_bytes()).hexdigest()

    def _store(self, source: str, name: str) -> Path:
        file = self.repositories[source] / name
        storage = self.cache / f"models--{source.replace('/', '--')}"
        blob, target = storage / "blobs" / self.etag(file), storage / "snapshots" / COMMIT / name
        if not blob.exists():
            blob.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, blob)
            self.fetched.append(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            target.symlink_to(blob)
        return target


def _response() -> Any:
    import httpx2

    return httpx2.Response(404, request=httpx2.Request("GET", "https://huggingface.co"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub.cache))
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", hub.hf_hub_download)
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.snapshot_download)
    return hub


CLUTTER = (
    *(
        "pytorch_model.bin",
        "model.fp16.safetensors",
        "consolidated.safetensors",
        "modeling_custom.py",
        "README.md",
    ),
    *(
        "onnx/model.onnx",
        "original/params.json",
        "4bit/model.safetensors",
        "tf_model.h5",
        "training_args.bin",
    ),
)


def clutter(folder: Path) -> Path:
    for name in CLUTTER:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("clutter")
    return folder


def test_only_what_is_needed_is_fetched(hub: Hub, model: Path) -> None:
    hub.repositories["org/tiny"] = clutter(model)
    wanted = {file.relative_to(model).as_posix() for file in model.rglob("*") if file.is_file()} - {*CLUTTER}
    checkpoint = open_checkpoint("org/tiny")
    assert set(hub.fetched) == wanted
    assert "model.safetensors" in wanted
    assert "tokenizer.json" in wanted
    assert "config.json" in wanted
    assert checkpoint.path == hub.cache / "models--org--tiny" / "snapshots" / COMMIT


def test_of_shards_those_that_the_index_names_are_fetched(hub: Hub, sharded: Path) -> None:
    (sharded / "model-00001-of-00009.safetensors").write_text("of an earlier version")
    hub.repositories["org/tiny"] = clutter(sharded)
    open_checkpoint("org/tiny")
    weights = {name for name in hub.fetched if name.endswith(".safetensors")}
    assert weights == {file.name for file in sharded.glob("model-*-of-00003.safetensors")}
    assert weights


def test_what_is_there_is_not_fetched_again(hub: Hub, model: Path) -> None:
    hub.repositories["org/tiny"] = model
    locate("org/tiny")
    hub.fetched.clear()
    locate("org/tiny")
    assert not hub.fetched
    hub.reachable = False
    assert locate("org/tiny").name == COMMIT


def test_too_little_space_is_told_before_anything_is_fetched(
    hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repositories["org/tiny"] = model
    hub.sizes["model.safetensors"] = 10_000_000
    monkeypatch.setattr("shutil.disk_usage", lambda place: Usage(0, 0, 9_000_000))
    with pytest.raises(
        CheckpointError, match=r"^org/tiny: needs 10,\d{3},\d{3} bytes in .*hub, 9,000,000 are free"
    ):
        locate("org/tiny")
    assert not hub.fetched
    begun = hub.cache / "models--org--tiny" / "blobs" / f"{hub.etag(model / 'model.safetensors')}.incomplete"
    begun.parent.mkdir(parents=True)
    begun.write_bytes(bytes(2_000_000))
    assert locate("org/tiny").name == COMMIT


def test_access_is_checked_before_anything_is_fetched(hub: Hub, model: Path) -> None:
    hub.repositories["org/tiny"] = model
    hub.gated.add("org/tiny")
    with pytest.raises(CheckpointError, match=r"^org/tiny: access is restricted; accept .* 'hf auth login'"):
        locate("org/tiny")
    assert not hub.fetched
    hub.gated.clear()
    locate("org/tiny")
    hub.gated.add("org/tiny")
    assert locate("org/tiny").name == COMMIT


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (
            "pytorch_model.bin",
            r"only pickled weights \(pytorch_model.bin\).*'evomerge convert org/tiny NEW_FOLDER'",
        ),
        ("model.gguf", r"has only GGUF weights \(model.gguf\)"),
        ("notes.txt", "holds no weights"),
    ],
)
def test_other_weights_are_told_before_anything_is_fetched(
    hub: Hub, model: Path, file: str, message: str
) -> None:
    (model / "model.safetensors").rename(model / file)
    hub.repositories["org/tiny"] = model
    with pytest.raises(CheckpointError, match=f"^org/tiny: .*{message}"):
        locate("org/tiny")
    assert not hub.fetched


def test_an_index_that_names_a_file_that_is_not_there_is_told(hub: Hub, sharded: Path) -> None:
    (sharded / "model-00002-of-00003.safetensors").unlink()
    hub.repositories["org/tiny"] = sharded
    with pytest.raises(
        CheckpointError, match=r"index.json names model-00002-of-00003.safetensors, which the repo"
    ):
        locate("org/tiny")


def test_a_repository_that_does_not_exist_is_told(hub: Hub) -> None:
    with pytest.raises(
        CheckpointError, match=r"^org/none: no such folder, and not in the Hugging Face cache"
    ):
        locate("org/none")


def test_pickled_weights_are_fetched_to_be_converted(hub: Hub, model: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    weights = load_file(model / "model.safetensors")
    torch.save(weights, model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    hub.repositories["org/old"] = model
    out = open_checkpoint(str(convert("org/old", tmp_path / "out")))
    assert all(torch.equal(out.tensor(name), tensor) for name, tensor in weights.items())


def test_recipes_are_pinned_to_commits(hub: Hub, tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base, r=2)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": "org/base"})
    )
    hub.repositories |= {"org/base": base, "org/lora": adapter}
    merge = {
        "method": "task_arithmetic",
        "base": "base",
        "inputs": ["x", "y", "z"],
        "parameters": {"weight": 1},
    }
    recipe = make_recipe({"base": "org/base", "x": base, "y": "org/lora", "z": "org/base"}, merge=merge)
    z = recipe.models["z"].model_copy(update={"adapter": "org/lora"})
    recipe = recipe.model_copy(update={"models": {**recipe.models, "z": z}})
    pinned = pin(recipe, open_parents(recipe)).models
    assert {name: (source.revision, source.adapter_revision) for name, source in pinned.items()} == {
        "base": (COMMIT, None),
        "x": (None, None),
        "y": (COMMIT, None),
        "z": (COMMIT, COMMIT),
    }
    assert commits(open_checkpoint("org/lora"), "org/lora", None) == {"revision": COMMIT}
    assert {name for name in hub.fetched if "adapter" in name} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
