"""Which queued request a free worker takes."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from evomerge.recipe import Recipe
from evomerge.workers.work import Work

Hops = tuple[tuple[Any, ...], ...]


def take(queue: deque[Work], held: Recipe | None, elsewhere: Sequence[Recipe] = ()) -> Work:
    """Remove and return the request that suits a free worker best.

    First one whose weights the worker holds, so that nothing has to be merged; then one whose weights no other
    worker holds. Of these the one whose layer path has the most hops in common with the worker's, from the first
    on; then the one with the fewest in common with what others hold; then the oldest.

    So a worker goes through the tree of all paths branch by branch, other workers through other branches: what it
    leaves behind for good, nobody waits for. The request says where those that wait branch off (`Work.branches`),
    for what is worth keeping.

    Args:
        queue: waiting requests, not empty.
        held: the recipe that the worker holds, if any.
        elsewhere: the recipes that other workers hold.
    """
    recipes = {work.recipes[0].hash: work.recipes[0] for work in queue}
    longest = max(len(recipe.path or ()) for recipe in recipes.values())
    hops = {key: _hops(recipe, longest) for key, recipe in recipes.items()}
    mine = () if held is None else _hops(held, longest)
    theirs = [_hops(other, longest) for other in elsewhere]
    taken = {other.hash for other in elsewhere}
    suits = {
        key: (
            held is not None and key == held.hash,
            key not in taken,
            _in_common(mine, path),
            -max((_in_common(other, path) for other in theirs), default=0),
        )
        for key, path in hops.items()
    }
    # Of equals, max returns the first.
    number, work = max(enumerate(queue), key=lambda entry: suits[entry[1].recipes[0].hash])
    del queue[number]
    own = work.recipes[0].hash
    waiting = {other.recipes[0].hash for other in queue} - {own}
    branches = {_in_common(hops[own], hops[key]) for key in waiting} - {0}
    return replace(work, branches=tuple(sorted(branches)))


def _hops(recipe: Recipe, longest: int) -> Hops:
    """Return the hops of a recipe; without a path those through its only merge, or the model that this copies.

    Args:
        recipe: any.
        longest: hops of the longest path to compare with; 0 where there is none.
    """
    if recipe.path is not None:
        return tuple(
            (hop.model or hop.merge, hop.layer, hop.scale, *sorted(hop.layers.items())) for hop in recipe.path
        )
    (name, merge), *_ = recipe.merges.items()
    copied = merge.method == "linear" and len(merge.inputs) == 1
    return tuple((merge.inputs[0] if copied else name, layer, 1.0) for layer in range(longest))


def _in_common(one: Hops, other: Hops) -> int:
    """Return with how many equal hops two paths begin."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((number for number, (a, b) in pairs if a != b), min(len(one), len(other)))
