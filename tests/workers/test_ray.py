"""The Ray executor: the same scores as in this process, lost workers replaced, nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import evomerge
from evomerge.config import load_config
from evomerge.errors import InfrastructureError, UserError
from evomerge.searching.run import executor_for
from evomerge.searching.rundir import open_run, read_status
from evomerge.searching.setup import Setup, set_up
from evomerge.workers import ray_executor
from evomerge.workers.board import Board
from evomerge.workers.executor import Executor, times
from evomerge.workers.ray_executor import RayExecutor
from evomerge.workers.work import Result, Work, WorkerLost
from tests.tasks import make_config, make_tasks

RAY = {"type": "ray", "count": 2, "cpus": 0.4}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, family: dict[str, Path]) -> Path:
    folder = tmp_path_factory.mktemp("ray")
    return make_config(folder, family, make_tasks(folder / "tasks"), workers=RAY)


@pytest.fixture(scope="module")
def setup(config: Path) -> Setup:
    return set_up(load_config(config), file=config)


@pytest.fixture(scope="module")
def executor(setup: Setup) -> Iterator[Executor]:
    executor = executor_for(setup, "config.yaml")
    try:
        executor.start(setup.baselines["base"])
        yield executor
    finally:
        executor.close()


def gather(
    executor: Executor,
    works: list[Work],
    seconds: float = 120,
    *,
    meanwhile: Callable[[], None] = lambda: None,
) -> tuple[dict[str, Result], list[WorkerLost]]:
    """Submit requests, call `meanwhile`, resubmit what is lost; return the results and the losses."""
    waiting = {work.id: work for work in works}
    results: dict[str, Result] = {}
    lost = []
    for work in works:
        executor.submit(work)
    meanwhile()
    end = time.monotonic() + seconds
    while len(results) < len(works) and time.monotonic() < end:
        event = executor.next_event(0.2)
        if isinstance(event, Result):
            results[event.work] = event
        elif isinstance(event, WorkerLost):
            lost.append(event)
            executor.submit(waiting[event.work])
    return results, lost


def works_of(setup: Setup, names: tuple[str, ...], tag: str) -> list[Work]:
    return [
        Work(id=f"{tag}-{name}-{block.index}", recipes=(setup.baselines[name],), block=block)
        for name in names
        for block in setup.blocks["search"]
    ]


def test_a_cluster_that_is_not_there_is_told_at_once(config: Path) -> None:
    setup = set_up(load_config(config, ["workers.address=127.0.0.1:9"]), file=config)
    started = time.monotonic()
    with pytest.raises(InfrastructureError, match=r"workers.address 127.0.0.1:9"):
        executor_for(setup, config).start(setup.baselines["base"])
    assert time.monotonic() - started < 15


def test_shares_of_a_machine_are_counted_without_rounding_errors() -> None:
    assert [times(0.2, 2), times(0.1, 1), times(0.3, 1), times(1, 8), times(2, 1)] == [10, 10, 3, 8, 0]


def test_a_replacement_that_gets_no_place_ends_the_wait(
    executor: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    (one, other) = executor._slots
    monkeypatch.setattr(ray_executor, "START_TIMEOUT", 5.0)
    monkeypatch.setattr(one, "starting", True)
    monkeypatch.setattr(one, "since", one.since - 60)
    monkeypatch.setattr(other, "since", other.since - 60)
    # The other worker may still do it all.
    executor._check_room()
    assert executor.workers == 1
    monkeypatch.setattr(other, "starting", True)
    with pytest.raises(
        InfrastructureError, match=r"worker-. did not start in 5 s; it needs 0.4 CPUs and 0 GPUs"
    ):
        executor._check_room()


def test_replacements_that_are_lost_while_they_start_are_replaced_a_few_times(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    executor = RayExecutor(setup.worker_spec("config.yaml"), setup.config.workers)

    def lost(task: Any) -> None:
        raise ray.exceptions.RayError("gone")

    monkeypatch.setattr(ray, "get", lost)
    monkeypatch.setattr(
        executor, "_spawn", lambda: ray_executor._Slot("worker-9", actor=None, task="starting")
    )
    executor._slots = [ray_executor._Slot("worker-1", actor=None, task="starting")]
    for _ in range(3):
        assert executor._collect(executor._slots[0]) is None
        assert executor._slots[0].name == "worker-9"
    with pytest.raises(InfrastructureError, match=r"do not start, 4 of them in a row"):
        executor._collect(executor._slots[0])


class Asked(Exception):
    """Ray was asked to start."""


@pytest.mark.parametrize(
    ("count", "cpus", "cores"), [(5, 0.5, 3), (3, 0.4, 2), (2, 0.4, 1), (1, 0.5, 1), (2, 3, 6)]
)
def test_the_cluster_has_room_for_all_workers(
    count: int, cpus: float, cores: int, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    def init(**options: Any) -> None:
        assert options["num_cpus"] == cores
        raise Asked

    setup = set_up(load_config(config, [f"workers.count={count}", f"workers.cpus={cpus}"]), file=config)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(Asked):
        executor_for(setup, config).start(setup.baselines["base"])


@pytest.mark.parametrize(("count", "found"), [("auto", 0), (2, 1)])
def test_gpus_that_are_not_there_are_told_at_once(
    count: int | str, found: int, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    overrides = ["engine.device=cuda", "engine.batch_tokens=512", f"workers.count={count}"]
    setup = set_up(load_config(config, overrides), file=config)
    executor = RayExecutor(setup.worker_spec(config), setup.config.workers)
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0, "GPU": float(found)})
    with pytest.raises(
        UserError, match=rf"workers: . with 1 GPUs each, but Ray finds {found} on this machine"
    ):
        executor.start(setup.baselines["base"])


def test_ray_and_local_workers_score_alike(executor: Executor, setup: Setup) -> None:
    from evomerge.workers.local import LocalExecutor

    local = LocalExecutor(setup.worker_spec("config.yaml"))
    works = works_of(setup, ("base", "a", "initial"), "alike")
    local_print = local.start(setup.baselines["base"])
    here, _ = gather(local, works)
    there, lost = gather(executor, works)
    assert not lost
    assert {r.fingerprint for r in there.values()} == {local_print}
    for work in works:
        (ours,), (theirs,) = here[work.id].outcomes, there[work.id].outcomes
        assert ours.parts == theirs.parts
        assert sum(len(part.scores) for part in ours.parts) == len(work.block.items)
    assert len({r.worker for r in there.values()}) == 2


def test_ray_does_not_take_sigterm_from_the_driver(executor: Executor) -> None:
    assert executor.workers == 2
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_killed_worker_is_replaced_and_its_request_reported(executor: Executor, setup: Setup) -> None:
    import ray

    pids = [ray.get(slot.actor.process_id.remote()) for slot in executor._slots]  # type: ignore[attr-defined]
    works = works_of(setup, ("b", "c", "uniform", "initial"), "killed")
    results, lost = gather(executor, works, meanwhile=lambda: os.kill(pids[0], signal.SIGKILL))
    assert len(results) == len(works)
    assert [event.worker for event in lost] == ["worker-0"]
    # The replacement may still be starting.
    assert len(executor._slots) == 2  # type: ignore[attr-defined]


def test_workers_say_how_far_they_are_without_being_asked(executor: Executor) -> None:
    import ray

    del executor  # has the cluster
    board, other = Board("one"), Board("two")
    other.tell("request", 3)
    ray.get(ray.remote(num_cpus=0.1)(lambda: board.tell("request", 11)).remote())
    assert (board.read("request"), other.read("request"), board.read("nobody's")) == (11, 3, 0)
    board.clear()
    assert (board.read("request"), other.read("request")) == (0, 3)


def test_what_they_say_is_passed_on_while_they_work(executor: Executor, setup: Setup) -> None:
    works = works_of(setup, ("a", "uniform"), "progress")
    heard: list[tuple[str, int]] = []
    executor.watch(lambda work, items: heard.append((work, items)))
    board = executor._board  # type: ignore[attr-defined]
    gather(executor, works, meanwhile=lambda: [board.tell(work.id, 5) for work in works])
    executor._listened = 0.0  # type: ignore[attr-defined]
    slot = executor._slots[0]  # type: ignore[attr-defined]
    slot.work = works[0]
    executor._listen()  # type: ignore[attr-defined]
    slot.work = None
    assert (works[0].id, 5) in heard
    assert {work for work, _ in heard} <= {work.id for work in works}


def test_a_worker_that_refuses_its_files_gives_the_users_sentence(
    family: dict[str, Path], tmp_path: Path, executor: Executor
) -> None:
    del executor  # shares the cluster
    tasks = make_tasks(tmp_path / "tasks")
    config = make_config(tmp_path, family, tasks, workers={"type": "ray", "count": 1, "cpus": 0.1})
    setup = set_up(load_config(config), file=config)
    (tasks / "tiny_a.yaml").unlink()
    refusing = executor_for(setup, config)
    with pytest.raises(UserError, match="tiny_a"):
        refusing.start(setup.baselines["base"])
    for slot in refusing._slots:  # type: ignore[attr-defined]
        import ray

        ray.kill(slot.actor)


@pytest.mark.usefixtures("heard")
def test_ctrl_c_saves_says_how_to_resume_and_leaves_no_process(config: Path, tmp_path: Path) -> None:
    mark = uuid.uuid4().hex
    run = tmp_path / "run"
    command = [sys.executable, "-m", "evomerge", "search", str(config), "--run", str(run)]
    driver = subprocess.Popen(
        [*command, "--set", "budget.candidates=4000"],
        env={**os.environ, "EVOMERGE_TEST_MARK": mark},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        _wait_until(lambda: run.exists() and read_status(run).get("candidates", 0) >= 4)
        driver.send_signal(signal.SIGINT)
        _, said = driver.communicate(timeout=60)
    finally:
        driver.kill()
    assert driver.returncode == 75
    assert f"evomerge resume {run}" in said.splitlines()[-1]
    _wait_until(lambda: not _marked(mark), seconds=20)
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "stopped"
    store = open_run(run)
    told = store.counts()["candidates"]
    store.close()
    resume = [sys.executable, "-m", "evomerge", "resume", str(run), "--budget", f"candidates={told + 4}"]
    assert subprocess.run(resume, capture_output=True, timeout=120).returncode == 0
    assert evomerge.Run(run).results["candidates"] == told + 4


def _wait_until(condition: object, seconds: float = 120) -> None:
    assert callable(condition)
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.2)


def _marked(mark: str) -> list[str]:
    """Return the processes that were started by a driver with this mark in its environment."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                if mark.encode() in (process / "environ").read_bytes():
                    found.append(process.name)
            except OSError:
                continue
    return found
