"""Which blocks a generation sees: the same for all its candidates, fresh ones each time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomerge.searching.draws import block_sizes, draw_blocks
from tests.searching.records import make_blocks


@given(st.integers(1, 12), st.data(), st.integers(0, 2**40))
def test_an_epoch_deals_every_generation_blocks_of_its_own(
    total: int, data: st.DataObject, seed: int
) -> None:
    count = data.draw(st.integers(1, total))
    epoch = data.draw(st.integers(0, 3))
    per_epoch = total // count
    blocks = make_blocks(total)
    dealt = [
        draw_blocks(blocks, count, generation=epoch * per_epoch + turn, seed=seed)
        for turn in range(per_epoch)
    ]
    assert all(len(draw) == count for draw in dealt)
    hashes = [block.hash for draw in dealt for block in draw]
    assert len(set(hashes)) == len(hashes) == count * per_epoch


def test_a_draw_depends_on_seed_and_generation_alone() -> None:
    blocks = make_blocks(10)
    draws = {(s, g): draw_blocks(blocks, 3, generation=g, seed=s) for s in (0, 1) for g in range(12)}
    for (seed, generation), draw in reversed(draws.items()):
        assert draw_blocks(make_blocks(10), 3, generation=generation, seed=seed) == draw
    assert [draws[0, g] for g in range(12)] != [draws[1, g] for g in range(12)]
    epochs = [[draws[0, e * 3 + turn] for turn in range(3)] for e in range(4)]
    assert all(epochs[i] != epochs[j] for i in range(4) for j in range(i))


def test_over_many_epochs_all_blocks_are_drawn_alike() -> None:
    blocks = make_blocks(5)
    times = dict.fromkeys((block.hash for block in blocks), 0)
    generations = 1000
    for generation in range(generations):
        for block in draw_blocks(blocks, 2, generation=generation, seed=4):
            times[block.hash] += 1
    assert sum(times.values()) == 2 * generations
    # Binomial over 500 epochs with p = 4/5: a standard deviation of 9.
    assert all(abs(n - 400) < 45 for n in times.values())


def test_blocks_come_in_their_own_order() -> None:
    draw = draw_blocks(make_blocks(9), 4, generation=5, seed=1)
    assert [block.index for block in draw] == sorted(block.index for block in draw)


@pytest.mark.parametrize("count", [0, -1, 4])
def test_a_draw_that_cannot_be_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"cannot draw {count} of 3 blocks"):
        draw_blocks(make_blocks(3), count, generation=0, seed=0)


@pytest.mark.parametrize(
    ("sizes", "block_items", "per_candidate", "expected"),
    [
        ([5_000] * 2, "auto", "auto", (32, 3)),
        ([500] * 20, "auto", "auto", (80, 3)),
        ([96], "auto", "auto", (32, 3)),
        ([64], "auto", "auto", (32, 2)),
        ([10], "auto", "auto", (10, 1)),
        ([1], "auto", "auto", (1, 1)),
        ([1], 8, 16, (1, 1)),
        ([10_000], "auto", 16, (16, 1)),
        ([10_000], "auto", 256, (32, 8)),
        ([10_000], 64, "auto", (64, 2)),
        ([24] * 2, 8, 16, (8, 2)),
        ([24] * 2, 8, 1000, (8, 6)),
        ([24] * 2, 100, 1000, (48, 1)),
        ([10_000], 64, 16, (64, 1)),
        ([100], 96, 96, (96, 2)),
        # As many blocks as the smallest task has items: 12 of 51, 4 of 501.
        ([12, 600], "auto", "auto", (32, 2)),
        ([4, 2_000], "auto", "auto", (32, 1)),
        ([20, 20, 20], 1, 6, (1, 2)),
    ],
)
def test_sizes_of_blocks_and_draws(
    sizes: list[int], block_items: int | str, per_candidate: int | str, expected: tuple[int, int]
) -> None:
    assert block_sizes(sizes, block_items=block_items, items_per_candidate=per_candidate) == expected


@given(
    st.lists(st.integers(1, 2000), min_size=1, max_size=12),
    st.one_of(st.just("auto"), st.integers(1, 500)),
    st.one_of(st.just("auto"), st.integers(1, 5000)),
)
def test_sizes_always_fit_what_there_is(
    sizes: list[int], block_items: int | str, per_candidate: int | str
) -> None:
    size, count = block_sizes(sizes, block_items=block_items, items_per_candidate=per_candidate)
    items = sum(sizes)
    assert 1 <= size <= items
    blocks = min(-(-items // size), min(sizes))
    assert 1 <= count <= blocks
    if per_candidate != "auto":
        # As near as whole blocks of equal size come to what was asked for.
        wanted, each = min(int(per_candidate), items), items / blocks
        assert abs(count * each - wanted) <= max(each / 2, each - wanted) + 1e-9
