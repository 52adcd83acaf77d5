"""Families of tiny models, and mergekit run in this process."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.merging.helpers import read
from tests.models import make_model

Family = dict[str, Path]
Families = Callable[[str], Family]
Peer = Callable[[Mapping[str, Any], Path], dict[str, torch.Tensor]]


@pytest.fixture(autouse=True)
def _own_cache(own_cache: None) -> None:
    """Keep content hashes of test checkpoints apart."""


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> Families:
    """Return a family by its kind, made once: ``llama``, ``mistral``, ``qwen2``, ``llama tied``, …"""
    made: dict[str, Family] = {}

    def family(kind: str) -> Family:
        if kind not in made:
            name, _, variant = kind.partition(" ")
            made[kind] = make_relatives(tmp_path_factory.mktemp(name), kind=name, tied=variant == "tied")
        return made[kind]

    return family


def make_relatives(folder: Path, **options: Any) -> Family:
    """Write a base and three experts whose task vectors have a large common part, as those of fine-tunes have."""
    options |= {"hidden": 16, "layers": 4, "tokenizer": False}
    base = make_model(folder / "base", seed=1, **options)
    common = make_model(folder / "common", seed=2, base=base, noise=0.03, **options)
    experts = {
        name: make_model(folder / name, seed=10 + i, base=common, noise=0.015, **options)
        for i, name in enumerate("abc")
    }
    return {"base": base, **experts}


@pytest.fixture(scope="session")
def peer() -> Peer:
    """Merge a document by mergekit 0.1.5."""
    config = pytest.importorskip("mergekit.config")
    run_merge = pytest.importorskip("mergekit.merge").run_merge
    options = pytest.importorskip("mergekit.options").MergeOptions

    def merge(document: Mapping[str, Any], out: Path) -> dict[str, torch.Tensor]:
        logging.disable(logging.CRITICAL)
        try:
            run_merge(
                config.MergeConfiguration.model_validate(document),
                str(out),
                options(copy_tokenizer=False, write_model_card=False, quiet=True, random_seed=0),
            )
        finally:
            logging.disable(logging.NOTSET)
        return read(out)

    return merge


def steps(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the distance of two bfloat16 tensors in steps between neighbouring numbers."""
    order = [t.view(torch.int16).int() for t in (x, y)]
    order = [torch.where(t < 0, -(t & 0x7FFF), t) for t in order]
    return (order[0] - order[1]).abs()


def agree(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor], share: float = 0.999) -> None:
    """Assert that two bfloat16 models are one step apart at most, on at least a share of all elements."""
    assert one.keys() == two.keys()
    near, count = 0, 0
    for name, tensor in one.items():
        assert tensor.dtype == two[name].dtype == torch.bfloat16, name
        assert tensor.shape == two[name].shape, name
        close = steps(tensor, two[name]) <= 1
        assert close.float().mean() > 0.98, f"{name}: {int((~close).sum())} of {close.numel()} differ"
        near += int(close.sum())
        count += tensor.numel()
    assert near >= share * count
