"""What a budget pays for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from evomerge.config import Budget
from evomerge.errors import UserError


@dataclass(frozen=True)
class Spent:
    """What earlier generations of another space have cost."""

    candidates: int = 0
    items: int = 0


def affordable(
    budget: Budget, *, population: int, items_per_generation: int, spent: Spent | None = None
) -> int | None:
    """Return how many whole generations the count ceilings pay for; None if only time is limited.

    Args:
        budget: its ceilings count everything.
        population: candidates of a generation.
        items_per_generation: items that it answers.
        spent: what was taken off before.

    Raises:
        UserError: not even one.
    """
    before = spent or Spent()
    limits = []
    if budget.candidates is not None:
        if budget.candidates < before.candidates + population:
            taken = f"the {before.candidates} of before and " if before.candidates else ""
            raise UserError(
                f"budget.candidates: {budget.candidates} is less than {taken}one generation of {population}; give at "
                f"least {before.candidates + population}, or set optimizer.population"
            )
        limits.append((budget.candidates - before.candidates) // population)
    if budget.item_evaluations is not None:
        price = items_per_generation
        if budget.item_evaluations < before.items + price:
            taken = f"the {before.items} of before and " if before.items else ""
            raise UserError(
                f"budget.item_evaluations: {budget.item_evaluations} is less than {taken}one generation of "
                f"{population} candidates, which answers {price} items; give at least {before.items + price}"
            )
        limits.append((budget.item_evaluations - before.items) // price)
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
