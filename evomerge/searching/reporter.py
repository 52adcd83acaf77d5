"""Keeps the display and status.json up to date while a run goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from evomerge.engines import LayerEvaluations
from evomerge.searching.progress import Clock, Display, State, Status, StatusWriter
from evomerge.searching.scheduler import Recorded


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
        self._clock = Clock(0)
        self._items_after: int | None = None
        self._under_way = 0

    def start_clock(self, *, item_evaluations: int, cached: int, layers: LayerEvaluations) -> None:
        """Measure rates from here on, given what earlier drivers did."""
        self._clock = Clock(item_evaluations - cached)
        self._status = replace(
            self._status,
            item_evaluations=item_evaluations,
            cached_item_evaluations=cached,
            layer_evaluations=layers.computed,
            saved_layer_evaluations=layers.saved,
        )

    def enter(self, state: State, phase: str, *, items_after: int | None, **changes: Any) -> None:
        """Show that a phase begins.

        Args:
            state, phase: as in `Status`.
            items_after: items to be answered after this phase until the run ends; None if nobody knows.
            changes: further fields of the status.
        """
        self._items_after = items_after
        self.show(state=state, phase=phase, phase_done=0, phase_total=0, **changes)

    def show(self, **changes: Any) -> None:
        """Change fields of the status and show it."""
        status = replace(self._status, **changes, workers=self._workers())
        busy = status.state in ("running", "selecting")
        asked = status.item_evaluations - status.cached_item_evaluations + self._under_way
        rate = self._clock.rate(asked) if busy else 0.0
        known = busy and rate > 0 and self._items_after is not None and status.phase_total > 0
        left = status.phase_total - status.phase_done + (self._items_after or 0)
        self._status = status = replace(status, rate=rate, eta_seconds=left / rate if known else None)
        self._file.write(status)
        if busy or status.state == "starting":
            self._display.show(status)

    def on_progress(self, done: int, total: int, under_way: int) -> None:
        """Note how many items of the present phase are answered, and of these not recorded; for `Scheduler`."""
        self._under_way = under_way
        self._status = replace(self._status, phase_done=done, phase_total=total)

    def on_event(self, recorded: Recorded | None) -> None:
        """Count what was recorded; for `Scheduler`."""
        new = recorded or Recorded(0)
        self.show(
            item_evaluations=self._status.item_evaluations + new.items,
            cached_item_evaluations=self._status.cached_item_evaluations + new.cached,
            layer_evaluations=self._status.layer_evaluations + new.layers.computed,
            saved_layer_evaluations=self._status.saved_layer_evaluations + new.layers.saved,
        )

    def say(self, text: str) -> None:
        """Show a sentence that stays."""
        self._display.say(text)
