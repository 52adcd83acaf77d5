"""The run directory: whole or not there, files that are never half written, and a status one can trust."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from evomerge.config import Config, parse_config
from evomerge.errors import InfrastructureError, UserError
from evomerge.searching import rundir
from evomerge.searching.progress import Status, StatusWriter
from evomerge.searching.rundir import (
    create_run,
    load_resolved,
    open_run,
    read_status,
    write_atomically,
    write_json,
)
from evomerge.searching.store import Store

ORIGINAL = "# mine\nversion: 1\n"


@pytest.fixture
def config() -> Config:
    data = {
        "version": 1,
        "models": {"base": "/m/base", "experts": ["/m/x", "/m/y"]},
        "space": {"method": "linear", "parameters": {"weight": {"range": [0, 0.1]}}},
        "budget": {"candidates": 8},
        "suite": {"tasks": ["t"]},
    }
    return parse_config(data, Path("/m/c.yaml"))


def test_a_new_run_holds_the_config_verbatim_and_normalised(tmp_path: Path, config: Config) -> None:
    folder = tmp_path / "runs" / "first"
    create_run(folder, config, ORIGINAL).close()
    assert sorted(path.name for path in folder.iterdir()) == ["config.resolved.yaml", "config.yaml", "run.db"]
    assert (folder / "config.yaml").read_text() == ORIGINAL
    assert load_resolved(folder) == config
    assert [path.name for path in folder.parent.iterdir()] == ["first"]
    store = open_run(folder)
    assert store.candidates() == []
    store.close()
    assert read_status(folder) == {"state": "created", "run": str(folder)}


def test_an_empty_folder_or_a_link_to_one_can_become_a_run(tmp_path: Path, config: Config) -> None:
    for name in ("empty", "link"):
        (tmp_path / "target").mkdir(exist_ok=True)
        folder = tmp_path / name
        if name == "link":
            folder.symlink_to(tmp_path / "target")
        else:
            folder.mkdir()
        create_run(folder, config, ORIGINAL).close()
        assert (folder / "run.db").exists()


def test_what_is_there_already_is_never_overwritten(tmp_path: Path, config: Config) -> None:
    folder = tmp_path / "run"
    create_run(folder, config, ORIGINAL).close()
    with pytest.raises(
        UserError, match=f"^{folder}: this run exists already; continue it with 'evomerge resume"
    ):
        create_run(folder, config, "other")
    assert (folder / "config.yaml").read_text() == ORIGINAL
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="is not empty and not a run; name another folder with --run"):
        create_run(thesis, config, ORIGINAL)
    with pytest.raises(UserError, match="is not empty and not a run"):
        create_run(thesis / "thesis.tex", config, ORIGINAL)
    with pytest.raises(UserError, match=r"the run cannot be kept here .*; name another folder with --run"):
        create_run(thesis / "thesis.tex" / "run", config, ORIGINAL)
    assert [path.name for path in thesis.iterdir()] == ["thesis.tex"]


def test_the_current_folder_is_refused(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="is the current folder; name another folder with --run"):
        create_run(Path(), config, ORIGINAL)


def test_a_run_that_cannot_be_made_whole_leaves_nothing(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, *, create: bool) -> Store:
        raise InfrastructureError(f"{path}: cannot be written: database or disk is full")

    monkeypatch.setattr(rundir, "Store", full)
    with pytest.raises(InfrastructureError, match="disk is full"):
        create_run(tmp_path / "run", config, ORIGINAL)
    assert list(tmp_path.iterdir()) == []


def test_opening_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere: no such run$"):
        open_run(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"is not a run \(it has no run.db\)"):
        open_run(tmp_path)
    with pytest.raises(UserError, match="no such run"):
        read_status(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"is not a run \(it has no run.db\)"):
        read_status(tmp_path)


READER = """
import json, sys
path, seen = sys.argv[1], set()
print("ready", flush=True)
while len(seen) < 20:
    seen.add(json.load(open(path))["n"])
"""


def test_a_reader_sees_the_old_or_the_new_file_never_half(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    write_json(path, {"n": 0, "filling": "x" * 100_000})
    reader = subprocess.Popen(
        [sys.executable, "-c", READER, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        n = 0
        while reader.poll() is None and n < 20_000:
            n += 1
            write_json(path, {"n": n, "filling": "x" * (100_000 + n)})
        _, errors = reader.communicate(timeout=20)
    finally:
        reader.kill()
    assert reader.returncode == 0, errors.decode()
    assert [entry.name for entry in tmp_path.iterdir()] == ["status.json"]


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "\ud800")
    assert path.read_text() == "old"
    with pytest.raises(InfrastructureError, match="cannot be written: No such file or directory"):
        write_atomically(tmp_path / "missing" / "x", "text")
    assert [entry.name for entry in tmp_path.iterdir()] == ["recipe.yaml"]


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def write_status(folder: Path, **changes: object) -> None:
    StatusWriter(folder).write(Status(state="running", phase="generation 3", candidates=18), extra=changes)


def test_a_living_driver_is_running_and_a_dead_one_interrupted(tmp_path: Path) -> None:
    write_status(tmp_path)
    status = read_status(tmp_path)
    assert (status["state"], status["candidates"], status["pid"]) == ("running", 18, os.getpid())
    for state in ("starting", "running", "selecting"):
        write_status(tmp_path, state=state, pid=dead_pid())
        assert read_status(tmp_path)["state"] == "interrupted"
    for state in ("stopped", "failed", "done"):
        write_status(tmp_path, state=state, pid=dead_pid())
        assert read_status(tmp_path)["state"] == state


def test_a_run_that_was_moved_is_called_by_its_new_name(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    write_status(old, state="stopped", pid=dead_pid())
    old.rename(new)
    assert read_status(new)["run"] == str(new)


def test_a_driver_on_another_host_is_taken_at_its_word(tmp_path: Path) -> None:
    write_status(tmp_path, pid=dead_pid(), host="another-host")
    assert read_status(tmp_path)["state"] == "running"


@pytest.mark.parametrize("content", ["", "{", "[]", '"running"'])
def test_a_status_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "status.json").write_text(content)
    with pytest.raises(UserError, match=r"status.json: is not a status; 'evomerge resume .*' writes it anew"):
        read_status(tmp_path)


@pytest.mark.parametrize("pid", [None, "x", 10**30])
def test_a_strange_pid_does_not_break_the_reading(tmp_path: Path, pid: object) -> None:
    write_status(tmp_path, pid=pid)
    assert read_status(tmp_path)["state"] == "running"


def test_json_is_readable_by_people(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"name": "Zürich", "n": 0.1})
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert text == '{\n  "name": "Zürich",\n  "n": 0.1\n}\n'
    assert json.loads(text)["n"] == 0.1
