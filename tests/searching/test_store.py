"""run.db holds whole events, bit for bit, whatever happens to the process that writes it."""

from __future__ import annotations

import math
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from evomerge.errors import InfrastructureError, UserError
from evomerge.searching.store import CANONICAL, Store
from tests.searching.records import items_of, make_blocks, make_outcome, make_recipe

POPULATION = 4
BLOCKS = make_blocks(3)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.db"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    store = Store(path, create=True)
    yield store
    store.close()


def record_generation(store: Store, generation: int, population: int = POPULATION) -> None:
    recipes = [make_recipe(generation + i / 7) for i in range(population)]
    store.add_generation(generation, BLOCKS, [((i / 7, 0.1 + 0.2), r) for i, r in enumerate(recipes)])
    for recipe in recipes:
        for block in BLOCKS:
            store.add_result(make_outcome(recipe, block), block.hash, "worker-1")
    told = [
        replace(row, status="scored", fitness=1 / 3 + row.position, rank=float(row.position))
        for row in store.candidates(generation)
    ]
    store.tell(generation, told)


WRITER = """
import sys
from pathlib import Path
from evomerge.searching.store import Store
from tests.searching.records import items_of
from tests.searching.test_store import BLOCKS, record_generation
store = Store(Path(sys.argv[1]), create=not Path(sys.argv[1]).exists())
if not store.block_hashes():
    store.add_items(items_of(BLOCKS), BLOCKS)
generation = 1 + max((row.generation for row in store.candidates()), default=-1)
print("ready", flush=True)
while True:
    record_generation(store, generation)
    generation += 1
"""


def start_writer(path: Path) -> subprocess.Popen[str]:
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    assert writer.stdout.readline() == "ready\n"
    return writer


def kill(writer: subprocess.Popen[str]) -> None:
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    assert writer.stdout is not None
    writer.stdout.close()


def check_whole_events(store: Store) -> None:
    """Everything recorded belongs to an event that is there in full."""
    assert store.query("PRAGMA integrity_check")[1] == [("ok",)]
    generations = {row.generation for row in store.candidates()}
    assert generations == set(range(len(generations)))
    assert [row.id for row in store.candidates()] == list(range(POPULATION * len(generations)))
    for generation in generations:
        rows = store.candidates(generation)
        assert store.generation_blocks(generation) == [block.hash for block in BLOCKS]
        assert [row.position for row in rows] == list(range(POPULATION))
        assert {row.status for row in rows} == ({"scored"} if store.is_told(generation) else {"asked"})
        for row in rows:
            recipe = store.recipe(row.recipe)
            assert recipe.hash == row.recipe
            for block in BLOCKS:
                expected = make_outcome(recipe, block) if block.hash in store.results(row.recipe) else None
                assert store.scores(row.recipe, block.hash) == (list(expected.scores) if expected else [])
    recorded = store.query("SELECT DISTINCT recipe, block FROM scores")[1]
    assert set(recorded) == set(store.query("SELECT recipe, block FROM results")[1])


def test_a_killed_writer_leaves_whole_events(path: Path) -> None:
    written = 0
    for milliseconds in (3, 25, 60, 140):
        writer = start_writer(path)
        time.sleep(milliseconds / 1000)
        kill(writer)
        store = Store(path, create=False)
        try:
            check_whole_events(store)
            before, written = written, store.counts()["item_evaluations"]
            assert written >= before
        finally:
            store.close()
        # The writer goes on with a new generation: what a kill left unfinished is finished first.
        store = Store(path, create=False)
        for generation in {row.generation for row in store.candidates()}:
            if not store.is_told(generation):
                rows = store.candidates(generation)
                store.tell(generation, [replace(row, status="scored", fitness=0.5, rank=0.0) for row in rows])
        store.close()
    assert written > 0


def test_one_process_drives_a_run_at_a_time(path: Path) -> None:
    writer = start_writer(path)
    try:
        with pytest.raises(UserError) as caught:
            Store(path, create=False)
        message = f"{path}: another evomerge process is driving this run; wait until it ends, or stop it"
        assert str(caught.value) == message
    finally:
        kill(writer)
    Store(path, create=False).close()


def test_the_lock_holds_within_a_process_too(store: Store, path: Path) -> None:
    with pytest.raises(UserError, match="another evomerge process is driving this run"):
        Store(path, create=False)
    store.set_meta(still="writable")


