"""Scores of candidates that answered different items: nearer to the truth than plain means, and not optimistic."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from evomerge.searching.shrinkage import shrunk

Table = dict[str, dict[str, float]]
SIZE, DRAWN, POPULATION = 32, 3, 9


def simulate(
    seed: int, *, generations: int = 24, blocks: int = 72, gain: float = 0.15, binary: bool = True
) -> tuple[list[dict[str, Table]], dict[str, float]]:
    """Return what candidates of a search that gets better earned, three blocks a generation, and the truth."""
    rng = np.random.default_rng(seed)
    easiness = rng.normal(0, 0.3, (blocks, SIZE))
    per_epoch = blocks // DRAWN
    found, truth = [], {}
    for generation in range(generations):
        turn = generation % per_epoch
        if turn == 0:
            order = rng.permutation(blocks)
        drawn = order[turn * DRAWN : (turn + 1) * DRAWN]
        tables: dict[str, Table] = {}
        for place in range(POPULATION):
            name = f"{generation}-{place}"
            ability = 0.6 + gain * (1 - np.exp(-3 * generation / generations)) + rng.normal(0, 0.02)
            chances = np.clip(ability + easiness[drawn], 0, 1)
            values = (
                rng.random(chances.shape) < chances if binary else chances + rng.normal(0, 0.1, chances.shape)
            )
            truth[name] = float(np.clip(ability + easiness, 0, 1).mean())
            tables[name] = {
                "t": {
                    f"{block}:{i}": float(value)
                    for block, row in zip(drawn, values, strict=True)
                    for i, value in enumerate(row)
                }
            }
        found.append(tables)
    return found, truth


def plain(generations: list[dict[str, Table]]) -> dict[str, float]:
    return {name: float(np.mean([*t["t"].values()])) for tables in generations for name, t in tables.items()}


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("blocks", [72, 15])
def test_they_are_nearer_to_the_truth_whether_blocks_come_again_or_not(blocks: int, binary: bool) -> None:
    for seed in range(4):
        found, truth = simulate(seed, blocks=blocks, binary=binary)
        means, scores = plain(found), shrunk(found, {"t": 2.0})
        assert scores.keys() == truth.keys()
        true = np.array([*truth.values()])
        own, raw = (np.array([each[name] for name in truth]) for each in (scores, means))
        assert np.corrcoef(own, true)[0, 1] > np.corrcoef(raw, true)[0, 1] + 0.05
        assert np.mean((own - true) ** 2) < 0.4 * np.mean((raw - true) ** 2)


def test_no_generation_is_paid_for_its_items() -> None:
    first, last, best = [], [], []
    for seed in range(12):
        found, truth = simulate(100 + seed)
        scores = shrunk(found, {"t": 1.0})
        errors = [np.mean([scores[name] - truth[name] for name in found[place]]) for place in (0, -1)]
        first.append(errors[0])
        last.append(errors[1])
        winner = max(scores, key=lambda name: scores[name])
        best.append(scores[winner] - truth[winner])
    # The search gains 0.14: a model of items alone gives the first generation 0.07 of it.
    assert abs(np.mean(first)) < 0.04
    assert abs(np.mean(last)) < 0.02
    # The best plain mean lies 0.1 above the truth.
    assert abs(np.mean(best)) < 0.03


def one(*values: float, task: str = "t") -> Table:
    return {task: {f"{task}{i}": value for i, value in enumerate(values)}}


def test_within_a_generation_the_order_is_that_of_the_means() -> None:
    rng = np.random.default_rng(5)
    values = rng.random((10, 30)) + rng.random((10, 1))
    scores = shrunk([{str(i): one(*row) for i, row in enumerate(values)}], {"t": 1.0})
    own = np.array([scores[str(i)] for i in range(10)])
    assert (own.argsort() == values.mean(axis=1).argsort()).all()
    assert own.std() < values.mean(axis=1).std()
    assert own.mean() == pytest.approx(values.mean())


def test_tasks_weigh_as_in_the_fitness() -> None:
    def two(a: float, b: float, noise: Any) -> Table:
        return {**one(*(a + noise[0]), task="a"), **one(*(b + noise[1]), task="b")}

    rng = np.random.default_rng(1)
    noise = {name: rng.normal(0, 0.01, (2, 20)) for name in "xy"}
    generation = {"x": two(1.0, 0.0, noise["x"]), "y": two(0.0, 1.0, noise["y"])}
    scores = shrunk([generation], {"a": 3.0, "b": 1.0})
    assert scores["x"] == pytest.approx(0.75, abs=0.02)
    assert scores["y"] == pytest.approx(0.25, abs=0.02)


def test_a_recipe_that_is_asked_again_is_pulled_in_less() -> None:
    rng = np.random.default_rng(2)

    def generation(*names: str) -> dict[str, Table]:
        chance = {"good": 0.8}
        return {name: one(*(rng.random(60) < chance.get(name, 0.5)).astype(float)) for name in names}

    crowd = [[f"{g}{i}" for i in range(8)] for g in range(6)]
    once = shrunk([generation("good", *crowd[0]), *(generation(*names) for names in crowd[1:])], {"t": 1.0})
    often = shrunk([generation("good", *names) for names in crowd], {"t": 1.0})
    assert 0.5 < once["good"] < 0.85
    assert often["good"] == pytest.approx(0.8, abs=0.06)


def test_degenerate_data() -> None:
    assert shrunk([], {"t": 1.0}) == {}
    assert shrunk([{}, {}], {"t": 1.0}) == {}
    assert shrunk([{"a": one(0.25)}], {"t": 1.0}) == pytest.approx({"a": 0.25})
    alike = shrunk([{"a": one(1.0, 1.0), "b": one(1.0, 1.0)}, {}, {"c": one(1.0)}], {"t": 1.0})
    assert alike == pytest.approx({"a": 1.0, "b": 1.0, "c": 1.0})
    apart = shrunk([{"a": one(1.0)}, {"b": {"t": {"other": 0.0}}}], {"t": 1.0})
    assert all(np.isfinite(value) for value in apart.values())
    assert apart["a"] >= apart["b"]
