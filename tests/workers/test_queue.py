"""A free worker takes the request that suits it best."""

from __future__ import annotations

from collections import deque

from hypothesis import given
from hypothesis import strategies as st

from evomerge.workers.queue import take
from evomerge.workers.work import Work
from tests.searching.records import make_blocks, make_recipe

RECIPES = {name: make_recipe(i / 3) for i, name in enumerate("abc")}
BLOCKS = make_blocks(4)


def queue_of(*names: str) -> deque[Work]:
    return deque(Work(f"{name}{i}", (RECIPES[name],), BLOCKS[i % 4]) for i, name in enumerate(names))


def taken(queue: deque[Work], held: str, *elsewhere: str) -> str:
    return take(queue, RECIPES.get(held), {RECIPES[name].hash for name in elsewhere}).id


def test_a_request_for_the_weights_it_holds_comes_first() -> None:
    queue = queue_of("a", "b", "c", "b")
    assert taken(queue, "b", "a", "c") == "b1"
    assert taken(queue, "b", "a", "c") == "b3"
    assert [work.id for work in queue] == ["a0", "c2"]


def test_then_the_oldest_that_nobody_else_holds() -> None:
    assert taken(queue_of("a", "a", "b", "c"), "", "a") == "b2"
    assert taken(queue_of("a", "b"), "c", "b") == "a0"


def test_then_the_oldest() -> None:
    assert taken(queue_of("a", "b", "a"), "c", "a", "b") == "a0"
    assert taken(queue_of("b", "a"), "") == "b0"


def test_of_several_recipes_the_first_decides() -> None:
    both = Work("both", (RECIPES["a"], RECIPES["b"]), BLOCKS[0])
    only = Work("only", (RECIPES["b"],), BLOCKS[0])
    assert take(deque([both, only]), RECIPES["b"], ()).id == "only"


@given(
    st.lists(st.sampled_from("abc"), min_size=1, max_size=12),
    st.sampled_from(["", *"abc"]),
    st.sets(st.sampled_from("abc")),
)
def test_every_request_is_taken_once_and_swaps_are_few(
    names: list[str], held: str, elsewhere: set[str]
) -> None:
    queue = queue_of(*names)
    order, swaps = [], 0
    while queue:
        work = take(queue, RECIPES.get(held), {RECIPES[name].hash for name in elsewhere})
        order.append(work.id)
        swaps += work.id[0] != held
        held = work.id[0]
    assert sorted(order) == sorted(f"{name}{i}" for i, name in enumerate(names))
    assert swaps <= len(set(names))
