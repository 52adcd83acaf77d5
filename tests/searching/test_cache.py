"""Nothing is scored twice, over runs too; and what is remembered changes nothing but the time it takes."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import evomerge
from evomerge.config import load_config
from evomerge.evaluation.score_cache import ScoreCache
from evomerge.evaluation.suite import Suite
from evomerge.scoring import evaluate
from evomerge.searching.results import summary
from evomerge.searching.run import Run, search
from evomerge.searching.rundir import open_run
from evomerge.searching.scheduler import Recorded, Scheduler
from evomerge.searching.store import Store
from tests.searching.records import canonical, make_blocks, make_recipe, make_scored
from tests.searching.test_kill import in_child
from tests.searching.test_scheduler import FakeExecutor
from tests.tasks import make_config, make_tasks

RECIPES = [make_recipe(i / 7) for i in range(4)]
BLOCKS = make_blocks(3)
ITEMS = len(RECIPES) * sum(len(block.items) for block in BLOCKS)


@pytest.fixture
def stores(tmp_path: Path) -> Iterator[Any]:
    opened = []

    def make() -> Store:
        opened.append(Store(tmp_path / f"{len(opened)}.db", create=True))
        return opened[-1]

    yield make
    for store in opened:
        store.close()


def run(store: Store, cache: ScoreCache, **behaviour: Any) -> tuple[FakeExecutor, list[Recorded]]:
    executor, seen = FakeExecutor(**behaviour), []
    on_event = lambda recorded: seen.append(recorded) if recorded else None  # noqa: E731
    Scheduler(store, executor, "f", on_event, cache=cache).complete(RECIPES, BLOCKS)
    return executor, seen


def test_what_one_run_has_scored_the_next_is_told(stores: Any, tmp_path: Path) -> None:
    first, second = stores(), stores()
    cache = ScoreCache(tmp_path / "scores", "f")
    _, seen = run(first, cache)
    assert sum(event.cached for event in seen) == 0
    executor, seen = run(second, cache)
    assert executor.asked == []
    assert second.canonical() == first.canonical()
    assert sum(event.items for event in seen) == sum(event.cached for event in seen) == ITEMS
    assert {row[0] for row in second.query("SELECT worker FROM results")[1]} == {"cache"}
    counts = [store.counts() for store in (first, second)]
    assert [count["item_evaluations"] for count in counts] == [ITEMS, ITEMS]
    assert [count["cached_item_evaluations"] for count in counts] == [0, ITEMS]


def test_of_a_block_only_the_unknown_parts_are_asked(stores: Any, tmp_path: Path) -> None:
    first, second = stores(), stores()
    run(first, ScoreCache(None, "f"))
    cache = ScoreCache(tmp_path / "scores", "f")
    for recipe in RECIPES:
        for block in BLOCKS:
            (scored,) = [make_scored(recipe, block.parts[1:])]
            cache.add(recipe.hash, zip(block.parts[1:], scored.parts, strict=True))
    executor, seen = run(second, cache)
    assert {work.parts for work in executor.asked} == {(0,)}
    assert set(seen) == {Recorded(items=3, cached=1)}
    assert second.canonical() == first.canonical()


def test_failures_are_remembered_with_their_reason(stores: Any, tmp_path: Path) -> None:
    failures = {RECIPES[1].hash: "a logit is not finite"}
    first, second, third = stores(), stores(), stores()
    cache = ScoreCache(tmp_path / "scores", "f")
    run(first, cache, failures=failures)
    executor, _ = run(second, cache)
    assert executor.asked == []
    assert second.canonical() == first.canonical()
    # A later part's failure is not the block's before the earlier parts are known to be sound.
    later = ScoreCache(tmp_path / "later", "f")
    for block in BLOCKS:
        (failed,) = make_scored(RECIPES[1], block.parts[1:], "a logit is not finite").parts
        later.add(RECIPES[1].hash, [(block.parts[1], failed)])
    executor, _ = run(third, later)
    assert {work.parts for work in executor.asked if work.recipes[0] == RECIPES[1]} == {(0,)}
    assert third.canonical() == first.canonical()


def test_another_engine_is_told_nothing(stores: Any, tmp_path: Path) -> None:
    run(stores(), ScoreCache(tmp_path / "scores", "f"))
    executor, _ = run(stores(), ScoreCache(tmp_path / "scores", "another"))
    assert len(executor.asked) == len(RECIPES) * len(BLOCKS)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tasks(tmp_path_factory.mktemp("cache") / "tasks")


@pytest.fixture(scope="module")
def uncached(family: dict[str, Path], tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("uncached")
    return search(make_config(folder, family, tasks), run=folder / "run")


def asked_of(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Note every part that an engine is asked."""
    asked: list[Any] = []
    score_part = Suite.score_part

    def noting(self: Suite, engine: Any, part: Any, *further: Any, **named: Any) -> Any:
        asked.append(part)
        return score_part(self, engine, part, *further, **named)

    monkeypatch.setattr(Suite, "score_part", noting)
    return asked


