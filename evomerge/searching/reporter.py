"""Keeps the display and status.json up to date while a run goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from evomerge.searching.progress import Clock, Display, Status, StatusWriter
from evomerge.workers.work import Result


class Reporter:
    """Holds the newest status; every change is shown and written.

    Args:
        folder: the run directory.
        display: where a person looks.
        total: candidates that the budget pays for; None if only time limits them.
        workers: tells how many workers there are.
    """

    def __init__(
        self, folder: Path, display: Display, *, total: int | None, workers: Callable[[], int]
    ) -> None:
        self._display = display
        self._file = StatusWriter(folder)
        self._workers = workers
        self._status = Status(state="starting", phase="starting workers", total=total)
        self._clock = Clock(0, 0)

    @property
    def seconds(self) -> float:
        """Seconds since `start_clock`."""
        return self._clock.seconds

    def start_clock(self, *, candidates: int, item_evaluations: int) -> None:
        """Measure rates from here on, given what earlier drivers did."""
        self._clock = Clock(item_evaluations, candidates)
        self._status = replace(self._status, item_evaluations=item_evaluations)

    def show(self, **changes: Any) -> None:
        """Change fields of the status and show it."""
        status = replace(self._status, **changes, workers=self._workers())
        busy = status.state in ("running", "selecting")
        self._status = status = replace(
            status,
            rate=self._clock.rate(status.item_evaluations) if busy else 0.0,
            eta_seconds=self._clock.eta(status.candidates, status.total)
            if status.state == "running"
            else None,
        )
        self._file.write(status)
        if busy or status.state == "starting":
            self._display.show(status)

    def on_event(self, result: Result | None) -> None:
        """Count what a result brought; for `Scheduler`."""
        scored = sum(len(outcome.scores) for outcome in result.outcomes) if result is not None else 0
        self.show(item_evaluations=self._status.item_evaluations + scored)

    def say(self, text: str) -> None:
        """Show a sentence that stays."""
        self._display.say(text)
