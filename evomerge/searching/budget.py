"""What a budget pays for."""

from __future__ import annotations

from collections.abc import Callable

from evomerge.config import Budget
from evomerge.errors import UserError


def affordable(budget: Budget, *, population: int, items_per_generation: int) -> int | None:
    """Return how many whole generations the count ceilings pay for; None if only time is limited.

    Raises:
        UserError: not even one.
    """
    limits = []
    if budget.candidates is not None:
        if budget.candidates < population:
            raise UserError(
                f"budget.candidates: {budget.candidates} is less than one generation of {population}; give at "
                f"least {population}, or set optimizer.population"
            )
        limits.append(budget.candidates // population)
    if budget.item_evaluations is not None:
        price = items_per_generation
        if budget.item_evaluations < price:
            raise UserError(
                f"budget.item_evaluations: {budget.item_evaluations} is less than one generation of {population} "
                f"candidates, which answers {price} items; give at least {price}"
            )
        limits.append(budget.item_evaluations // price)
    return min(limits) if limits else None


class Allowance:
    """Tells whether one more generation is covered.

    Args:
        generations: the count ceiling, or None.
        hours: the time ceiling, or None. The first generation is always covered.
        spent_seconds: tells the run's time so far, earlier drivers included.
        first: number of the first generation; the count ceiling counts those before it, too.
        ended: where the phase is over already, how many generations it had.
    """

    def __init__(
        self,
        generations: int | None,
        hours: float | None,
        spent_seconds: Callable[[], float],
        *,
        first: int = 0,
        ended: int | None = None,
    ) -> None:
        self.generations = generations
        self.ended = ended
        self._first = first
        self._hours = hours
        self._spent = spent_seconds

    @property
    def spent_seconds(self) -> float:
        """The run's time so far."""
        return self._spent()

    def covers(self, generation: int) -> bool:
        """Whether generation number `generation`, from 0, may start."""
        if self.generations is not None and generation >= self.generations:
            return False
        return self._hours is None or generation == self._first or self.spent_seconds < self._hours * 3600
