"""What a command shows while it works, and how it ends when it is stopped."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from evomerge.errors import Stopped
from evomerge.signals import stopped_by_signals

Show = Callable[[int, int], None]
"""Called with (done, in all)."""

LINE_SECONDS = 5.0
"""How often a line tells the progress where there is no terminal."""


@contextmanager
def stoppable(consequence: str) -> Iterator[None]:
    """Let signals stop what runs inside: `Stopped`, with a sentence's second half that says what became of it."""
    try:
        with stopped_by_signals():
            yield
    except KeyboardInterrupt:
        raise Stopped(f"Stopped; {consequence}.") from None


@contextmanager
def progress_bar(
    beginning: str, working: str, *, in_bytes: bool
) -> Iterator[tuple[Show, Callable[[str], None]]]:
    """Show a bar on stderr where that is a terminal.

    Args:
        beginning: what is done before the first step is reported.
        working: what is done from then on.
        in_bytes: whether steps are bytes, which are shown as such and with their rate.

    Yields:
        A function that is told of steps, and one that prints a line above the bar.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    console = Console(stderr=True)
    amounts = (DownloadColumn(), TransferSpeedColumn()) if in_bytes else (MofNCompleteColumn(),)
    columns = (TextColumn("{task.description}"), BarColumn(), *amounts, TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as display:
        task = display.add_task(beginning, total=None)

        def show(done: int, total: int) -> None:
            display.update(task, description=working, completed=done, total=total)

        yield show, console.print


@contextmanager
def item_progress(working: str, *, quiet: bool) -> Iterator[Show]:
    """Show how many items are done: a bar on a terminal, otherwise a line every few seconds, if not `quiet`."""
    if quiet:
        yield lambda done, total: None
        return
    if sys.stderr.isatty():
        with progress_bar("setting up", working, in_bytes=False) as (show, _):
            yield show
        return
    shown = time.monotonic()

    def line(done: int, total: int) -> None:
        nonlocal shown
        if time.monotonic() - shown >= LINE_SECONDS and total:
            shown = time.monotonic()
            print(f"{working}: {done} of {total} ({done / total:.0%})", file=sys.stderr, flush=True)

    yield line
