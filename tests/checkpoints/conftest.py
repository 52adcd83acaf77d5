from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models import KINDS, make_model


@pytest.fixture(autouse=True)
def _own_cache(own_cache: None) -> None:
    """Keep content hashes of test checkpoints apart."""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A tiny Llama in one file, which the test may spoil."""
    return make_model(tmp_path / "model")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """The same Llama in three files, which the test may spoil."""
    return make_model(tmp_path / "sharded", max_shard_size="100KB")


@pytest.fixture(scope="session", params=[(kind, tied) for kind in KINDS for tied in (False, True)], ids=str)
def any_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each family, tied and untied, in shards of 100 KB: do not write into it."""
    kind, tied = request.param
    return make_model(tmp_path_factory.mktemp(kind) / "model", kind=kind, tied=tied, max_shard_size="100KB")


Weights = dict[str, torch.Tensor]


@pytest.fixture
def edit_weights() -> Callable[[Path, Callable[[Weights], Any]], None]:
    """Apply a function to the dict of tensors of a one-file checkpoint."""

    def edit(folder: Path, change: Callable[[Weights], Any]) -> None:
        weights = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


@pytest.fixture
def edit_json() -> Callable[[Path, Callable[[dict[str, Any]], Any]], None]:
    """Apply a function to the object in a JSON file."""

    def edit(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
        data = json.loads(file.read_text())
        change(data)
        file.write_text(json.dumps(data))

    return edit