def test_searches_share_what_they_score(
    family: dict[str, Path], tasks: Path, tmp_path: Path, uncached: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = asked_of(monkeypatch)
    config = make_config(tmp_path, family, tasks, cache={"scores": "./kept"})
    cold = search(config, run=tmp_path / "cold")
    assert asked
    assert (tmp_path / "kept").is_dir()
    asked.clear()
    warm = search(config, run=tmp_path / "warm")
    assert asked == []
    for run in (cold, warm):
        assert canonical(run.path) == canonical(uncached.path)
        assert (run.path / "recipe.yaml").read_text() == (uncached.path / "recipe.yaml").read_text()
    results = [run.results for run in (uncached, cold, warm)]
    assert len({result["item_evaluations"] for result in results}) == 1
    assert [result["cached_item_evaluations"] for result in results] == [
        0,
        0,
        warm.results["item_evaluations"],
    ]
    said = [summary(result) for result in results]
    count = f"{warm.results['item_evaluations']:,}"
    assert f"{count} item evaluations, " in said[1]
    assert f"{count} item evaluations ({count} known from earlier runs), " in said[2]
    for result in results:
        for volatile in (
            *("wall_seconds", "merge_seconds", "score_seconds", "cached_item_evaluations"),
            *("layer_evaluations", "saved_layer_evaluations"),
        ):
            del result[volatile]
    assert results[0] == results[1] == results[2]

    # Another seed has other candidates and search blocks; parents and baselines are known on validation and test.
    other = search(config, run=tmp_path / "other", overrides=["seed=4"])
    store = open_run(other.path)
    try:
        rows = store.query(
            "SELECT DISTINCT results.recipe, split, worker FROM results JOIN blocks ON block = hash"
        )[1]
    finally:
        store.close()
    parents = {entry.hash for entry in baselines_of(config).values()}
    told = {(split, worker) for recipe, split, worker in rows if recipe in parents and split != "search"}
    assert {("validation", "cache"), ("test", "cache")} == told


def baselines_of(config: Path) -> dict[str, Any]:
    from evomerge.searching.setup import set_up

    return dict(set_up(load_config(config), file=config).baselines)


def test_a_changed_task_rescores_only_itself(
    family: dict[str, Path], tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(tmp_path, family, make_tasks(tmp_path / "tasks"), cache={"scores": "./kept"})
    before = evaluate(family["a"], config)
    path = tmp_path / "tasks" / "tiny_b.yaml"
    changed = yaml.safe_load(path.read_text()) | {"target_delimiter": " "}
    path.write_text(yaml.safe_dump(changed))
    asked = asked_of(monkeypatch)
    after = evaluate(family["a"], config)
    assert [part.task for part in asked] == ["tiny_b"]
    assert after.score["tasks"]["tiny_a"] == before.score["tasks"]["tiny_a"]


def test_evaluations_and_searches_share_their_parents(
    family: dict[str, Path], tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(tmp_path, family, tasks, cache={"scores": "./kept"})
    search(config, run=tmp_path / "run")
    asked = asked_of(monkeypatch)
    for name, path in family.items():
        alone = evaluate(path, config, overrides=["cache.scores=false"])
        assert asked
        asked.clear()
        shared = evaluate(path, config)
        assert asked == [], name
        assert shared == alone


def test_a_cache_that_cannot_be_written_stops_no_search(
    family: dict[str, Path], tasks: Path, tmp_path: Path, uncached: Run
) -> None:
    (tmp_path / "taken").write_text("")
    run = search(make_config(tmp_path, family, tasks, cache={"scores": "./taken"}), run=tmp_path / "run")
    assert canonical(run.path) == canonical(uncached.path)


def test_killed_runs_with_a_cache_resume_to_the_same_tables(
    family: dict[str, Path], tasks: Path, tmp_path: Path, uncached: Run
) -> None:
    expected = canonical(uncached.path)
    moments = random.Random(5)
    config = make_config(tmp_path, family, tasks, cache={"scores": "./kept"})
    for attempt in range(3):
        folder = tmp_path / f"killed-{attempt}"
        in_child(
            lambda folder=folder: evomerge.search(config, run=folder, continue_=True),
            kill_after=moments.uniform(0.5, 3.0),
        )
        status = in_child(lambda folder=folder: evomerge.search(config, run=folder, continue_=True))
        assert os.WEXITSTATUS(status) == 0
        assert canonical(folder) == expected


def test_the_cache_of_a_run_may_be_another_one_later(
    family: dict[str, Path], tasks: Path, tmp_path: Path
) -> None:
    config = make_config(tmp_path, family, tasks, budget={"candidates": 4})
    search(config, run=tmp_path / "run")
    again = search(config, run=tmp_path / "run", continue_=True, overrides=["cache.scores=./kept"])
    assert again.results["candidates"] == 4
