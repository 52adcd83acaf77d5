"""Blocks: every item in exactly one, each a fair share of every task."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomerge.errors import CandidateFailed
from evomerge.evaluation.blocks import FIXED_PART_ITEMS, cut_blocks, fixed_blocks, put_together
from evomerge.evaluation.guards import Answers, all_the_same, check_finite, constant_of
from evomerge.evaluation.items import Block, ItemScore, Part, PartOutcome

sizes = st.lists(st.integers(1, 40), min_size=1, max_size=5)


@given(sizes, st.integers(1, 50), st.integers(0, 5))
def test_blocks_are_a_stratified_partition(counts: list[int], block_items: int, seed: int) -> None:
    items = {f"task{t}": [f"{t}-{i}" for i in range(count)] for t, count in enumerate(counts)}
    blocks = cut_blocks(items, "search", seed=seed, block_items=block_items, packing="p:1")
    dealt = [item for block in blocks for item in block.items]
    assert sorted(dealt) == sorted(item for ids in items.values() for item in ids)
    assert len(blocks) == min(math.ceil(sum(counts) / block_items), min(counts))
    assert [block.index for block in blocks] == list(range(len(blocks)))
    whole = [len(block.items) for block in blocks]
    assert max(whole) <= block_items or len(blocks) == min(counts)
    assert max(whole) - min(whole) <= 1
    for t in range(len(counts)):
        share = [sum(item.startswith(f"{t}-") for item in block.items) for block in blocks]
        assert max(share) - min(share) <= 1
        assert min(share) >= 1


@given(sizes, st.integers(1, 50), st.integers(0, 5), st.data())
def test_a_tasks_parts_depend_on_no_other_task(
    counts: list[int], block_items: int, seed: int, data: st.DataObject
) -> None:
    def cut(counts: list[int], blocks: int) -> list[Block]:
        items = {f"task{t}": [f"{t}-{i}" for i in range(count)] for t, count in enumerate(counts)}
        size = math.ceil(sum(counts) / blocks)
        return list(cut_blocks(items, "search", seed=seed, block_items=size, packing="p:1"))

    def parts(blocks: list[Block], task: str) -> set[Part]:
        return {part for block in blocks for part in block.parts if part.task == task}

    number = len(cut(counts, math.ceil(sum(counts) / block_items)))
    others = data.draw(st.lists(st.integers(1, 40), min_size=len(counts), max_size=len(counts)))
    kept = data.draw(st.integers(0, len(counts) - 1))
    others[kept] = counts[kept]
    blocks, again = cut(counts, number), cut(others, number)
    if len(blocks) == len(again):
        assert parts(blocks, f"task{kept}") == parts(again, f"task{kept}")
    hashes = [part.hash for block in blocks for part in block.parts]
    assert len(set(hashes)) == len(hashes)


@given(sizes, st.randoms(use_true_random=False))
def test_fixed_blocks_are_cut_by_item_alone(counts: list[int], random_: random.Random) -> None:
    counts = [5 * count for count in counts]
    items = {f"task{t}": [f"{t}-{i:03}" for i in range(count)] for t, count in enumerate(counts)}
    shuffled = {task: random_.sample(ids, len(ids)) for task, ids in items.items()}
    blocks = fixed_blocks(shuffled, "test", packing="p:1")
    assert blocks == fixed_blocks(items, "test", packing="p:1")
    assert [block.index for block in blocks] == list(range(len(blocks)))
    for task, ids in items.items():
        parts = [part for block in blocks for part in block.parts if part.task == task]
        assert [item for part in parts for item in part.items] == ids
        assert len(parts) == math.ceil(len(ids) / FIXED_PART_ITEMS)
        lengths = [len(part.items) for part in parts] or [0]
        assert max(lengths) <= FIXED_PART_ITEMS
        assert max(lengths) - min(lengths) <= 1
        alone = fixed_blocks({task: ids}, "test", packing="p:1")
        assert [part for block in alone for part in block.parts] == parts


def test_a_parts_hash_covers_its_items_in_order_and_the_packing_and_no_more() -> None:
    part = Part("t", ("a", "b"), "p:1")
    assert replace(part, task="u").hash == part.hash
    others = [replace(part, items=("b", "a")), replace(part, items=("a",)), replace(part, packing="p:2")]
    assert len({other.hash for other in [part, *others]}) == 4
    block = Block("search", 0, (part,))
    assert replace(block, index=7).hash == block.hash
    assert replace(block, split="test").hash != block.hash


def outcome_of(part: Part, constant: str | None = None) -> PartOutcome:
    return PartOutcome(tuple(ItemScore(item, part.task, 1.0, 0.5) for item in part.items), constant)


def test_a_block_is_put_together_from_its_parts() -> None:
    one, two = Part("one", tuple("abcdefgh"), "p"), Part("two", ("x", "y"), "p")
    block = Block("search", 0, (one, two))
    together = put_together(block, [outcome_of(one, ""), outcome_of(two)], check_degenerate=True)
    assert [score.item for score in together] == [*"abcdefgh", "x", "y"]
    failed = PartOutcome(failure="a logit is not finite")
    for outcomes in ([failed], [outcome_of(one), failed]):
        with pytest.raises(CandidateFailed, match="a logit is not finite"):
            put_together(block, outcomes, check_degenerate=False)


def test_answers_are_degenerate_if_no_task_shows_otherwise() -> None:
    one, two = Part("one", tuple("abcdefgh"), "p"), Part("two", tuple("ABCDEFGH"), "p")
    block = Block("search", 0, (one, two))
    for constants in (("", "'x'"), ("'x'", ""), (None, None), (None, "")):
        outcomes = [outcome_of(part, c) for part, c in zip(block.parts, constants, strict=True)]
        assert len(put_together(block, outcomes, check_degenerate=True)) == 16
    for constants in (("'x'", "choice 2"), (None, "choice 2")):
        outcomes = [outcome_of(part, c) for part, c in zip(block.parts, constants, strict=True)]
        assert len(put_together(block, outcomes, check_degenerate=False)) == 16
        name = "one" if constants[0] else "two"
        with pytest.raises(
            CandidateFailed, match=f"degenerate answers: task '{name}' has .* each of 8 items"
        ):
            put_together(block, outcomes, check_degenerate=True)


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
    shown = {None: None, True: "'x'" if choices is None else "choice 0"}[verdict]
    assert constant_of(Answers(["x" if choices is None else 0] * count, gold, choices)) == shown
    if verdict:
        assert constant_of(Answers([*[0] * (count - 1), 1], gold, choices)) == ""
        assert all_the_same(Answers([*[0] * (count - 1), 1], gold, choices)) is False


def test_numbers_that_are_not_finite() -> None:
    check_finite([0.0, -1e300], "x")
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(CandidateFailed, match="x is not finite"):
            check_finite([0.0, bad], "x")
