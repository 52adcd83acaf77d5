"""What a person sees while a search runs: a live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from evomerge.searching.rundir import STATUS, write_json

State = Literal["starting", "running", "selecting", "stopped", "failed", "done"]

LINE_SECONDS = 10.0
STATUS_SECONDS = 1.0


@dataclass(frozen=True)
class Status:
    """A snapshot of a run.

    Attributes:
        state: where the run is.
        phase: the same in words.
        candidates, total: told and planned (None: no count ceiling).
        generation: the one at work, from 0.
        failed: candidates that could not be scored.
        median, best: fitness in the last complete generation.
        incumbent: shrunk fitness of the best candidate so far.
        item_evaluations: items scored in all.
        cached_item_evaluations: of these, how many an earlier run had scored.
        layer_evaluations, saved_layer_evaluations: layers times tokens, and those that candidates had in common.
        rate: items asked per second since the driver started.
        eta_seconds: until the run ends, selection included, at the present rate; None if that cannot be told.
        workers: how many there are.
        phase_done, phase_total: items of the present generation, or step of the selection: answered, those of
            requests under way included, and in all.
    """

    state: State
    phase: str
    candidates: int = 0
    total: int | None = None
    generation: int = 0
    failed: int = 0
    median: float | None = None
    best: float | None = None
    incumbent: float | None = None
    item_evaluations: int = 0
    cached_item_evaluations: int = 0
    layer_evaluations: int = 0
    saved_layer_evaluations: int = 0
    rate: float = 0.0
    eta_seconds: float | None = None
    workers: int = 0
    phase_done: int = 0
    phase_total: int = 0


class Display(Protocol):
    """Something that shows statuses and sentences."""

    def show(self, status: Status) -> None:
        """Show the newest status."""

    def say(self, text: str) -> None:
        """Show a sentence that stays."""

    def close(self) -> None:
        """Leave the terminal as it was."""


class LiveDisplay:
    """A panel at the bottom of the terminal that redraws itself."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, refresh_per_second=4, transient=False)
        self._started = False

    def show(self, status: Status) -> None:
        """See `Display.show`."""
        if not self._started:
            self._live.start()
            self._started = True
        self._live.update(_panel(status))

    def say(self, text: str) -> None:
        """See `Display.say`."""
        self._console.print(text, highlight=False, markup=False)

    def close(self) -> None:
        """See `Display.close`."""
        if self._started:
            self._live.stop()
            self._started = False


class LineDisplay:
    """One line per phase, generation and step of the selection, and one at least every `LINE_SECONDS`."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._shown = 0.0
        self._key: tuple[str, int] | None = None

    def show(self, status: Status) -> None:
        """See `Display.show`."""
        phase = status.state if status.state == "running" else status.phase.partition(":")[0]
        key = (phase, status.candidates)
        now = time.monotonic()
        if key != self._key or now - self._shown >= LINE_SECONDS:
            self._key, self._shown = key, now
            print(one_line(status), file=self._stream, flush=True)

    def say(self, text: str) -> None:
        """See `Display.say`."""
        print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """See `Display.close`."""


class Silent:
    """Shows nothing; for the Python face and tests."""

    def show(self, status: Status) -> None:
        """See `Display.show`."""

    def say(self, text: str) -> None:
        """See `Display.say`."""

    def close(self) -> None:
        """See `Display.close`."""


def display_for(stream: TextIO | None = None) -> Display:
    """Return the display that suits a stream (default: stderr)."""
    stream = stream or sys.stderr
    console = Console(file=stream)
    return LiveDisplay(console) if console.is_terminal else LineDisplay(stream)


class StatusWriter:
    """Keeps ``status.json`` up to date, at most once a second unless the state changes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._written = 0.0
        self._state = ""

    def write(self, status: Status, extra: Mapping[str, Any] | None = None) -> None:
        """Write a status if it is due."""
        now = time.monotonic()
        if status.state == self._state and now - self._written < STATUS_SECONDS:
            return
        self._state, self._written = status.state, now
        facts = {
            "run": str(self._folder),
            "pid": os.getpid(),
            "host": os.uname().nodename,
            "time": time.time(),
        }
        write_json(self._folder / STATUS, {**asdict(status), **facts, **(extra or {})})


class Clock:
    """Measures rates since the driver started, without what earlier drivers did."""

    def __init__(self, item_evaluations: int) -> None:
        self._start = time.monotonic()
        self._items = item_evaluations

    def rate(self, item_evaluations: int) -> float:
        """Items per second."""
        return (item_evaluations - self._items) / max(time.monotonic() - self._start, 1e-9)