def test_a_failed_event_leaves_no_trace(store: Store) -> None:
    store.set_meta(before=1)

    def interrupted() -> None:
        with store.transaction():
            store.set_meta(during=2)
            store.add_recipe(make_recipe(0.5))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (store.meta("before"), store.meta("during")) == (1, None)
    with pytest.raises(KeyError):
        store.recipe(make_recipe(0.5).hash)
    store.set_meta(after=3)
    assert store.meta("after") == 3


def test_a_generation_is_recorded_whole_or_not_at_all(store: Store) -> None:
    recipe = make_recipe(0.5)
    with pytest.raises(TypeError):
        store.add_generation(0, BLOCKS, [((0.5,), recipe), ((object(),), recipe)])  # type: ignore[list-item]
    assert store.generation_blocks(0) is None
    assert store.candidates() == []


def test_what_was_recorded_reads_back_bit_for_bit(store: Store, path: Path) -> None:
    awkward = (0.1 + 0.2, 5e-324, 1 - 2**-53, 1 / 3, 1.7976931348623157e308, 1e-7, -0.0)
    recipe = make_recipe(math.pi)
    block = BLOCKS[0]
    outcome = make_outcome(recipe, block)
    values = zip(outcome.scores, awkward[:3], awkward[3:6], strict=True)
    outcome = replace(outcome, scores=tuple(replace(s, raw=raw, value=value) for s, raw, value in values))
    cut = zip(outcome.scores, (True, False, None), strict=True)
    outcome = replace(outcome, scores=tuple(replace(score, truncated=flag) for score, flag in cut))
    store.add_items(items_of(BLOCKS), BLOCKS)
    store.add_generation(0, [block], [(awkward, recipe)])
    store.add_result(outcome, block.hash, "w")
    (row,) = store.candidates(0)
    store.tell(0, [replace(row, status="scored", fitness=0.1 + 0.2, rank=0.0)])
    store.close()
    again = Store(path, create=False)
    try:
        (row,) = again.candidates()
        assert repr(row.genotype) == repr(awkward)
        assert repr(row.fitness) == "0.30000000000000004"
        assert again.recipe(row.recipe) == recipe
        assert repr(again.scores(recipe.hash, block.hash)) == repr(
            sorted(outcome.scores, key=lambda s: s.item)
        )
        assert again.block_hashes() == {block.hash for block in BLOCKS}
        assert again.generation_blocks(0) == [block.hash]
        assert again.generation_blocks(1) is None
        assert again.is_told(0)
        assert not again.is_told(1)
    finally:
        again.close()


def test_the_first_answer_stands(store: Store) -> None:
    recipe, block = make_recipe(0.5), BLOCKS[0]
    store.add_result(make_outcome(recipe, block, failure="weights are not finite"), block.hash, "w1")
    store.add_result(make_outcome(recipe, block), block.hash, "w2")
    assert store.results(recipe.hash) == {block.hash: "weights are not finite"}
    assert store.scores(recipe.hash, block.hash) == []
    other = BLOCKS[1]
    store.add_result(make_outcome(recipe, other), other.hash, "w1")
    store.add_result(make_outcome(recipe, other, failure="late"), other.hash, "w2")
    assert store.results(recipe.hash)[other.hash] is None
    assert len(store.scores(recipe.hash, other.hash)) == len(other.items)


def test_a_score_that_is_no_number_is_never_dropped_silently(store: Store) -> None:
    recipe, block = make_recipe(0.5), BLOCKS[0]
    outcome = make_outcome(recipe, block)
    broken = replace(outcome, scores=(replace(outcome.scores[0], raw=math.nan), *outcome.scores[1:]))
    with pytest.raises(sqlite3.IntegrityError):
        store.add_result(broken, block.hash, "w")
    assert store.results(recipe.hash) == {}


def test_counts(store: Store) -> None:
    record_generation(store, 0)
    store.add_generation(1, BLOCKS, [((0.5,), make_recipe(9.0))])
    rows = store.candidates(0)
    store.tell(0, [replace(rows[0], status="failed", fitness=None, rank=3.0, reason="nan"), *rows[1:]])
    recipe = make_recipe(9.0)
    store.add_result(replace(make_outcome(recipe, BLOCKS[0]), cached=2), BLOCKS[0].hash, "w")
    expected = {
        "candidates": POPULATION,
        "failed": 1,
        "screened": 0,
        "item_evaluations": POPULATION * 9 + 3,
        "cached_item_evaluations": 2,
    }
    assert store.counts() == expected
    assert store.candidates(0)[0].reason == "nan"


