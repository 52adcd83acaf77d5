from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep statistics of test checkpoints out of the user's cache folder."""
    monkeypatch.setenv("EVOMERGE_CACHE", str(tmp_path_factory.mktemp("cache")))
