"""Scores shared by runs: the same bits, or none; whatever happens to the files."""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from evomerge.environment import cache_folder
from evomerge.evaluation import score_cache
from evomerge.evaluation.items import ItemScore, Part, PartOutcome
from evomerge.evaluation.score_cache import ScoreCache, scores_folder

AWKWARD = [0.1 + 0.2, 5e-324, 1 - 2**-53, 1 / 3, 1.7976931348623157e308, -0.0]
PARTS = [Part("a", tuple(f"item-{p}-{i}" for i in range(6)), "hf-v1:64") for p in range(3)]


def outcome_of(part: Part, shift: float = 0.0) -> PartOutcome:
    return PartOutcome(
        tuple(
            ItemScore(item, part.task, raw + shift, 1 / (2 + i), truncated=[None, True, False][i % 3])
            for i, (item, raw) in enumerate(zip(part.items, AWKWARD, strict=True))
        ),
        constant=["", None, "choice 2"][len(part.items[0]) % 3],
    )


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_what_was_added_comes_back_bit_for_bit(tmp_path: Path) -> None:
    outcomes = {part.hash: outcome_of(part) for part in PARTS[:2]}
    failed = PartOutcome(failure="a logit is not finite: «ä»")
    cache = ScoreCache(tmp_path, "engine")
    assert cache.known("recipe", PARTS) == {}
    cache.add("recipe", [(PARTS[0], outcomes[PARTS[0].hash])])
    cache.add("recipe", [(PARTS[1], outcomes[PARTS[1].hash]), (PARTS[2], failed)])
    for reader in (cache, ScoreCache(tmp_path, "engine")):
        found = reader.known("recipe", PARTS)
        assert repr(found) == repr({**outcomes, PARTS[2].hash: failed})
    assert set(cache.known("recipe", PARTS[1:2])) == {PARTS[1].hash}


def test_nothing_is_found_under_another_recipe_engine_version_items_or_packing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = PARTS[0]
    cache = ScoreCache(tmp_path, "engine")
    cache.add("recipe", [(part, outcome_of(part))])
    assert cache.known("other", [part]) == {}
    assert ScoreCache(tmp_path, "engine of another kind").known("recipe", [part]) == {}
    for other in (replace(part, packing="hf-v2:64"), replace(part, items=part.items[:5])):
        assert cache.known("recipe", [other]) == {}
    monkeypatch.setattr(score_cache, "__version__", "99.0")
    assert ScoreCache(tmp_path, "engine").known("recipe", [part]) == {}


def test_a_task_may_be_called_otherwise(tmp_path: Path) -> None:
    cache = ScoreCache(tmp_path, "engine")
    cache.add("recipe", [(PARTS[0], outcome_of(PARTS[0]))])
    renamed = replace(PARTS[0], task="b")
    (found,) = cache.known("recipe", [renamed]).values()
    assert {score.task for score in found.scores} == {"b"}


def test_tasks_may_be_kept_out(tmp_path: Path) -> None:
    parts = [PARTS[0], replace(PARTS[1], task="b")]
    outcomes = [(part, outcome_of(part)) for part in parts]
    for cache in (ScoreCache(tmp_path, "engine", unshared={"b"}), ScoreCache(tmp_path, "engine")):
        cache.add("recipe", outcomes[:1] if cache.known("recipe", parts) else outcomes)
        assert set(cache.known("recipe", parts)) == {parts[0].hash}
    ScoreCache(tmp_path, "engine").add("recipe", outcomes)
    assert set(ScoreCache(tmp_path, "engine", unshared="b").known("recipe", parts)) == {parts[0].hash}


def test_damage_costs_only_what_is_damaged(tmp_path: Path) -> None:
    numbers = random.Random(0)
    cache = ScoreCache(tmp_path, "engine")
    cache.add("recipe", [(part, outcome_of(part)) for part in PARTS])
    (path,) = files(tmp_path)
    whole = path.read_bytes()
    truth = {part.hash: outcome_of(part) for part in PARTS}
    survivors = set()
    for _ in range(300):
        damaged = bytearray(whole)
        if numbers.random() < 0.5:
            del damaged[numbers.randrange(len(damaged)) :]
        else:
            for _ in range(numbers.randrange(1, 4)):
                damaged[numbers.randrange(len(damaged))] = numbers.randrange(256)
        path.write_bytes(damaged)
        found = cache.known("recipe", PARTS)
        assert all(repr(found[key]) == repr(truth[key]) for key in found)
        survivors.add(len(found))
        # What is written after a torn line is whole.
        cache.add("recipe", [(PARTS[0], outcome_of(PARTS[0]))])
        assert PARTS[0].hash in cache.known("recipe", PARTS)
    assert survivors >= {0, 1, 2}


