"""The generations of a search: ask, score on common blocks, rank, tell. Recorded ones are replayed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import compress
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Protocol

from evomerge.evaluation.items import Block
from evomerge.optimizers import Optimizer, Told
from evomerge.recipe import Recipe
from evomerge.searching.agreement import check_replay, not_reproduced
from evomerge.searching.budget import Allowance
from evomerge.searching.draws import draw_blocks
from evomerge.searching.futility import hopeless
from evomerge.searching.plan import selection_items
from evomerge.searching.ranking import ScoreTable, fitness_of, less, rank, values_of
from evomerge.searching.reporter import Reporter
from evomerge.searching.rundir import RECIPE, write_atomically
from evomerge.searching.scheduler import Scheduler
from evomerge.searching.screening import Screened, come_through
from evomerge.searching.shrinkage import Values, shrunk
from evomerge.searching.store import CandidateRow, Store
from evomerge.spaces.genotype import Genotype

if TYPE_CHECKING:
    from evomerge.searching.setup import Setup
    from evomerge.spaces import SearchSpace


Outcome = ScoreTable | Screened | str
"""How a candidate fared: what it scored, that it did not come through the screen, or why it failed."""


class Tables(Protocol):
    """Scores recipes on blocks and returns what is known of each: its scores, or the reason why there are none."""

    def __call__(
        self, recipes: Sequence[Recipe], blocks: Sequence[Block], phase: str = "", then: int = 0
    ) -> list[ScoreTable | str]: ...


class Generations:
    """Runs generations until the allowance is spent, and remembers what selection needs.

    Args:
        folder, store, setup, scheduler, reporter: of the run.
        space: what is searched.
        optimizer: its optimiser.
        first: number of the first generation: how many those before had in another phase.
        items_later: items that are answered between these generations and the run's selection.

    Attributes:
        first: as given.
        means: the optimiser's mean after each generation, if it has one.
        count: generations so far, those before `first` included.
    """

    def __init__(
        self,
        folder: Path,
        store: Store,
        setup: Setup,
        space: SearchSpace,
        optimizer: Optimizer,
        scheduler: Scheduler,
        reporter: Reporter,
        *,
        first: int = 0,
        items_later: int = 0,
    ) -> None:
        self._folder = folder
        self._store = store
        self._setup = setup
        self._space = space
        self._optimizer = optimizer
        self.first = first
        self._items_later = items_later
        self._recipes: dict[int, str] = {}
        self.count = first
        self._scheduler = scheduler
        self._reporter = reporter
        self._answers: list[dict[str, Values]] = []
        self._asked_first: dict[str, int] = {}
        self._replayed = 0
        self.means: list[Genotype] = []

    def run(self, allowance: Allowance) -> None:
        """Replay what is recorded, then go on for as long as the allowance lasts.

        Raises:
            UserError: the replay does not reproduce what is recorded.
        """
        while True:
            generation = self.count
            recorded = self._store.generation_blocks(generation) is not None
            ended = recorded and allowance.ended is not None and generation >= allowance.ended
            if ended or not recorded:
                self._show_replayed()
            if ended or not (recorded or allowance.covers(generation)):
                return
            asked = self._optimizer.ask(generation - self.first)
            if not recorded:
                self._add(generation, asked)
            check_replay(self._store, generation, asked, self._folder)
            self._complete(generation, allowance)
            self.count += 1

    def shrunk(self) -> Mapping[int, float]:
        """Return the shrunk score of each recipe that was scored so far, by the candidate that was it first."""
        scores = shrunk(self._answers, self._setup.suite.weights)
        return {self._asked_first[recipe]: score for recipe, score in scores.items()}

    def recipe_of(self, candidate: int) -> Recipe:
        """Return a candidate's recipe."""
        return self._store.recipe(self._recipes[candidate])

    def _add(self, generation: int, asked: Sequence[Genotype]) -> None:
        blocks = draw_blocks(
            self._setup.blocks["search"],
            self._setup.blocks_per_generation,
            generation=generation,
            seed=self._setup.config.seed,
        )
        candidates = [(tuple(genotype), self._space.decode(genotype)) for genotype in asked]
        self._store.add_generation(generation, blocks, candidates)

    def _complete(self, generation: int, allowance: Allowance) -> None:
        rows = self._store.candidates(generation)
        self._recipes |= {row.id: row.recipe for row in rows}
        recipes = [self._store.recipe(row.recipe) for row in rows]
        blocks = self._blocks_of(generation)
        replayed = self._store.is_told(generation)
        outcomes = self._outcomes(generation, recipes, blocks, None if replayed else allowance)
        told = self._ranked(rows, outcomes)
        if replayed and told != rows:
            raise not_reproduced(generation, self._folder)
        if not replayed:
            self._record(generation, told, allowance.spent_seconds)
        self._optimizer.tell(
            generation - self.first,
            [
                Told(row.genotype, row.rank or 0.0, row.fitness, _screened(outcome))
                for row, outcome in zip(told, outcomes, strict=True)
            ],
        )
        mean = self._optimizer.mean()
        if mean is not None:
            self.means.append(mean)
        self._answers.append({})
        for row, outcome in zip(told, outcomes, strict=True):
            if isinstance(outcome, dict):
                self._asked_first.setdefault(row.recipe, row.id)
                self._answers[-1][row.recipe] = values_of(outcome)
        if replayed:
            self._replayed = told[-1].id + 1
        else:
            self._report(generation, told)

    def _show_replayed(self) -> None:
        """Say once how far what is recorded goes."""
        if self._replayed:
            self._reporter.show(candidates=self._replayed, phase=f"replayed {self._replayed} candidates")
            self._replayed = 0

    def _outcomes(
        self, generation: int, recipes: Sequence[Recipe], blocks: Sequence[Block], allowance: Allowance | None
    ) -> list[Outcome]:
        """Return how a generation's candidates fare: on the screen if there is one, then on the full suite.

        Args:
            generation: its number.
            recipes: of its candidates.
            blocks: that it answers.
            allowance: what the search has left; None if all outcomes are recorded.
        """

        def tables(
            recipes: Sequence[Recipe], blocks: Sequence[Block], phase: str = "", then: int = 0
        ) -> list[ScoreTable | str]:
            if allowance is not None:
                self._reporter.enter(
                    "running",
                    f"generation {generation + 1}{phase}",
                    items_after=self._items_after(generation, allowance, then),
                    generation=generation,
                )
                self._scheduler.complete(recipes, blocks)
            return [self._scheduler.table(recipe, blocks) for recipe in recipes]

        through = self._setup.screened(population=len(recipes), parents=self._optimizer.parents)
        wanted = {block.index for block in blocks}
        screen = [block for block in self._setup.blocks.get("screen", ()) if block.index in wanted]
        if through == len(recipes) or not screen:
            return self._asked_while_hopeful(tables, recipes, blocks)
        full_price = through * sum(len(block.items) for block in blocks)
        looks = tables(recipes, screen, ", screen", full_price)
        weights = self._setup.suite.screen_weights
        scores = [
            None if isinstance(look, str) else fitness_of(look, {task: weights[task] for task in look})
            for look in looks
        ]
        costs = [self._space.penalty(recipe) for recipe in recipes]
        chosen = come_through(less(scores, costs), [recipe.hash for recipe in recipes], through)
        full = iter(tables(list(compress(recipes, chosen)), blocks))
        return [
            next(full) if through_screen else look if score is None else Screened(score)
            for look, score, through_screen in zip(looks, scores, chosen, strict=True)
        ]

    def _asked_while_hopeful(
        self, tables: Tables, recipes: Sequence[Recipe], blocks: Sequence[Block]
    ) -> list[Outcome]:
        """Ask all candidates the first block, and the others those that are not clearly below the space's anchor."""
        anchor = self._space.anchor
        if anchor is None or len(blocks) == 1:
            return [*tables(recipes, blocks)]
        rest = len(recipes) * sum(len(block.items) for block in blocks[1:])
        standard, *looks = tables([anchor, *recipes], blocks[:1], ", first block", rest)
        weights = self._setup.suite.weights
        stopped = [
            isinstance(look, dict) and isinstance(standard, dict) and hopeless(look, standard, weights)
            for look in looks
        ]
        goes_on = [isinstance(look, dict) and not stop for look, stop in zip(looks, stopped, strict=True)]
        full = iter(tables(list(compress(recipes, goes_on)), blocks))
        return [
            next(full)
            if on
            else Screened(fitness_of(look, {task: weights[task] for task in look}))
            if isinstance(look, dict)
            else look
            for look, on in zip(looks, goes_on, strict=True)
        ]

    def _ranked(self, rows: Sequence[CandidateRow], outcomes: Sequence[Outcome]) -> list[CandidateRow]:
        weights = self._setup.suite.weights
        fitness = [
            fitness_of(outcome, weights) if isinstance(outcome, dict) else None for outcome in outcomes
        ]
        costs = [self._space.penalty(self._store.recipe(row.recipe)) for row in rows]
        ranks = rank(less(fitness, costs), less([_screened(outcome) for outcome in outcomes], costs))
        return [
            CandidateRow(
                id=row.id,
                generation=row.generation,
                position=row.position,
                genotype=row.genotype,
                recipe=row.recipe,
                status=_status(outcome),
                fitness=value,
                rank=place,
                reason=outcome if isinstance(outcome, str) else None,
            )
            for row, outcome, value, place in zip(rows, outcomes, fitness, ranks, strict=True)
        ]

    def _items_after(self, generation: int, allowance: Allowance, then: int) -> int | None:
        """Return the items behind those of the present phase: `then` of this generation, and the rest of the run."""
        if allowance.generations is None:
            return None
        price = self._setup.items_per_generation(
            population=self._optimizer.population, parents=self._optimizer.parents
        )
        selection = sum(selection_items(self._setup).values())
        later = self._items_later + selection
        return then + (allowance.generations - generation - 1) * price + later

    def _record(self, generation: int, told: Sequence[CandidateRow], spent_seconds: float) -> None:
        with self._store.transaction():
            self._store.tell(generation, told)
            self._store.set_meta(wall_seconds=spent_seconds)
            for row in told:
                if row.reason is not None:
                    self._store.event("candidate_failed", candidate=row.id, reason=row.reason)
            best = max((row.fitness for row in told if row.fitness is not None), default=None)
            self._store.event("generation", generation=generation, best=best)

    def _report(self, generation: int, told: Sequence[CandidateRow]) -> None:
        scored = [row.fitness for row in told if row.fitness is not None]
        estimates = self.shrunk()
        incumbent = max(estimates, key=lambda i: (estimates[i], -i)) if estimates else None
        self._reporter.show(
            candidates=told[-1].id + 1,
            failed=self._store.counts()["failed"],
            median=median(scored) if scored else None,
            best=max(scored, default=None),
            incumbent=None if incumbent is None else estimates[incumbent],
        )
        if incumbent is not None:
            header = f"# status: incumbent (candidate {incumbent} after {generation + 1} generations)\n"
            write_atomically(self._folder / RECIPE, header + self.recipe_of(incumbent).to_yaml())

    def _blocks_of(self, generation: int) -> list[Block]:
        known = {block.hash: block for block in self._setup.blocks["search"]}
        return [known[digest] for digest in self._store.generation_blocks(generation) or []]


def _screened(outcome: Outcome) -> float | None:
    return outcome.score if isinstance(outcome, Screened) else None


def _status(outcome: Outcome) -> str:
    if isinstance(outcome, Screened):
        return "screened"
    return "failed" if isinstance(outcome, str) else "scored"
