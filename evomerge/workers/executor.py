"""What the scheduler asks of whoever does the work."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from evomerge.evaluation.items import Item
from evomerge.recipe import Recipe
from evomerge.workers.work import Result, Work, WorkerLost

if TYPE_CHECKING:
    from evomerge.evaluation.suite import Preview

Event = Result | WorkerLost


def times(share: float, whole: float) -> int:
    """Return how often a share of a machine fits into what there is of it: ten times 0.2 into 2, unlike ``//``."""
    return math.floor(whole / share + 1e-9)


class Executor(Protocol):
    """A set of workers behind one queue.

    Results come back in any order. Losing a worker is reported for the request it held and never raised;
    the executor replaces the worker by itself.
    """

    @property
    def workers(self) -> int:
        """How many requests run at once."""

    def start(self, recipe: Recipe, tell: Callable[[str], None] = lambda phase: None) -> str:
        """Set the workers up on a first recipe; return the fingerprint that they share.

        Args:
            recipe: what they hold first.
            tell: called with what is going on.

        Raises:
            UserError: a worker refused the config or its files.
            InfrastructureError: workers cannot be had, or their fingerprints differ.
        """

    def watch(self, listener: Callable[[str, int], None]) -> None:
        """From now on tell, inside `next_event`, a request's id and about how many of its items are answered."""

    def submit(self, work: Work) -> None:
        """Queue a request."""

    def next_event(self, timeout: float) -> Event | None:
        """Wait up to `timeout` seconds for an answer; None if there was none."""

    def preview(self, recipe: Recipe, items: Sequence[Item]) -> list[Preview]:
        """Let a recipe answer single items."""

    def close(self) -> None:
        """Stop all workers and forget what is queued. May be called twice."""
