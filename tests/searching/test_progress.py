"""Long work shows progress: while it starts, and within a block."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest

import evomerge
import evomerge.workers.worker
from evomerge.searching.progress import LineDisplay, Silent, Status, one_line, per_second
from tests.tasks import make_config


class Recorder(Silent):
    """Keeps what is shown, and what status.json says at that time."""

    def __init__(self, run: Path) -> None:
        self.seen: list[Status] = []
        self.written: list[int] = []
        self._file = run / "status.json"

    def show(self, status: Status) -> None:
        self.seen.append(status)
        if self._file.exists():
            self.written.append(json.loads(self._file.read_text())["phase_done"])


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let workers tell every step."""
    monkeypatch.setattr(evomerge.workers.worker, "TELL_SECONDS", 0.0)
    monkeypatch.setattr("evomerge.searching.progress.STATUS_SECONDS", 0.0)


def test_items_are_counted_within_a_block(
    family: dict[str, Path], tasks: Path, tmp_path: Path, eager: None
) -> None:
    recorder = Recorder(tmp_path / "run")
    config = make_config(tmp_path, family, tasks, engine={"batch_tokens": 60}, budget={"candidates": 4})
    evomerge.search(config, run=tmp_path / "run", display=recorder)
    steps = [status for status in recorder.seen if status.phase == "generation 1" and status.phase_total]
    done = [status.phase_done for status in steps]
    assert done == sorted(done)
    assert done[-1] == 64
    # Blocks of 8 items in parts of 4: some of what is shown lies within a part.
    assert {count % 8 for count in done} > {0, 4}
    assert {count % 8 for count in recorder.written} > {0, 4}
    within = [status for status in steps if status.phase_done % 8]
    assert all(status.rate > 0 for status in within)


def test_the_beginning_tells_what_it_does(family: dict[str, Path], tasks: Path, tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "run")
    config = make_config(tmp_path, family, tasks, budget={"candidates": 4})
    evomerge.search(config, run=tmp_path / "run", display=recorder)
    phases = list(dict.fromkeys(s.phase for s in recorder.seen if s.state == "starting"))
    wanted = [
        "reading models",
        *(rf"hashing weights: {name}, [0-9.e+-]+ GB" for name in family),
        "rendering prompts: tiny_a",
        "rendering prompts: tiny_b",
        "starting workers: .*trying the engine",
        "preview: .*",
    ]
    assert [next(p for p in phases if re.fullmatch(pattern, p)) for pattern in wanted] == [
        phase for phase in phases if any(re.fullmatch(pattern, phase) for pattern in wanted)
    ]


def test_lines_name_each_kind_of_phase_once() -> None:
    stream = io.StringIO()
    display = LineDisplay(stream)
    for phase in ("reading models", *(f"rendering prompts: task {i}" for i in range(30)), "starting workers"):
        display.show(Status(state="starting", phase=phase))
    assert stream.getvalue().splitlines() == [
        "reading models",
        "rendering prompts: task 0",
        "starting workers",
    ]


def test_slow_models_are_told_in_seconds_an_item() -> None:
    assert [per_second(rate) for rate in (1234.5, 12.4, 1.0, 0.5, 0.031, 0.0)] == [
        "1,234/s", "12/s", "1/s", "2.0 s each", "32.3 s each", "0/s",
    ]  # fmt: skip
    status = Status(state="running", phase="generation 1", rate=0.25, phase_done=3, phase_total=64)
    assert one_line(status).startswith("generation 1 (3/64 items): ")
    assert "4.0 s each" in one_line(status)
