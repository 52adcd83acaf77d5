from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from evomerge.environment import prepare

prepare()
os.environ["EVOMERGE_CACHE"] = tempfile.mkdtemp(prefix="evomerge-test-cache-")

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny Llama base and three experts, shared by all tests: do not write into them."""
    from tests.models import make_family

    return make_family(tmp_path_factory.mktemp("family"))


@pytest.fixture(scope="session")
def model(family: dict[str, Path]) -> Any:
    """The tiny base in float32, shared: tests that change weights put them back."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(family["base"], dtype=torch.float32)


@pytest.fixture(scope="session")
def tokenizer(family: dict[str, Path]) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(family["base"])
