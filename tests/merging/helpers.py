"""What several tests of merging need: short recipes, and reading folders with safetensors itself."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from evomerge.recipe import Recipe


def make_recipe(models: Mapping[str, Path], **parts: Any) -> Recipe:
    """Build a recipe over all models; `merge` is short for the only merge."""
    merge = parts.pop("merge", None)
    if merge is not None:
        parts["merges"] = {"merged": merge}
    return Recipe.from_dict({"models": {name: str(path) for name, path in models.items()}, **parts})


def read(folder: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of a folder, whatever its shards."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors


def read64(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.double() for name, tensor in read(folder).items()}


def rewrite(folder: Path, change: Mapping[str, torch.Tensor]) -> None:
    """Replace tensors of a single-file folder."""
    file = folder / "model.safetensors"
    save_file({**load_file(file), **change}, file, metadata={"format": "pt"})


def digests(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    return {
        name: hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, tensor in tensors.items()
    }


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference relative to the largest expected value."""
    return float((actual.double() - expected.double()).abs().max() / expected.double().abs().max())