def one_line(status: Status) -> str:
    """Return a status as one line of plain text."""
    if status.state == "starting":
        return status.phase
    total = f"/{status.total}" if status.total else ""
    parts = [f"{status.phase}{_share(status)}: {status.candidates}{total} candidates"]
    if status.failed:
        parts.append(f"{status.failed} failed")
    for name in ("median", "best", "incumbent"):
        value = getattr(status, name)
        if value is not None:
            parts.append(f"{name} {value:.3f}")
    parts.append(evaluations(status.item_evaluations, status.cached_item_evaluations))
    if status.saved_layer_evaluations:
        parts.append(prefix_sharing(status.layer_evaluations, status.saved_layer_evaluations))
    if status.rate > 0:
        parts.append(per_second(status.rate))
    if status.eta_seconds is not None:
        parts.append(f"ETA {duration(status.eta_seconds)}")
    return ", ".join(parts)


def evaluations(count: int, cached: int) -> str:
    """Return how many items were evaluated, in words, and how many of these scores an earlier run had left."""
    known = f" ({cached:,} known from earlier runs)" if cached else ""
    return f"{count:,} item evaluations{known}"


def prefix_sharing(computed: int, saved: int) -> str:
    """Return what layer paths with common beginnings saved, in words."""
    return f"prefix sharing saved {saved / max(1, computed + saved):.0%} of layer evaluations"


def per_second(rate: float) -> str:
    """Return items per second, or seconds per item where that is the larger number."""
    if rate >= 1:
        return f"{rate:,.0f}/s"
    return f"{1 / rate:,.1f} s each" if rate > 0 else "0/s"


def duration(seconds: float) -> str:
    """Return a duration in words, e.g. ``1h 05m`` or ``42s``."""
    seconds = round(seconds)
    hours, rest = divmod(seconds, 3600)
    minutes, seconds = divmod(rest, 60)
    if hours:
        return f"{hours}h {minutes:02d}m"
    return f"{minutes}m {seconds:02d}s" if minutes else f"{seconds}s"


def _share(status: Status) -> str:
    return f" ({status.phase_done:,}/{status.phase_total:,} items)" if status.phase_total else ""


def _panel(status: Status) -> RenderableType:
    if status.state == "starting":
        return Spinner("dots", text=status.phase)
    if status.state == "running" and status.total:
        done, total = status.candidates, status.total
    else:
        done, total = status.phase_done, status.phase_total
    head = Table.grid(padding=(0, 1))
    counted = f"{status.candidates}/{status.total}" if status.total else str(status.candidates)
    head.add_row(
        ProgressBar(total=total or 1, completed=done, width=32),
        f"{counted} candidates",
        Text(f"{status.failed} failed", style="red") if status.failed else "",
    )
    fitness = Table.grid(padding=(0, 3))
    fitness.add_row(
        "fitness",
        _number("median", status.median),
        _number("best", status.best),
        _number("incumbent", status.incumbent),
    )
    pace = Table.grid(padding=(0, 3))
    pace.add_row(
        evaluations(status.item_evaluations, status.cached_item_evaluations),
        per_second(status.rate),
        f"ETA {duration(status.eta_seconds)}" if status.eta_seconds is not None else "ETA –",
        f"{status.workers} worker{'s' if status.workers != 1 else ''}",
    )
    phase = Text.assemble((status.phase, "bold"), _share(status))
    return Group(phase, head, fitness, pace)


def _number(name: str, value: float | None) -> str:
    return f"{name} {value:.3f}" if value is not None else f"{name} –"


class Closing:
    """Closes a display whatever happens."""

    def __init__(self, display: Display) -> None:
        self._display = display

    def __enter__(self) -> Display:
        return self._display

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._display.close()


def sentence(status: Mapping[str, Any]) -> str:
    """Return what ``status.json`` says, in a few lines."""
    state = status.get("state", "created")
    run = status.get("run", "")
    if state == "created":
        return f"{run}: made, not started yet; go on with 'evomerge resume {run}'"
    known = {field: status[field] for field in Status.__dataclass_fields__ if field in status}
    line = f"{run}: {state}\n  {one_line(Status(**known))}"
    if state in ("stopped", "interrupted", "failed"):
        line += f"\n  go on with 'evomerge resume {run}'"
    return line