def test_a_file_under_another_name_is_not_believed(tmp_path: Path) -> None:
    cache = ScoreCache(tmp_path, "engine")
    cache.add("recipe", [(PARTS[0], outcome_of(PARTS[0]))])
    (path,) = files(tmp_path)
    cache.add("other", [(PARTS[1], outcome_of(PARTS[1]))])
    (other,) = set(files(tmp_path)) - {path}
    other.write_bytes(path.read_bytes())
    assert cache.known("other", PARTS) == {}


def test_scores_that_do_not_fit_the_part_are_ignored(tmp_path: Path) -> None:
    cache = ScoreCache(tmp_path, "engine")
    infinite = PartOutcome(
        tuple(replace(score, raw=float("inf")) for score in outcome_of(PARTS[0]).scores), ""
    )
    short = PartOutcome(outcome_of(PARTS[1]).scores[1:], "")
    cache.add("recipe", [(PARTS[0], infinite), (PARTS[1], short)])
    assert cache.known("recipe", PARTS) == {}


def _write(folder: Path, number: int, times: int) -> None:
    cache = ScoreCache(folder, "engine")
    for i in range(times):
        parts = [Part("a", tuple(f"{number}-{i}-{j}" for j in range(6)), "p")]
        cache.add("recipe", [(part, outcome_of(part)) for part in parts])


def test_many_writers_lose_nothing(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    writers = [fork.Process(target=_write, args=(tmp_path, number, 40)) for number in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    parts = [
        Part("a", tuple(f"{number}-{i}-{j}" for j in range(6)), "p") for number in range(4) for i in range(40)
    ]
    assert len(ScoreCache(tmp_path, "engine").known("recipe", parts)) == 160


def test_a_writer_that_is_killed_spoils_nothing(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    for _ in range(5):
        writer = fork.Process(target=_write, args=(tmp_path, 0, 10**6))
        writer.start()
        time.sleep(0.05)
        writer.kill()
        writer.join()
    parts = [Part("a", tuple(f"0-{i}-{j}" for j in range(6)), "p") for i in range(50)]
    found = ScoreCache(tmp_path, "engine").known("recipe", parts)
    assert found
    assert all(repr(found[part.hash]) == repr(outcome_of(part)) for part in parts if part.hash in found)


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Path.open

    def open_(self: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        if "a" in mode:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(self, mode, *args, **options)

    monkeypatch.setattr(Path, "open", open_)


def test_a_full_disk_is_told_once_and_stops_nothing(tmp_path: Path, full_disk: None) -> None:
    said: list[str] = []
    cache = ScoreCache(tmp_path, "engine", said.append)
    for _ in range(3):
        cache.add("recipe", [(PARTS[0], outcome_of(PARTS[0]))])
    assert cache.known("recipe", PARTS) == {}
    (sentence,) = said
    assert sentence.startswith(f"scores are not kept for other runs: {tmp_path}")
    assert "No space left on device; the search goes on (cache.scores names another folder" in sentence


def test_a_folder_that_cannot_be_is_told_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said: list[str] = []
    cache = ScoreCache(tmp_path / "file", "engine", said.append)
    for _ in range(2):
        assert cache.known("recipe", PARTS) == {}
        cache.add("recipe", [(PARTS[0], outcome_of(PARTS[0]))])
    assert len(said) == 1


def test_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    cache = ScoreCache(tmp_path, "engine", limit_files=10)
    for number in range(10):
        cache.add(f"recipe-{number}", [(PARTS[0], outcome_of(PARTS[0]))])
    for age, path in enumerate(sorted(files(tmp_path), key=lambda path: path.stat().st_mtime_ns)):
        os.utime(path, ns=(0, 10**9 * (age + 1)))
    used = ScoreCache(tmp_path, "engine", limit_files=10)
    assert used.known("recipe-0", PARTS)
    assert len(files(tmp_path)) == 10
    cache.add("recipe-10", [(PARTS[0], outcome_of(PARTS[0]))])
    ScoreCache(tmp_path, "engine", limit_files=10)
    kept = [n for n in range(11) if ScoreCache(tmp_path, "engine").known(f"recipe-{n}", PARTS)]
    assert kept == [0, 4, 5, 6, 7, 8, 9, 10]


def test_the_folder_is_bounded_while_a_run_goes_on(tmp_path: Path) -> None:
    limit = 64 << 12
    cache = ScoreCache(tmp_path, "engine", limit_bytes=limit)
    for number in range(300):
        cache.add(f"recipe-{number}", [(PARTS[0], outcome_of(PARTS[0]))])
        assert sum(4096 for _ in files(tmp_path)) <= limit * 1.2
    assert cache.known("recipe-299", PARTS)


def test_where_scores_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVOMERGE_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    assert scores_folder(True) == tmp_path / "scores"
    assert scores_folder(False) is None
    assert scores_folder("/elsewhere") == Path("/elsewhere")
    off = ScoreCache(None, "engine")
    off.add("recipe", [(PARTS[0], outcome_of(PARTS[0]))])
    assert off.known("recipe", PARTS) == {}
    assert files(tmp_path) == []
