"""Which blocks a generation's candidates are compared on."""

from __future__ import annotations

from collections.abc import Sequence

from evomerge.evaluation.blocks import count_blocks
from evomerge.evaluation.items import Block
from evomerge.randomness import generator


def draw_blocks(blocks: Sequence[Block], count: int, *, generation: int, seed: int) -> list[Block]:
    """Return the blocks of one generation: the same for all its candidates, fresh from one to the next.

    The search items are gone through in epochs. Each epoch shuffles all blocks and deals `count` to each of
    ⌊len(blocks) / count⌋ generations, so none comes twice in an epoch.

    Args:
        blocks: all blocks of the search split.
        count: how many a generation gets, 1 … len(blocks).
        generation: its number, from 0.
        seed: the run's.
    """
    if not 1 <= count <= len(blocks):
        raise ValueError(f"cannot draw {count} of {len(blocks)} blocks")
    per_epoch = len(blocks) // count
    epoch, turn = divmod(generation, per_epoch)
    order = generator(seed, "blocks", epoch).permutation(len(blocks))
    return [blocks[i] for i in sorted(order[turn * count : (turn + 1) * count])]


def wanted_items(tasks: int, items_per_candidate: int | str) -> int:
    """Return how many items a candidate is to answer, with ``auto`` decided."""
    return max(96, 12 * tasks) if items_per_candidate == "auto" else int(items_per_candidate)


def block_sizes(
    sizes: Sequence[int], *, block_items: int | str, items_per_candidate: int | str
) -> tuple[int, int]:
    """Return (most items of a block, blocks per generation), with ``auto`` decided.

    Auto: 96 items a candidate, but at least 12 of each task; blocks of 32 items, but at least 4 of each task.
    Both are cut to what there is, and a block to what a candidate is to answer. The blocks of a split are cut
    as `evomerge.evaluation.blocks.cut_blocks` does: of equal size, as few as the limit allows or, where that is less,
    as many as the smallest task has items.

    Args:
        sizes: how many search items each task has, 1 or more.
        block_items, items_per_candidate: as in the config's suite.
    """
    items, wanted = sum(sizes), wanted_items(len(sizes), items_per_candidate)
    per_block = min(max(32, 4 * len(sizes)), wanted) if block_items == "auto" else int(block_items)
    per_block = min(per_block, items)
    blocks = count_blocks(sizes, per_block)
    return per_block, max(1, min(blocks, round(wanted * blocks / items)))
