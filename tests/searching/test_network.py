"""A local run opens no connection, not even where the libraries were imported before evomerge."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from evomerge.environment import OFFLINE, QUIET
from tests.tasks import make_config

SEARCH = """
import importlib, socket, sys

config, run, *early = sys.argv[1:]
for name in early:
    importlib.import_module(name)

opened = []

def watch(name):
    original = getattr(socket.socket, name)

    def watched(self, address, *rest):
        if self.family != socket.AF_UNIX:
            opened.append((name, address))
            raise OSError(f"{name} to {address}")
        return original(self, address, *rest)

    setattr(socket.socket, name, watched)

for name in ("connect", "connect_ex"):
    watch(name)

def look_up(host, *rest, **more):
    opened.append(("getaddrinfo", host))
    raise OSError(f"looked up {host}")

socket.getaddrinfo = look_up

import evomerge

evomerge.search(config, run=run)
assert not opened, opened
try:
    socket.create_connection(("127.0.0.1", 9))
except OSError:
    pass
assert opened, "the watch does not work"
"""


@pytest.mark.parametrize("early", [(), ("torch", "huggingface_hub", "transformers", "datasets")])
def test_a_local_run_opens_no_connection(
    early: tuple[str, ...], family: dict[str, Path], tasks: Path, tmp_path: Path
) -> None:
    config = make_config(tmp_path, family, tasks, budget={"candidates": 4})
    ours = {*OFFLINE, *QUIET}
    bare = {name: value for name, value in os.environ.items() if name not in ours}
    done = subprocess.run(
        [sys.executable, "-c", SEARCH, str(config), str(tmp_path / "run"), *early],
        env={**bare, "HF_HOME": str(tmp_path / "hub")},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr[-2000:]
