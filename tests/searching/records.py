"""What runs record: made-up recipes, blocks and outcomes, and the comparable contents of a real run."""

from __future__ import annotations

from pathlib import Path

from evomerge.evaluation.items import Block, Item, ItemScore, Part, PartOutcome
from evomerge.recipe import Merge, Recipe, Source
from evomerge.searching.rundir import open_run
from evomerge.workers.work import Outcome, Scored


def canonical(run: Path) -> dict[str, list[tuple[object, ...]]]:
    """Return what a run shares with an undisturbed one."""
    store = open_run(run)
    try:
        return store.canonical()
    finally:
        store.close()


def make_recipe(weight: float) -> Recipe:
    """Return a recipe of its own for each weight."""
    return Recipe(
        models={"x": Source(source="/m/x", sha256="1" * 64), "y": Source(source="/m/y", sha256="2" * 64)},
        merges={
            "merge": Merge(method="linear", inputs=("x", "y"), parameters={"weight": {"x": weight, "y": 1.0}})
        },
    )


def make_blocks(count: int, items: int = 3) -> list[Block]:
    """Return disjoint blocks of the search split, of two tasks each."""
    blocks = []
    for i in range(count):
        names = [f"item-{i}-{j}" for j in range(items)]
        shares = [names[: (items + 1) // 2], names[(items + 1) // 2 :]]
        parts = [Part(f"task-{k}", tuple(share), "packing-v1/64") for k, share in enumerate(shares) if share]
        blocks.append(Block("search", i, tuple(parts)))
    return blocks


def items_of(blocks: list[Block]) -> list[Item]:
    """Return the items of some blocks."""
    parts = [part for block in blocks for part in block.parts]
    named = [(name, part.task) for part in parts for name in part.items]
    return [Item(name, task, "search", i) for i, (name, task) in enumerate(named)]


def make_scores(recipe: Recipe, part: Part) -> tuple[ItemScore, ...]:
    """Return the scores of a recipe on a part; they depend on recipe and item, in no round way."""
    weight = next(iter(recipe.main.parameters["weight"].values()))  # type: ignore[union-attr]
    return tuple(
        ItemScore(item, part.task, raw=-float(weight) / 3, value=1 / (3 + sum(map(ord, item)) % 97))
        for item in part.items
    )


def make_scored(recipe: Recipe, parts: tuple[Part, ...], failure: str | None = None) -> Scored:
    """Return what a worker answers of a recipe on some parts."""
    outcomes = [PartOutcome(make_scores(recipe, part), constant="") for part in parts]
    if failure:
        outcomes = [PartOutcome(failure=failure)]
    return Scored(recipe.hash, tuple(outcomes), merge_seconds=0.1, score_seconds=0.2)


def make_outcome(recipe: Recipe, block: Block, failure: str | None = None) -> Outcome:
    """Return the outcome of a recipe on a block; its values depend on both, in no round way."""
    scores = tuple(score for part in block.parts for score in make_scores(recipe, part))
    return Outcome(recipe.hash, () if failure else scores, failure, merge_seconds=0.1, score_seconds=0.2)
