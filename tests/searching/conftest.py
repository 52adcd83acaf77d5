from __future__ import annotations

from pathlib import Path

import pytest

from tests.tasks import make_tasks


@pytest.fixture(scope="session")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two tiny multiple-choice tasks."""
    return make_tasks(tmp_path_factory.mktemp("tasks"))
