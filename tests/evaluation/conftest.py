from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def own_datasets_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Keep the tests' data out of the user's datasets cache."""
    import datasets

    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    yield
    datasets.config.HF_DATASETS_CACHE = before


@pytest.fixture(scope="session")
def model(family: dict[str, Path]) -> Any:
    """The tiny base in float32, shared: tests that change weights put them back."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(family["base"], dtype=torch.float32)


@pytest.fixture(scope="session")
def tokenizer(family: dict[str, Path]) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(family["base"])
