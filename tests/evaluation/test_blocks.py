"""Blocks: every item in exactly one, each a fair share of every task."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomerge.errors import CandidateFailed
from evomerge.evaluation.blocks import cut_blocks
from evomerge.evaluation.guards import Answers, all_the_same, check_finite

sizes = st.lists(st.integers(0, 40), min_size=1, max_size=5).filter(any)


@given(sizes, st.integers(1, 50), st.integers(0, 5))
def test_blocks_are_a_stratified_partition(counts: list[int], block_items: int, seed: int) -> None:
    items = {f"task{t}": [f"{t}-{i}" for i in range(count)] for t, count in enumerate(counts)}
    blocks = cut_blocks(items, "search", seed=seed, block_items=block_items, packing="p:1")
    dealt = [item for block in blocks for item in block.items]
    assert sorted(dealt) == sorted(item for ids in items.values() for item in ids)
    assert len(blocks) == math.ceil(sum(counts) / block_items)
    assert [block.index for block in blocks] == list(range(len(blocks)))
    whole = [len(block.items) for block in blocks]
    assert max(whole) <= block_items
    assert max(whole) - min(whole) <= 1
    for t in range(len(counts)):
        share = [sum(item.startswith(f"{t}-") for item in block.items) for block in blocks]
        assert max(share) - min(share) <= 1


def test_blocks_depend_on_seed_and_split_but_not_on_order() -> None:
    ids = [f"item{i}" for i in range(30)]
    shuffled = random.Random(0).sample(ids, 30)
    cut = {"block_items": 7, "packing": "p:1"}
    blocks = cut_blocks({"t": ids}, "search", seed=0, **cut)  # type: ignore[arg-type]
    assert cut_blocks({"t": shuffled}, "search", seed=0, **cut) == blocks  # type: ignore[arg-type]
    members = [set(block.items) for block in blocks]
    for split, seed in (("search", 1), ("validation", 0)):
        other = cut_blocks({"t": ids}, split, seed=seed, **cut)  # type: ignore[arg-type]
        assert [set(block.items) for block in other] != members
    with pytest.raises(ValueError, match="at least one item"):
        cut_blocks({"t": ids}, "search", seed=0, block_items=0, packing="p:1")


@pytest.mark.parametrize(
    ("count", "choices", "references", "verdict"),
    [
        (7, None, "different", None),
        (8, None, "different", True),
        (8, None, "same", None),
        (10, 4, "different", None),
        (11, 4, "different", True),
        (20, 2, "different", None),
        (21, 2, "different", True),
        (40, 1, "different", None),
    ],
)
def test_equal_answers_are_judged_where_chance_cannot_explain_them(
    count: int, choices: int | None, references: str, verdict: bool | None
) -> None:
    gold = [i % 2 if references == "different" else 0 for i in range(count)]
    assert all_the_same(Answers([0] * count, gold, choices)) is verdict
    if verdict:
        assert all_the_same(Answers([*[0] * (count - 1), 1], gold, choices)) is False


def test_numbers_that_are_not_finite() -> None:
    check_finite([0.0, -1e300], "x")
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(CandidateFailed, match="x is not finite"):
            check_finite([0.0, bad], "x")