def test_rounds_of_selection(store: Store) -> None:
    first, second = make_recipe(0.1), make_recipe(0.2)
    assert store.winner() is None
    store.add_short_list(0, [("mean", first, None), ("best", second, 7)])
    store.set_winner(0, second.hash, "best")
    store.add_short_list(1, [("mean", second, None)])
    store.set_winner(1, first.hash, "mean")
    assert store.short_list(0) == [("mean", first.hash, None), ("best", second.hash, 7)]
    assert store.winner(0) == (second.hash, "best")
    assert store.winner() == (first.hash, "mean")
    assert store.winner(5) is None
    assert store.open_test(0, "final comparison") == 1
    assert store.open_test(0, "final comparison") == 1
    assert store.open_test(1, "final comparison") == 2
    assert store.test_openings() == 2


def test_the_log_is_in_order(store: Store) -> None:
    store.event("created", name="x")
    store.event("worker_lost", worker="w3")
    log = list(store.events())
    assert [(entry["event"], entry.get("name"), entry.get("worker")) for entry in log] == [
        ("created", "x", None),
        ("worker_lost", None, "w3"),
    ]
    assert log[0]["time"] <= log[1]["time"] <= time.time()


def test_canonical_contents_know_no_times_attempts_or_hosts(tmp_path: Path) -> None:
    stores = [Store(tmp_path / f"{i}.db", create=True) for i in range(2)]
    orders = (list(BLOCKS), list(reversed(BLOCKS)))
    for i, (store, blocks) in enumerate(zip(stores, orders, strict=True)):
        store.add_items(items_of(BLOCKS), BLOCKS)
        recipe = make_recipe(0.3)
        store.add_generation(0, BLOCKS, [((0.25,), recipe)])
        for block in blocks:
            outcome = replace(make_outcome(recipe, block), merge_seconds=float(i), score_seconds=i / 3)
            store.add_result(outcome, block.hash, f"host-{i}")
        store.open_test(0, "final comparison")
        store.set_meta(wall_seconds=i)
        for _ in range(i):
            store.add_attempt("work", "host", "out of memory")
            store.event("worker_lost")
        time.sleep(0.01)
    first, second = (store.canonical() for store in stores)
    assert first == second
    assert set(first) == set(CANONICAL)
    assert len(first["scores"]) == 9
    stores[1].add_result(make_outcome(make_recipe(0.4), BLOCKS[0]), BLOCKS[0].hash, "host-1")
    assert stores[1].canonical() != first
    for store in stores:
        store.close()


def test_a_backup_is_a_run_database_of_its_own(store: Store, tmp_path: Path) -> None:
    record_generation(store, 0)
    store.backup(tmp_path / "copy.db")
    record_generation(store, 1)
    copy = Store(tmp_path / "copy.db", create=False)
    try:
        assert len(copy.candidates()) == POPULATION
        check_whole_events(copy)
    finally:
        copy.close()
    with pytest.raises(InfrastructureError, match=r"missing/copy.db: cannot be written: unable to open"):
        store.backup(tmp_path / "missing" / "copy.db")


def test_a_full_disk_stops_the_run_and_spoils_nothing(store: Store, path: Path) -> None:
    record_generation(store, 0)
    before = store.canonical()
    (pages,) = store.query("PRAGMA page_count")[1][0]
    store.query(f"PRAGMA max_page_count={pages}")
    many = [((0.5,), make_recipe(1 + i / 999)) for i in range(2000)]
    with pytest.raises(InfrastructureError) as caught:
        store.add_generation(1, BLOCKS, many)
    assert str(caught.value) == f"{path}: cannot be written: database or disk is full"
    assert store.canonical() == before
    store.close()
    again = Store(path, create=False)
    try:
        check_whole_events(again)
        assert again.canonical() == before
        record_generation(again, 1)
    finally:
        again.close()


def test_another_schema_version_is_refused(store: Store, path: Path) -> None:
    store.set_meta(schema_version=9)
    store.close()
    with pytest.raises(UserError) as caught:
        Store(path, create=False)
    assert str(caught.value) == (
        f"{path}: made by another version of evomerge (schema 9, this one reads 3); "
        "resume it with the version that made it"
    )


@pytest.mark.parametrize("content", [b"", b"version: 1\n" * 100, b"SQLite format 3\0" + b"x" * 200])
def test_what_is_no_run_database_is_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"^{path}: not a run database: "):
        Store(path, create=False)


def test_creating_and_opening_are_told_apart(store: Store, path: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exists already"):
        Store(path, create=True)
    with pytest.raises(UserError, match="no such run database"):
        Store(tmp_path / "other.db", create=False)
    with pytest.raises(InfrastructureError, match="cannot be opened"):
        Store(tmp_path / "missing" / "run.db", create=True)
