"""Statistics on disk: nothing half-written is found, and the disk's troubles are told in a sentence."""

from __future__ import annotations

import errno
import hashlib
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from evomerge.cli import main
from evomerge.errors import InfrastructureError, UserError
from evomerge.methods import Statistic
from evomerge.statistics import files
from evomerge.statistics.files import Statistics, StatisticsWriter, cached_folder, find_statistics, with_rows

ABOUT = {"kind": "gram", "unit": 2.0, "tensors": {"x": "x", "y": "x"}}


def write(folder: Path) -> Statistics:
    with StatisticsWriter(folder) as writer:
        writer.write({"x": torch.arange(12.0).reshape(3, 4)})
        return writer.commit(ABOUT)


def test_what_was_written_is_read_slice_by_slice(tmp_path: Path) -> None:
    statistics = write(tmp_path / "s")
    for name in ("x", "y"):
        found = statistics.of(name)
        assert found is not None
        assert found.unit == 2.0
        assert found.values.numel() == 12
        assert found.values[3:5].tolist() == [3, 4]
        assert found.values[10:20].tolist() == [10, 11]
    assert statistics.of("z") is None


def test_nothing_is_left_of_what_is_not_committed(tmp_path: Path) -> None:
    with StatisticsWriter(tmp_path / "s") as writer:
        writer.write({"x": torch.ones(3)})
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed_and_what_a_live_one_writes_is_not(tmp_path: Path) -> None:
    abandoned = tmp_path / ".s.00000000.partial"
    abandoned.mkdir()
    (abandoned / "part-00001.safetensors").write_bytes(b"half")
    with StatisticsWriter(tmp_path / "s") as first:
        first.write({"x": torch.ones(3)})
        assert not abandoned.exists()
        write(tmp_path / "s")
        first.write({"y": torch.ones(3)})
        assert first.commit(ABOUT).of("x").values[0:3].tolist() == [0, 1, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        RuntimeError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def full(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(
        InfrastructureError, match=r"disk is full: the statistics .* name a folder on another disk$"
    ):
        write(tmp_path / "s")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(
        InfrastructureError, match=r"the disk is full: .* set EVOMERGE_CACHE to a folder on another"
    ):
        write(cached_folder("s"))


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written: .*; name another folder$"):
        write(tmp_path / "file" / "s")


def test_a_cache_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EVOMERGE_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot be written: .*; set EVOMERGE_CACHE to another folder$"):
        write(cached_folder("s"))


@pytest.mark.parametrize("step", [1, 3, 4, 7, 100])
def test_rows_are_moved_and_missing_ones_are_zero(step: int) -> None:
    rows = torch.arange(20.0).reshape(5, 4)
    own = np.array([3, 4, -1, -1, 0, 2, 2, -1])
    moved = with_rows(Statistic(rows.reshape(-1), unit=7.0), own, 4)
    expected = torch.stack([rows[i] if i >= 0 else torch.zeros(4) for i in own]).reshape(-1)
    assert moved.unit == 7.0
    assert moved.values.numel() == 32
    parts = [moved.values[start : start + step] for start in range(0, 32, step)]
    assert torch.equal(torch.cat(parts), expected)


DAY = 86_400


def key_of(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def keep(name: str, days: float) -> Path:
    """Keep statistics of a model of some name that were last used some days ago."""
    key = key_of(name)
    with StatisticsWriter(cached_folder(key)) as writer:
        writer.write({"x": torch.ones(1000)})
        folder = writer.commit({**ABOUT, "model": f"models/{name}", "texts": "texts.jsonl"}).folder
    used = time.time() - days * DAY
    os.utime(folder / "about.json", (used, used))
    return folder


def test_kept_statistics_are_listed_and_pruned_by_their_last_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EVOMERGE_CACHE", str(tmp_path))
    old, used, new = keep("old", 40), keep("used", 40), keep("new", 3)
    damaged = tmp_path / "statistics" / key_of("damaged")
    damaged.mkdir()
    foreign = tmp_path / "statistics" / "my own"
    foreign.mkdir()
    assert find_statistics(key_of("used")) is not None
    abandoned = tmp_path / "statistics" / ".gone.01234567.partial"
    abandoned.mkdir()
    with StatisticsWriter(cached_folder(key_of("growing"))) as growing:
        assert main(["statistics", "--list"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert sorted(line.split()[-1] for line in lines) == sorted(map(str, (old, used, new, damaged)))
        assert [line.split()[-1] for line in lines[-2:]] == [str(new), str(old)]
        assert lines[-1].split()[2:6] == ["40", "d", "gram", "models/old"]
        assert main(["statistics", "--prune", "30"]) == 0
        said = capsys.readouterr().out.splitlines()
        assert [line.split()[-1] for line in said[:-1]] == [str(old)]
        assert said[-1].startswith(f"1 removed from {tmp_path / 'statistics'}, ")
        assert not abandoned.exists()
        growing.write({"x": torch.ones(3)})
        growing.commit(ABOUT)
    assert not old.exists()
    assert all(folder.is_dir() for folder in (used, new, damaged))
    assert main(["statistics", "--prune", "0"]) == 0
    assert list((tmp_path / "statistics").iterdir()) == [foreign]
    capsys.readouterr()
    assert main(["statistics", "--list"]) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "MODEL is missing"),
        (["model"], "--data is missing"),
        (["model", "--data", "texts.jsonl"], "--kind is missing"),
        (["model", "--list"], "give nothing else"),
        (["--prune", "-1"], "--prune -1: give a number of days from 0 on"),
        (["--prune", "nan"], "--prune nan: give a number of days from 0 on"),
        (["--prune", "soon"], "--prune: invalid float value: 'soon'"),
    ],
)
def test_mistakes_about_what_is_kept_are_told(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["statistics", *arguments]) == 2
    assert message in capsys.readouterr().err
