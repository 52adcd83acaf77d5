from __future__ import annotations

import gc
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from evomerge.environment import prepare

prepare()


def new_cache(place: Path | None = None) -> str:
    """Return a cache folder of evomerge's with nothing in it but the compiled kernels, which all tests share."""
    folder = tempfile.mkdtemp(prefix="evomerge-test-cache-", dir=place)
    kernels = Path(os.environ.setdefault("EVOMERGE_TEST_KERNELS", f"{folder}/native"))
    kernels.mkdir(exist_ok=True)
    if kernels.parent != Path(folder):
        Path(folder, "native").symlink_to(kernels)
    return folder


os.environ["EVOMERGE_CACHE"] = new_cache()

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)

SLOWEST = ("tests/workers", "tests/searching", "tests/zoo", "tests/merging")
"""Folders whose files take long: they come first, so that no process waits for another's last one."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the slowest files first; each stays in its order."""

    def place(item: pytest.Item) -> int:
        folder = item.nodeid.rpartition("/")[0]
        return SLOWEST.index(folder) if folder in SLOWEST else len(SLOWEST)

    items.sort(key=place)


def pytest_collection_finish() -> None:
    """Keep the garbage collector out of what imports made: there is much of it, and all of it stays."""
    gc.freeze()


@pytest.fixture
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what the test computes out of other tests' way, in a cache folder of its own."""
    monkeypatch.setenv("EVOMERGE_CACHE", new_cache(tmp_path_factory.getbasetemp()))


@pytest.fixture
def heard() -> Iterator[None]:
    """Ctrl-C is listened to, here and in processes started from here, also in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


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
