"""The scheduler completes tables whatever the workers do, and records before it returns."""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from evomerge.errors import InfrastructureError
from evomerge.recipe import Recipe
from evomerge.searching.scheduler import MAX_ATTEMPTS, Recorded, Scheduler
from evomerge.searching.store import Store
from evomerge.workers.executor import Event
from evomerge.workers.work import Result, Work, WorkerLost
from tests.searching.records import make_blocks, make_outcome, make_recipe, make_scored

RECIPES = [make_recipe(i / 7) for i in range(5)]
BLOCKS = make_blocks(4)


class FakeExecutor:
    """Workers in memory: answers in a random order, loses workers and repeats itself as it is told.

    Args:
        order: seed of the order of answers.
        losses: how often each request's worker is lost before it answers, by id; -1: always.
        repeats: how often each answer comes.
        empty: share of the polls that bring nothing.
        failures: recipe hash → reason.
        fingerprint: of all answers.
        tells: how many of the waiting requests are said to have an item answered, with each empty poll.
    """

    workers = 3

    def __init__(
        self,
        *,
        order: int = 0,
        losses: Callable[[Work], int] = lambda work: 0,
        repeats: int = 1,
        empty: float = 0.0,
        failures: dict[str, str] | None = None,
        fingerprint: str = "f",
        tells: int = 0,
    ) -> None:
        self.asked: list[Work] = []
        self.extra: deque[Event] = deque()
        self._random = random.Random(order)
        self._queue: list[Work] = []
        self._lost: Counter[str] = Counter()
        self._losses, self._repeats, self._empty = losses, repeats, empty
        self._failures, self._fingerprint = failures or {}, fingerprint
        self._tells = tells
        self._listener: Callable[[str, int], None] = lambda work, items: None

    def start(self, recipe: Recipe, tell: Callable[[str], None] = lambda phase: None) -> str:
        return self._fingerprint

    def watch(self, listener: Callable[[str, int], None]) -> None:
        self._listener = listener

    def submit(self, work: Work) -> None:
        self.asked.append(work)
        self._queue.append(work)

    def next_event(self, timeout: float) -> Event | None:
        if self.extra:
            return self.extra.popleft()
        if not self._queue or self._random.random() < self._empty:
            for work in self._queue[: self._tells]:
                self._listener(work.id, 1)
            self._listener("of an earlier table", 5)
            return None
        work = self._queue.pop(self._random.randrange(len(self._queue)))
        losses = self._losses(work)
        if losses < 0 or self._lost[work.id] < losses:
            self._lost[work.id] += 1
            return WorkerLost(work.id, "killed by the kernel", "w-lost")
        outcomes = tuple(make_scored(r, work.wanted, self._failures.get(r.hash)) for r in work.recipes)
        result = Result(work.id, outcomes, self._fingerprint, "w")
        self.extra.extend([result] * (self._repeats - 1))
        return result

    def preview(self, recipe: Recipe, items: Sequence[str]) -> list[Any]:
        return []

    def close(self) -> None:
        self._queue.clear()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "run.db", create=True)
    yield store
    store.close()


def expected_table(recipe: Recipe) -> dict[str, dict[str, Any]]:
    table: dict[str, dict[str, Any]] = {}
    for block in BLOCKS:
        for score in make_outcome(recipe, block).scores:
            table.setdefault(score.task, {})[score.item] = score
    return table


@pytest.mark.parametrize("order", range(5))
def test_tables_are_complete_whatever_the_order_of_arrival(store: Store, order: int) -> None:
    executor = FakeExecutor(
        order=order, empty=0.3, repeats=1 + order % 3, losses=lambda work: work.block.index % 3
    )
    scheduler = Scheduler(store, executor, "f")
    scheduler.complete(RECIPES, BLOCKS)
    for recipe in RECIPES:
        assert scheduler.table(recipe, BLOCKS) == expected_table(recipe)
    assert len(store.canonical()["results"]) == len(RECIPES) * len(BLOCKS)


