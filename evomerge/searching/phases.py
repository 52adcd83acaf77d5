"""The phases of a search: one, or first merge coefficients and then layer paths with the winner in the pool."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from evomerge.config import Budget, OptimizerConfig
from evomerge.errors import UserError
from evomerge.optimizers import Optimizer, make_optimizer
from evomerge.searching.budget import Spent, affordable

if TYPE_CHECKING:
    from evomerge.searching.setup import Setup
    from evomerge.spaces import SearchSpace

LAYERS_SHARE = 0.5
"""Share of the budget that layer paths get where they come second."""


@dataclass(frozen=True)
class Phase:
    """A stretch of generations with one space and one optimiser.

    Attributes:
        space: what is searched. The second phase's is a draft until the first has a winner.
        optimizer: fresh; its coordinates are those of the space.
        price: search items that a generation answers.
        generations: how many the budget pays for; None if only time limits them.
        hours: the run's time at which the phase ends, or None.
    """

    space: SearchSpace
    optimizer: Optimizer
    price: int
    generations: int | None
    hours: float | None

    @property
    def candidates(self) -> int | None:
        """How many candidates the budget pays for."""
        return None if self.generations is None else self.generations * self.optimizer.population


def plan_phases(setup: Setup, budget: Budget, *, first: int | None = None) -> tuple[Phase, ...]:
    """Return the phases of a search, the budget divided among them.

    Args:
        setup: of the search.
        budget: of the whole search; its `layers` is the second phase's share.
        first: generations of the first phase, where it has ended already.

    Raises:
        UserError: the budget does not pay for a generation of each phase.
    """
    config = setup.config.optimizer
    if setup.paths is None:
        return (_phase(setup, setup.space, config, budget),)
    assert config.layers is not None, "decided with the config"
    share = LAYERS_SHARE if budget.layers is None else budget.layers
    if first is None:
        one = _phase(setup, setup.space, config, _part(budget, 1 - share))
    else:
        one = Phase(setup.space, *_priced(setup, setup.space, config), generations=first, hours=None)
    count = one.generations or 0
    spent = Spent(count * one.optimizer.population, count * one.price)
    return one, _phase(setup, setup.paths, config.layers, budget, spent)


def _priced(setup: Setup, space: SearchSpace, config: OptimizerConfig) -> tuple[Optimizer, int]:
    """Return a space's optimiser, and the items that a generation of it answers."""
    optimizer = make_optimizer(config, space.coordinates, seed=setup.config.seed, variation=space.variation)
    return optimizer, setup.items_per_generation(population=optimizer.population, parents=optimizer.parents)


def _phase(
    setup: Setup, space: SearchSpace, config: OptimizerConfig, budget: Budget, spent: Spent | None = None
) -> Phase:
    optimizer, price = _priced(setup, space, config)
    try:
        generations = affordable(
            budget, population=optimizer.population, items_per_generation=price, spent=spent
        )
    except UserError as error:
        if setup.paths is None:
            raise
        what = "layer paths" if space is setup.paths else "coefficients"
        raise UserError(
            f"the share of the budget that {what} get pays for no generation ({error}); give more, or another "
            "share of it to layer paths with budget.layers"
        ) from None
    return Phase(space, optimizer, price, generations, budget.hours)


def _part(budget: Budget, share: float) -> Budget:
    """Return a share of a budget, its counts rounded to at least 1."""

    def part(count: int | None) -> int | None:
        return None if count is None else max(1, round(count * share))

    return Budget(
        candidates=part(budget.candidates),
        item_evaluations=part(budget.item_evaluations),
        hours=None if budget.hours is None else budget.hours * share,
    )
