"""Cutting a split into blocks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from evomerge.evaluation.items import Block, Split
from evomerge.randomness import generator


def cut_blocks(
    items: Mapping[str, Sequence[str]], split: Split, *, seed: int, block_items: int, packing: str
) -> tuple[Block, ...]:
    """Deal the items of a split to blocks, stratified by task.

    Args:
        items: task name → item ids; the order of the ids does not matter.
        split: where the items come from.
        seed: the run's seed.
        block_items: the most items a block may hold.
        packing: the engine's packing.

    Returns:
        As few blocks as `block_items` allows. Every item is in exactly one of them; the sizes of two
        blocks, and their shares of any one task, differ by at most one item.
    """
    if block_items < 1:
        raise ValueError(f"a block holds at least one item, not {block_items}")
    count = math.ceil(sum(len(ids) for ids in items.values()) / block_items)
    hands: list[list[str]] = [[] for _ in range(count)]
    dealt = 0
    for task, ids in items.items():
        ordered = sorted(ids)
        for place in generator(seed, "blocks", split, task).permutation(len(ordered)):
            hands[dealt % count].append(ordered[place])
            dealt += 1
    return tuple(Block(split, index, tuple(hand), packing) for index, hand in enumerate(hands))
