"""Which queued request a free worker takes."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import replace
from itertools import count
from typing import Any

from evomerge.recipe import Recipe
from evomerge.workers.work import Work


def take(queue: deque[Work], held: Recipe | None, elsewhere: Collection[str]) -> Work:
    """Remove and return the request that suits a free worker best.

    First one whose weights the worker holds, so that nothing has to be merged; then, of those whose weights no
    other worker holds, the one whose layer path has the most hops in common with the worker's from the beginning
    on, so that these are still known; then the oldest.

    So a worker goes through the tree of all paths branch by branch: what it leaves behind for good, nobody waits
    for. The request says where those that wait branch off (`Work.branches`), for what is worth keeping.

    Args:
        queue: waiting requests, not empty.
        held: the recipe that the worker holds, if any.
        elsewhere: hashes of the recipes that busy workers hold.
    """
    in_common = {work.recipes[0].hash: 0 for work in queue}
    if held is not None:
        in_common |= {work.recipes[0].hash: common_hops(held, work.recipes[0]) for work in queue}

    def fits(work: Work) -> tuple[bool, bool, int]:
        recipe = work.recipes[0].hash
        return held is not None and recipe == held.hash, recipe not in elsewhere, in_common[recipe]

    # Of equals, max returns the first.
    number, work = max(enumerate(queue), key=lambda entry: fits(entry[1]))
    del queue[number]
    recipe = work.recipes[-1]
    waiting = {other.recipes[0].hash: other.recipes[0] for other in queue}
    waiting.pop(recipe.hash, None)
    branches = {common_hops(recipe, other) for other in waiting.values()} - {0}
    return replace(work, branches=tuple(sorted(branches)))


def common_hops(one: Recipe, other: Recipe) -> int:
    """Return with how many equal hops two layer paths begin; 0 if neither recipe has a path.

    A recipe without a path is a path through all layers of its only merge, or of the model that this copies.
    """
    if one.path is None and other.path is None:
        return 0
    pairs = zip(_hops(one), _hops(other), strict=False)
    return next((number for number, (a, b) in enumerate(pairs) if a != b), _length(one, other))


def _length(*recipes: Recipe) -> int:
    return min(len(recipe.path) for recipe in recipes if recipe.path is not None)


def _hops(recipe: Recipe) -> Iterator[tuple[Any, ...]]:
    if recipe.path is not None:
        for hop in recipe.path:
            yield hop.model or hop.merge, hop.layer, hop.scale, hop.layers
        return
    (name, merge), *_ = recipe.merges.items()
    copied = merge.method == "linear" and len(merge.inputs) == 1
    for layer in count():
        yield merge.inputs[0] if copied else name, layer, 1.0, {}
