"""What a search is going to be, before any weights are read."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from evomerge.evaluation.items import SPLITS, Split
from evomerge.evaluation.statistics import minimum_detectable_effect
from evomerge.searching.memory import Memory, check_fits, plan_memory
from evomerge.searching.phases import plan_phases
from evomerge.searching.selection import ARCHIVE, SNAPSHOTS
from evomerge.searching.setup import Setup

if TYPE_CHECKING:
    from evomerge.config import Budget

CANDIDATES_PER_DIMENSION = 15
"""Fewer candidates than this per searched number rarely beat the start."""

SHOWN_TASKS = 24
"""The plan's text lists this many tasks, its data all."""


@dataclass(frozen=True)
class PathPhase:
    """Dimension, population, generations and candidates of layer paths after coefficients."""

    dimension: int
    population: int
    generations: int | None
    candidates: int | None

    def __str__(self) -> str:
        counted = "" if self.generations is None else f" x {self.generations} generations = {self.candidates}"
        return f"{self.population} a generation{counted}, {self.dimension} searched numbers"


@dataclass(frozen=True)
class Plan:
    """The size of a search.

    Attributes:
        dimension: searched numbers.
        coordinates: their names.
        population: candidates of a generation.
        generations: how many the budget pays for; None if only time limits it.
        candidates: the same in candidates.
        paths: the same of layer paths where they come second; the above is then the coefficients'.
        items: items of each split, by task and in all.
        items_per_candidate: search items that each candidate answers, at most.
        tasks: name → what is measured of it, and its share of the fitness.
        screened: how many of a generation the screen lets through to these; None if all.
        item_evaluations: what search, selection and the final comparison cost together.
        minimum_detectable_effect: smallest difference on test that a paired comparison resolves, by split;
            two-sided 5 %, power 80 %, 20 % of the items answered differently.
        memory: what will be where, and the seconds of a swap.
        warnings: sentences.
    """

    name: str
    dimension: int
    coordinates: tuple[str, ...]
    population: int
    generations: int | None
    candidates: int | None
    paths: PathPhase | None
    items: Mapping[str, Mapping[str, int]]
    items_per_candidate: int
    tasks: Mapping[str, tuple[str, float]]
    screened: int | None
    item_evaluations: int | None
    minimum_detectable_effect: Mapping[str, float]
    memory: Memory
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)

    def __str__(self) -> str:
        shown = ", ".join(self.coordinates[:8]) + (", …" if len(self.coordinates) > 8 else "")
        counted = "" if self.generations is None else f" x {self.generations} generations = {self.candidates}"
        cost = "" if self.item_evaluations is None else f", {self.item_evaluations:,} item evaluations in all"
        lines = [
            f"{self.name}: {self.dimension} searched numbers ({shown})",
            f"  candidates  {self.population} a generation{counted}, {self.items_per_candidate} items each{cost}",
        ]
        if self.paths is not None:
            lines.append(f"  then paths  {self.paths}")
        if self.screened is not None:
            lines.append(f"  screen      {self.screened} of {self.population} answer more than the screen")
        lines += _task_lines(self.tasks)
        for split, counts in self.items.items():
            effect = self.minimum_detectable_effect[split]
            lines.append(
                f"  {split:<11} {counts['all']} items of {len(counts) - 1} tasks; "
                f"resolves differences of {effect:.3f} or more"
            )
        for line in self.memory.lines():
            lines += textwrap.wrap(line, 110, subsequent_indent=" " * 14, break_on_hyphens=False)
        return "\n".join([*lines, *(f"  warning: {warning}" for warning in self.warnings)])


def _task_lines(tasks: Mapping[str, tuple[str, float]]) -> list[str]:
    """Return lines with the first tasks of the suite, so many that they are read."""
    shown = [f"{name} ({metric}, {share:.3g})" for name, (metric, share) in list(tasks.items())[:SHOWN_TASKS]]
    if len(tasks) > SHOWN_TASKS:
        shown.append(f"and {len(tasks) - SHOWN_TASKS} more")
    lead = "  tasks       "
    return textwrap.wrap(
        ", ".join(shown), 110, initial_indent=lead, subsequent_indent=" " * len(lead), break_on_hyphens=False
    )


def plan_search(
    setup: Setup,
    budget: Budget,
    *,
    measured: tuple[float, float] | None = None,
    first: int | None = None,
) -> Plan:
    """Work out the size of a search.

    Args:
        setup: of the search.
        budget: its ceilings.
        measured: of a run that has begun, the mean seconds of a swap and its share of the workers' time.
        first: generations of the first of two phases, where it has ended already.

    Raises:
        UserError: the budget does not pay for a generation, or the models cannot fit into the memory.
    """
    phases = plan_phases(setup, budget, first=first)
    optimizer, generations = phases[0].optimizer, phases[0].generations
    population = optimizer.population
    through = setup.screened(population=population, parents=optimizer.parents)
    prices = [None if phase.generations is None else phase.generations * phase.price for phase in phases]
    weights = setup.suite.weights
    items: dict[str, dict[str, int]] = {}
    for split in SPLITS:
        counts = dict.fromkeys(weights, 0)
        for item in setup.suite.items(split):
            counts[item.task] += 1
        items[split] = {**counts, "all": sum(counts.values())}
    candidates = phases[0].candidates
    per_candidate = setup.items_per_candidate
    final = sum(selection_items(setup).values())
    memory = plan_memory(setup, measured=measured)
    check_fits(memory)
    return Plan(
        name=setup.config.name,
        dimension=setup.space.dimension,
        coordinates=tuple(c.name for c in setup.space.coordinates),
        population=population,
        generations=generations,
        candidates=candidates,
        paths=None
        if len(phases) == 1
        else PathPhase(
            phases[1].space.dimension,
            phases[1].optimizer.population,
            phases[1].generations,
            phases[1].candidates,
        ),
        items=items,
        items_per_candidate=per_candidate,
        tasks={task.name: (task.metric, task.weight / sum(weights.values())) for task in setup.suite.tasks},
        screened=None if through == population else through,
        item_evaluations=None if None in prices else sum(p for p in prices if p is not None) + final,
        minimum_detectable_effect={
            split: minimum_detectable_effect({t: n for t, n in counts.items() if t != "all"}, weights)
            for split, counts in items.items()
        },
        memory=memory,
        warnings=(*setup.warnings, *_warnings(setup, candidates), *memory.warnings()),
    )


def selection_items(setup: Setup) -> dict[Split, int]:
    """Return the items that selection answers at most, in the order of its steps; that of the first phase included."""
    sizes = {split: len(setup.suite.items(split)) for split in SPLITS}
    found = 1 + len(SNAPSHOTS) + ARCHIVE
    between = 0 if setup.paths is None else found
    baselines = len(setup.baselines)
    return {
        "validation": sizes["validation"] * (baselines + found + between),
        "search": sizes["search"],
        "test": sizes["test"] * (baselines + 1 + (setup.paths is not None)),
    }


def _warnings(setup: Setup, candidates: int | None) -> list[str]:
    dimension = setup.space.dimension
    wanted = CANDIDATES_PER_DIMENSION * dimension
    # Most numbers of a path's genome mean nothing in most genotypes.
    if candidates is None or candidates >= wanted or setup.config.coefficients is None:
        return []
    return [
        f"{candidates} candidates for {dimension} searched numbers: give at least {wanted}, or search fewer "
        "(depth: global, or per: shared)"
    ]