def test_what_is_recorded_does_not_depend_on_the_order_of_arrival(tmp_path: Path) -> None:
    contents = []
    for order in range(3):
        store = Store(tmp_path / f"{order}.db", create=True)
        Scheduler(store, FakeExecutor(order=order, losses=lambda w: 1), "f").complete(RECIPES, BLOCKS)
        contents.append(store.canonical())
        store.close()
    assert contents[0] == contents[1] == contents[2]


def test_each_answer_is_recorded_before_it_is_announced(store: Store) -> None:
    seen = []

    def on_event(recorded: Recorded | None) -> None:
        if recorded is not None:
            assert recorded == Recorded(items=3)
            seen.append(recorded)
            assert len(store.canonical()["results"]) == len(seen)
            assert store.counts()["item_evaluations"] == 3 * len(seen)

    Scheduler(store, FakeExecutor(), "f", on_event).complete(RECIPES, BLOCKS)
    assert len(seen) == len(RECIPES) * len(BLOCKS)


def test_waiting_is_announced_too(store: Store) -> None:
    calls: list[Recorded | None] = []
    Scheduler(store, FakeExecutor(empty=0.7, order=3), "f", calls.append).complete(RECIPES[:1], BLOCKS)
    assert None in calls


def test_progress_tells_items_answered_and_items_in_all(store: Store) -> None:
    Scheduler(store, FakeExecutor(), "f").complete(RECIPES[:1], BLOCKS[:1])
    told: list[tuple[int, ...]] = []
    executor = FakeExecutor(failures={RECIPES[1].hash: "bad"}, losses=lambda work: 1)
    scheduler = Scheduler(store, executor, "f", on_progress=lambda *items: told.append(items))
    scheduler.complete(RECIPES[:2], BLOCKS[:2])
    assert told == [(3, 12, 0), (6, 12, 0), (9, 12, 0), (12, 12, 0)]


def test_what_workers_tell_between_results_is_progress(store: Store) -> None:
    told: list[tuple[int, ...]] = []
    executor = FakeExecutor(empty=0.5, tells=2)
    scheduler = Scheduler(store, executor, "f", on_progress=lambda *items: told.append(items))
    scheduler.complete(RECIPES[:2], BLOCKS[:2])
    assert told[0] == (0, 12, 0)
    assert told[-1] == (12, 12, 0)
    assert any(open_ for _, _, open_ in told)
    recorded = [done - open_ for done, _, open_ in told]
    assert recorded == sorted(recorded)
    assert all(0 <= done <= 12 for done, _, _ in told)


def test_nothing_known_is_asked_again(store: Store) -> None:
    executor = FakeExecutor()
    scheduler = Scheduler(store, executor, "f")
    scheduler.complete(RECIPES[:2], BLOCKS[:2])
    scheduler.complete(RECIPES[:3], BLOCKS[:3])
    scheduler.complete(RECIPES[:3], BLOCKS[:3])
    asked = Counter((work.recipes[0].hash, work.block.hash) for work in executor.asked)
    assert set(asked.values()) == {1}
    assert len(asked) == 9


def test_equal_recipes_are_asked_once(store: Store) -> None:
    twin = RECIPES[0].model_copy(update={"seed": 5})
    assert twin != RECIPES[0]
    executor = FakeExecutor()
    scheduler = Scheduler(store, executor, "f")
    scheduler.complete([RECIPES[0], twin, RECIPES[0]], BLOCKS)
    assert len(executor.asked) == len(BLOCKS)
    assert scheduler.table(twin, BLOCKS) == scheduler.table(RECIPES[0], BLOCKS)


def test_requests_have_ids_of_their_own_and_retries_keep_them(store: Store) -> None:
    executor = FakeExecutor(losses=lambda work: 2)
    Scheduler(store, executor, "f").complete(RECIPES, BLOCKS)
    asked = Counter(work.id for work in executor.asked)
    assert len(asked) == len(RECIPES) * len(BLOCKS)
    assert set(asked.values()) == {3}
    assert {work.kind for work in executor.asked} == {"score"}


