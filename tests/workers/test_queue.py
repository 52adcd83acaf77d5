"""A free worker takes the request that suits it best."""

from __future__ import annotations

from collections import deque

from hypothesis import given
from hypothesis import strategies as st

from evomerge.recipe import Recipe
from evomerge.workers.queue import take
from evomerge.workers.work import Work
from tests.searching.records import make_blocks, make_recipe

RECIPES = {name: make_recipe(i / 3) for i, name in enumerate("abc")}
BLOCKS = make_blocks(4)


def queue_of(*names: str) -> deque[Work]:
    return deque(Work(f"{name}{i}", (RECIPES[name],), BLOCKS[i % 4]) for i, name in enumerate(names))


def taken(queue: deque[Work], held: str, *elsewhere: str) -> str:
    return take(queue, RECIPES.get(held), [RECIPES[name] for name in elsewhere]).id


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
    assert take(deque([both, only]), RECIPES["b"]).id == "only"


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
        work = take(queue, RECIPES.get(held), [RECIPES[name] for name in sorted(elsewhere)])
        order.append(work.id)
        swaps += work.id[0] != held
        held = work.id[0]
    assert sorted(order) == sorted(f"{name}{i}" for i, name in enumerate(names))
    assert swaps <= len(set(names))


def path_of(text: str) -> Recipe:
    """Return the recipe of a path such as ``a0 b1 a2``."""
    hops = [{"model": step[0], "layer": int(step[1]), "scale": float(step[2:] or 1)} for step in text.split()]
    models = {name: {"source": f"./{name}", "sha256": 64 * digit} for name, digit in (("a", "0"), ("b", "1"))}
    return Recipe.from_dict({"models": models, "path": hops})


PATHS = {
    text: path_of(text)
    for text in ("a0 a1 a2", "a0 a1 b2 a2", "a0 b1 a2", "a0 b1 b2 a2", "b0 a1 a2", "a0 a10.5 a2")
}
WHOLE = Recipe.from_dict(
    {
        "models": {"a": {"source": "./a", "sha256": 64 * "0"}},
        "merges": {"merged": {"method": "linear", "inputs": ["a"], "parameters": {"weight": 1.0}}},
    }
)


def paths_of(*texts: str) -> deque[Work]:
    return deque(Work(text, (PATHS[text],), BLOCKS[0]) for text in texts)


def test_then_the_path_with_the_most_hops_in_common() -> None:
    queue = paths_of(*PATHS)
    assert take(queue, PATHS["a0 b1 b2 a2"]).id == "a0 b1 b2 a2"
    assert take(queue, PATHS["a0 b1 b2 a2"]).id == "a0 b1 a2"
    # A scale makes another layer of it; of equals, the oldest.
    assert take(queue, PATHS["a0 b1 a2"]).id == "a0 a1 a2"
    assert take(queue, PATHS["a0 a1 a2"]).id == "a0 a1 b2 a2"
    assert take(queue, PATHS["a0 a1 b2 a2"]).id == "a0 a10.5 a2"
    assert take(queue, None).id == "b0 a1 a2"


def test_and_the_fewest_in_common_with_what_others_hold() -> None:
    queue = paths_of("a0 a1 b2 a2", "a0 b1 a2", "b0 a1 a2")
    assert take(queue, None, [PATHS["a0 a1 a2"]]).id == "b0 a1 a2"
    assert take(queue, PATHS["a0 b1 b2 a2"], [PATHS["a0 b1 b2 a2"]]).id == "a0 b1 a2"


def test_a_request_says_where_waiting_paths_branch_off() -> None:
    queue = paths_of("a0 a1 a2", "a0 a1 b2 a2", "a0 a1 b2 a2", "a0 b1 a2", "b0 a1 a2")
    assert take(queue, None).branches == (1, 2)
    assert take(queue, PATHS["a0 a1 a2"]).branches == (1,)
    assert take(queue, PATHS["a0 a1 b2 a2"]).id == "a0 a1 b2 a2"
    assert take(queue, PATHS["a0 a1 b2 a2"]).branches == ()


def test_a_model_as_it_is_has_a_path_too() -> None:
    assert take(paths_of("b0 a1 a2", "a0 b1 a2"), WHOLE).id == "a0 b1 a2"
    queue = deque([Work("whole", (WHOLE,), BLOCKS[0]), *paths_of("a0 a1 b2 a2", "a0 b1 a2")])
    assert take(queue, None).branches == (1, 2)
    assert take(queue_of("a", "b"), RECIPES["c"]).branches == ()
