from __future__ import annotations

import os
import tempfile
from pathlib import Path

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
