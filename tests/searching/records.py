"""What runs record: made-up recipes, blocks and outcomes, and the comparable contents of a real run."""

from __future__ import annotations

from pathlib import Path

from evomerge.evaluation.items import Block, Item, ItemScore
from evomerge.recipe import Merge, Recipe, Source
from evomerge.searching.rundir import open_run
from evomerge.workers.work import Outcome


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
    """Return disjoint blocks of the search split."""
    return [
        Block("search", i, tuple(f"item-{i}-{j}" for j in range(items)), "packing-v1/64")
        for i in range(count)
    ]


def items_of(blocks: list[Block]) -> list[Item]:
    """Return the items of some blocks, of two tasks in turn."""
    names = [name for block in blocks for name in block.items]
    return [Item(name, f"task-{i % 2}", "search", i) for i, name in enumerate(names)]


def make_outcome(recipe: Recipe, block: Block, failure: str | None = None) -> Outcome:
    """Return the outcome of a recipe on a block; its values depend on both, in no round way."""
    weight = next(iter(recipe.main.parameters["weight"].values()))  # type: ignore[union-attr]
    scores = tuple(
        ItemScore(
            item, f"task-{(block.index + j) % 2}", raw=-float(weight) / 3, value=1 / (3 + j + block.index)
        )
        for j, item in enumerate(block.items)
    )
    return Outcome(recipe.hash, () if failure else scores, failure, merge_seconds=0.1, score_seconds=0.2)
