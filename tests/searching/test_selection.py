from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from evomerge.errors import UserError
from evomerge.evaluation.items import ItemScore
from evomerge.recipe import Merge, Recipe, Source
from evomerge.searching.selection import choose, short_list


def recipe(weight: float) -> Recipe:
    source = Source(source="a", sha256="0" * 64)
    merge = Merge(method="linear", inputs=("a",), parameters={"weight": weight, "normalize": False})
    return Recipe(models={"a": source}, merges={"m": merge})


def winner(scores: Mapping[str, Sequence[int] | str], baselines: Sequence[str]) -> str:
    """Choose among entries in the given order; a text stands for a candidate that failed."""
    entries = [(name, recipe(i + 1)) for i, name in enumerate(scores)]
    by_hash = {entry.hash: scores[name] for name, entry in entries}

    def table(entry: Recipe) -> dict[str, dict[str, ItemScore]] | str:
        answers = by_hash[entry.hash]
        if isinstance(answers, str):
            return answers
        return {"t": {str(i): ItemScore(str(i), "t", float(a), float(a)) for i, a in enumerate(answers)}}

    return choose(entries, baselines, table, {"t": 1.0})[0]


def answers(right: int, of: int = 100) -> list[int]:
    return [1] * right + [0] * (of - right)


def test_the_best_on_validation_wins() -> None:
    assert (
        winner({"base": answers(50), "uniform": answers(60), "mean": answers(61)}, ["base", "uniform"])
        == "mean"
    )
    assert (
        winner({"base": answers(50), "uniform": answers(62), "mean": answers(61)}, ["base", "uniform"])
        == "uniform"
    )


def test_a_tie_goes_to_the_simpler_one() -> None:
    assert (
        winner({"base": answers(50), "uniform": answers(60), "mean": answers(60)}, ["base", "uniform"])
        == "uniform"
    )


def test_a_lucky_candidate_does_not_displace_the_mean() -> None:
    scores = {"base": answers(50), "mean": answers(70), "candidate 3": [0] * 3 + answers(72, 97)}
    assert sum(scores["candidate 3"]) > sum(scores["mean"])
    assert winner(scores, ["base"]) == "mean"


def test_a_clearly_better_candidate_displaces_the_mean() -> None:
    assert (
        winner({"base": answers(50), "mean": answers(60), "candidate 3": answers(75)}, ["base"])
        == "candidate 3"
    )


def test_entries_that_failed_cannot_win() -> None:
    assert winner({"base": answers(10), "mean": "weights are not finite"}, ["base"]) == "base"
    with pytest.raises(UserError, match="not even the parents"):
        winner({"base": "NaN", "mean": "NaN"}, ["base"])


def test_the_short_list_is_ordered_from_simple_to_lucky_and_names_each_recipe_once() -> None:
    made = {float(i): recipe(float(i)) for i in range(1, 10)}
    entries = short_list(
        baselines={"base": made[1.0], "a": made[2.0], "uniform": made[3.0], "initial": made[4.0]},
        means=[(4.0,), (5.0,), (6.0,), (7.0,)],
        decode=lambda genotype: made[genotype[0]],
        shrunk={0: 0.1, 1: 0.9, 2: 0.9, 3: 0.5},
        recipe_of=lambda candidate: {1: made[7.0], 2: made[8.0], 3: made[9.0]}[candidate],
        first=10,
    )
    assert [(name, candidate) for name, _, candidate in entries] == [
        ("base", None),
        ("a", None),
        ("uniform", None),
        ("initial", None),
        ("mean", None),
        ("mean after generation 13", None),
        ("mean after generation 12", None),
        ("candidate 2", 2),
        ("candidate 3", 3),
    ]
