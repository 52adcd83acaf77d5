"""One live model that scores recipes on a config's suite, for merges that no search proposes; how scores are kept."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from evomerge.config import Config
from evomerge.errors import InfrastructureError
from evomerge.evaluation.blocks import put_together
from evomerge.evaluation.items import Block, ItemScore
from evomerge.evaluation.statistics import Table
from evomerge.recipe import Merge, Output, Recipe
from evomerge.searching.setup import set_up
from evomerge.workers.work import Work, WorkerLost
from evomerge.workers.worker import Worker


class Bench:
    """A config's suite and one live model, in this process.

    Args:
        config: of a search.
        file: where it comes from.

    Attributes:
        setup: of the search.
        weights: of the tasks.
    """

    def __init__(self, config: Config, file: Path) -> None:
        self.setup = set_up(config, file=file)
        self.weights = self.setup.suite.weights
        self._worker = Worker(self.setup.worker_spec(file))
        self._worker.prepare(self.setup.baselines["base"])

    def recipe(self, merge: Merge) -> Recipe:
        """Return the recipe of a merge of the config's models."""
        recipe = Recipe(
            models=self.setup.sources,
            merges={"merge": merge},
            output=Output(tokenizer="base", chat_template="base"),
            seed=0,
        )
        return recipe.pinned({name: str(source.sha256) for name, source in self.setup.sources.items()})

    def scores(
        self, recipe: Recipe, blocks: Iterable[Block], *, check_degenerate: bool = False
    ) -> dict[str, dict[str, ItemScore]]:
        """Return what each item of some blocks scored, by task.

        Raises:
            CandidateFailed: the recipe cannot be scored, or, if that is checked, answers are degenerate.
            InfrastructureError: the engine was lost.
        """
        table: dict[str, dict[str, ItemScore]] = {}
        for block in blocks:
            answer = self._worker.run(Work("", (recipe,), block))
            if isinstance(answer, WorkerLost):
                raise InfrastructureError(answer.reason)
            (scored,) = answer.outcomes
            for item in put_together(block, scored.parts, check_degenerate=check_degenerate):
                table.setdefault(item.task, {})[item.item] = item
        return table


def packed(table: Table) -> dict[str, Any]:
    """Return the scores of each task's items in their order: a string of digits where all are 0 or 1."""
    found: dict[str, Any] = {}
    for task, items in table.items():
        values = list(items.values())
        found[task] = "".join(f"{v:.0f}" for v in values) if set(values) <= {0.0, 1.0} else values
    return found


def unpacked(answers: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return task → number of the item → score of what was packed."""
    return {task: {str(i): float(v) for i, v in enumerate(values)} for task, values in answers.items()}
