"""kill -9 at random instants, then resume: the canonical tables are those of an undisturbed run."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import evomerge
from tests.searching.records import canonical
from tests.tasks import make_config


def in_child(action: Callable[[], object], *, kill_after: float | None = None) -> int:
    """Run `action` in a forked process; kill it -9 after some seconds. Return its wait status."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
            os._exit(0)
        except BaseException:
            os._exit(1)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]


@pytest.mark.parametrize("optimizer", ["cma", "tpe"])
def test_a_killed_run_resumes_to_the_same_tables(
    optimizer: str, family: dict[str, Path], tasks: Path, tmp_path: Path
) -> None:
    config = make_config(tmp_path, family, tasks, optimizer={"type": optimizer, "population": 4})
    undisturbed = evomerge.search(config, run=tmp_path / "undisturbed")
    # Timed by a second one: the first imports what the forked ones inherit.
    started = time.monotonic()
    evomerge.search(config, run=tmp_path / "timed")
    whole = time.monotonic() - started
    expected = canonical(undisturbed.path)

    moments = random.Random(7)
    interrupted = 0
    for attempt in range(4):
        folder = tmp_path / f"killed-{attempt}"
        for _ in range(2):
            status = in_child(
                lambda folder=folder: evomerge.search(config, run=folder, continue_=True),
                kill_after=moments.uniform(0.1, 1.0) * whole,
            )
            interrupted += os.WIFSIGNALED(status)
        assert (
            os.WEXITSTATUS(
                in_child(lambda folder=folder: evomerge.search(config, run=folder, continue_=True))
            )
            == 0
        )
        assert canonical(folder) == expected
        assert (folder / "recipe.yaml").read_text() == (undisturbed.path / "recipe.yaml").read_text()
    assert interrupted >= 3
