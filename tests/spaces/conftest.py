from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from evomerge.config import Config, parse_config
from evomerge.recipe import Source
from evomerge.spaces import CoefficientSpace


def make_config(
    parameters: dict[str, Any],
    *,
    method: str = "ties",
    experts: tuple[str, ...] = ("a", "b", "c"),
    optimizer: str = "random",
) -> Config:
    """A search over `parameters`; everything else is the smallest that is accepted."""
    data = {
        "version": 1,
        "models": {"base": "/zoo/base", "experts": {name: f"/zoo/{name}" for name in experts}},
        "space": {"method": method, "parameters": parameters},
        "optimizer": {"type": optimizer},
        "budget": {"candidates": 10},
        "suite": {"tasks": ["add"]},
        "seed": 7,
    }
    return parse_config(data, Path("config.yaml"))


def make_sources(config: Config) -> dict[str, Source]:
    names = ("base", *config.models.experts)
    return {name: Source(source=f"/zoo/{name}", sha256=f"{i:064x}") for i, name in enumerate(names)}


def make_space(parameters: dict[str, Any], *, layers: int = 4, **options: Any) -> CoefficientSpace:
    config = make_config(parameters, **options)
    return CoefficientSpace(config, num_layers=layers, sources=make_sources(config))


@pytest.fixture(scope="session")
def tensor_names(family: dict[str, Path]) -> list[str]:
    """Names of all tensors of a Llama with four layers."""
    from safetensors import safe_open

    with safe_open(family["base"] / "model.safetensors", "pt") as file:
        return sorted(file.keys())