def test_losses_are_recorded_and_never_become_scores(store: Store) -> None:
    bad = (RECIPES[1].hash, BLOCKS[2].hash)
    executor = FakeExecutor(losses=lambda w: 3 if (w.recipes[0].hash, w.block.hash) == bad else 0)
    scheduler = Scheduler(store, executor, "f")
    scheduler.complete(RECIPES, BLOCKS)
    attempts = store.query("SELECT worker, reason FROM attempts")[1]
    assert attempts == [("w-lost", "killed by the kernel")] * 3
    assert [entry["event"] for entry in store.events()] == ["worker_lost"] * 3
    assert scheduler.table(RECIPES[1], BLOCKS) == expected_table(RECIPES[1])


def test_a_request_that_is_always_lost_stops_the_run_after_the_others(store: Store) -> None:
    bad = (RECIPES[1].hash, BLOCKS[2].hash)
    executor = FakeExecutor(losses=lambda w: -1 if (w.recipes[0].hash, w.block.hash) == bad else 0)
    scheduler = Scheduler(store, executor, "f")
    with pytest.raises(InfrastructureError) as caught:
        scheduler.complete(RECIPES, BLOCKS)
    assert str(caught.value) == (
        f"a request was lost {MAX_ATTEMPTS} times with its worker, the last time: killed by the kernel"
    )
    assert sum((w.recipes[0].hash, w.block.hash) == bad for w in executor.asked) == MAX_ATTEMPTS
    assert len(store.canonical()["results"]) == len(RECIPES) * len(BLOCKS) - 1
    healed = FakeExecutor()
    Scheduler(store, healed, "f").complete(RECIPES, BLOCKS)
    assert [(w.recipes[0].hash, w.block.hash) for w in healed.asked] == [bad]


def test_a_cluster_that_loses_everything_is_given_up_soon(store: Store) -> None:
    executor = FakeExecutor(losses=lambda w: -1)
    with pytest.raises(InfrastructureError, match="lost 4 times"):
        Scheduler(store, executor, "f").complete(RECIPES, BLOCKS)
    requests = len(RECIPES) * len(BLOCKS)
    assert len(store.query("SELECT id FROM attempts")[1]) <= (MAX_ATTEMPTS - 1) * requests + 2
    assert store.canonical()["results"] == []


def test_old_answers_and_losses_of_other_requests_do_no_harm(store: Store) -> None:
    executor = FakeExecutor()
    foreign = make_scored(make_recipe(99.0), BLOCKS[0].parts)
    executor.extra.extend([WorkerLost("old", "gone", "w")] * (MAX_ATTEMPTS + 1))
    executor.extra.append(Result("old", (foreign,), "f", "w"))
    scheduler = Scheduler(store, executor, "f")
    scheduler.complete(RECIPES, BLOCKS)
    assert store.results(foreign.recipe) == {}
    assert len(executor.asked) == len(RECIPES) * len(BLOCKS)


def test_scores_of_another_engine_are_refused(store: Store) -> None:
    scheduler = Scheduler(store, FakeExecutor(fingerprint="other"), "f")
    with pytest.raises(
        InfrastructureError, match="worker w scored with another engine fingerprint; its scores cannot"
    ):
        scheduler.complete(RECIPES, BLOCKS)
    assert store.canonical()["results"] == []


def test_a_failed_candidate_has_a_reason_instead_of_a_table(store: Store) -> None:
    bad = RECIPES[2]
    scheduler = Scheduler(store, FakeExecutor(failures={bad.hash: "logits are not finite"}), "f")
    scheduler.complete(RECIPES, BLOCKS)
    assert scheduler.table(bad, BLOCKS) == "logits are not finite"
    assert scheduler.table(RECIPES[0], BLOCKS) == expected_table(RECIPES[0])


def test_a_table_over_incomplete_blocks_is_a_bug_and_not_a_score(store: Store) -> None:
    scheduler = Scheduler(store, FakeExecutor(), "f")
    scheduler.complete(RECIPES[:1], BLOCKS[:2])
    with pytest.raises(KeyError):
        scheduler.table(RECIPES[0], BLOCKS)


def test_nothing_to_do_asks_nothing(store: Store) -> None:
    executor = FakeExecutor()
    scheduler = Scheduler(store, executor, "f")
    scheduler.complete([], BLOCKS)
    scheduler.complete(RECIPES, [])
    assert executor.asked == []
