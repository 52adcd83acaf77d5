"""Cutting a split into blocks, and putting a block's parts together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

from evomerge.errors import CandidateFailed
from evomerge.evaluation.guards import check_constants
from evomerge.evaluation.items import Block, ItemScore, Part, PartOutcome, Split
from evomerge.randomness import generator

FIXED_PART_ITEMS = 64
"""The most items of a part that `fixed_blocks` cuts."""


def cut_blocks(
    items: Mapping[str, Sequence[str]], split: Split, *, seed: int, block_items: int, packing: str
) -> tuple[Block, ...]:
    """Deal the items of a split to blocks, at random and stratified by task.

    Args:
        items: task name → item ids, one or more; the order of the ids does not matter.
        split: where the items come from.
        seed: the run's seed.
        block_items: the most items a block may hold.
        packing: the engine's packing.

    Returns:
        As few blocks as `block_items` allows, and no more than the smallest task has items, so that each holds some
        of every task. Every item is in exactly one of them; the sizes of two blocks, and of their parts of any
        one task, differ by at most one item. How a task's items are cut into
        parts depends on the seed, the task and the number of blocks, not on the other tasks: those only decide
        which of its parts come together with which of theirs.
    """
    if block_items < 1:
        raise ValueError(f"a block holds at least one item, not {block_items}")
    count = count_blocks([len(ids) for ids in items.values()], block_items)
    hands: list[list[Part]] = [[] for _ in range(count)]
    dealt = 0
    for task, ids in items.items():
        ordered = sorted(ids)
        shuffled = [ordered[i] for i in generator(seed, "blocks", split, task).permutation(len(ordered))]
        for number in range(count):
            part = Part(task, tuple(sorted(shuffled[number::count])), packing)
            hands[(dealt + number) % count].append(part)
        dealt += len(ids)
    return tuple(Block(split, index, tuple(hand)) for index, hand in enumerate(hands))


def count_blocks(sizes: Sequence[int], block_items: int) -> int:
    """Return the number of blocks of tasks of these sizes, in items; see `cut_blocks`."""
    return min(math.ceil(sum(sizes) / block_items), min(sizes))


def fixed_blocks(items: Mapping[str, Sequence[str]], split: Split, *, packing: str) -> tuple[Block, ...]:
    """Cut a split whose items are all asked together: by item id, whatever the seed and the other tasks.

    So every run, and every evaluation outside of runs, asks for the same parts and knows their scores again.

    Args:
        items: task name → item ids; the order of the ids does not matter.
        split: where the items come from.
        packing: the engine's packing.

    Returns:
        Blocks of one part each, of at most `FIXED_PART_ITEMS` items; sizes of a task differ by at most one.
    """
    parts = []
    for task, ids in items.items():
        ordered = sorted(ids)
        count = math.ceil(len(ordered) / FIXED_PART_ITEMS)
        edges = [len(ordered) * number // count for number in range(count + 1)] if count else []
        parts += [Part(task, tuple(ordered[start:end]), packing) for start, end in pairwise(edges)]
    return tuple(Block(split, index, (part,)) for index, part in enumerate(parts))


def put_together(
    block: Block, outcomes: Sequence[PartOutcome], *, check_degenerate: bool
) -> tuple[ItemScore, ...]:
    """Return the scores of a block, in its order, from the outcomes of its parts.

    Args:
        block: the block.
        outcomes: of its parts, in order; none is needed behind one that failed.
        check_degenerate: fail a candidate whose answers do not depend on the items (see `guards`).

    Raises:
        CandidateFailed: with the reason of the first part that failed, or because answers are degenerate.
    """
    for outcome in outcomes:
        if outcome.failure is not None:
            raise CandidateFailed(outcome.failure)
    if check_degenerate:
        check_constants(
            (part.task, outcome.constant, len(part.items))
            for part, outcome in zip(block.parts, outcomes, strict=True)
        )
    return tuple(score for outcome in outcomes for score in outcome.scores)
