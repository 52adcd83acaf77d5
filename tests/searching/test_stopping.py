"""Runs that are stopped at awkward moments: what they say, what they keep, and how they go on."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

import evomerge
from evomerge.errors import InfrastructureError, Stopped, UserError
from evomerge.searching import selection
from evomerge.searching.progress import Silent, Status
from evomerge.searching.rundir import open_run, read_status
from evomerge.searching.store import Store
from evomerge.workers.local import LocalExecutor
from tests.searching.test_kill import in_child
from tests.tasks import make_config


class AtCandidates(Silent):
    """Does something once so many candidates are told."""

    def __init__(self, candidates: int, action: object) -> None:
        self._candidates, self._action = candidates, action

    def show(self, status: Status) -> None:
        assert callable(self._action)
        if status.candidates >= self._candidates:
            self._action()


def short_list(run: evomerge.Run, round_: int) -> list[tuple[str, str, int | None]]:
    store = open_run(run.path)
    try:
        return store.short_list(round_)
    finally:
        store.close()


@pytest.mark.usefixtures("heard")
@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_signals_while_it_stops_do_not_disturb_the_stopping(
    first: signal.Signals,
    family: dict[str, Path],
    tasks: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    close = LocalExecutor.close
    closed = []

    def close_under_fire(executor: LocalExecutor) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        closed.append(close(executor))

    monkeypatch.setattr(LocalExecutor, "close", close_under_fire)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    stop = AtCandidates(4, lambda: os.kill(os.getpid(), first))
    with pytest.raises(Stopped, match=f"evomerge resume {tmp_path / 'run'}"):
        evomerge.search(make_config(tmp_path, family, tasks), run=tmp_path / "run", display=stop)
    assert len(closed) == 1
    assert read_status(tmp_path / "run")["state"] == "stopped"
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    open_run(tmp_path / "run").close()


def test_a_run_stopped_in_its_selection_and_prolonged_selects_among_all_candidates(
    family: dict[str, Path], tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(tmp_path, family, tasks)
    direct = evomerge.search(config, run=tmp_path / "direct")

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(selection, "choose", interrupted)
        with pytest.raises(Stopped):
            evomerge.search(config, run=tmp_path / "run", overrides=["budget.candidates=4"])
    run = evomerge.resume(tmp_path / "run", budget={"candidates": 12})
    assert short_list(run, 1) == short_list(direct, 0) != short_list(run, 0)
    assert run.results["winner"]["hash"] == direct.results["winner"]["hash"]
    assert run.results["test_openings"] == 1


def test_time_that_a_killed_driver_spent_counts(family: dict[str, Path], tasks: Path, tmp_path: Path) -> None:
    config = make_config(tmp_path, family, tasks)
    dying = AtCandidates(8, lambda: os._exit(9))
    in_child(lambda: evomerge.search(config, run=tmp_path / "run", display=dying))
    assert read_status(tmp_path / "run")["state"] == "interrupted"
    store = open_run(tmp_path / "run")
    assert store.meta("wall_seconds", 0.0) > 0.01
    store.close()


def test_a_failing_disk_stops_the_run_with_the_way_on(
    family: dict[str, Path], tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(tmp_path, family, tasks)
    tell = Store.tell

    def full(store: Store, generation: int, told: object) -> None:
        if generation == 1:
            raise InfrastructureError("run.db: cannot be written: database or disk is full")
        tell(store, generation, told)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(Store, "tell", full)
        with pytest.raises(InfrastructureError, match=r"disk is full; .* 'evomerge resume .*run'$") as caught:
            evomerge.search(config, run=tmp_path / "run")
    assert caught.value.exit_code == 3
    assert read_status(tmp_path / "run")["state"] == "failed"
    assert evomerge.resume(tmp_path / "run").results["candidates"] == 12


@pytest.mark.parametrize(
    "override", ["engine.dtype=bfloat16", "output.tokenizer={a}", "engine.max_length=99"]
)
def test_continue_takes_what_the_start_decided_for_the_config_that_it_was(
    override: str, family: dict[str, Path], tasks: Path, tmp_path: Path
) -> None:
    config = make_config(tmp_path, family, tasks, budget={"candidates": 4})
    given = [override.format(**family)]
    first = evomerge.search(config, run=tmp_path / "run", overrides=given)
    again = evomerge.search(config, run=tmp_path / "run", overrides=given, continue_=True)
    assert again.results["winner"] == first.results["winner"]
    with pytest.raises(UserError, match=r"another config .* \(other: (engine|output)\)"):
        evomerge.search(config, run=tmp_path / "run", continue_=True)


def test_a_budget_that_is_refused_is_not_kept(family: dict[str, Path], tasks: Path, tmp_path: Path) -> None:
    config = make_config(tmp_path, family, tasks, budget={"candidates": 4})
    run = evomerge.search(config, run=tmp_path / "run")
    with pytest.raises(UserError, match="less than one generation"):
        evomerge.resume(run.path, budget={"candidates": 1})
    assert evomerge.resume(run.path).results["candidates"] == 4


def test_continue_with_other_overrides_is_refused_and_with_the_same_goes_on(
    family: dict[str, Path], tasks: Path, tmp_path: Path
) -> None:
    config = make_config(tmp_path, family, tasks)
    first = evomerge.search(config, run=tmp_path / "run", overrides=["budget.candidates=4"])
    for overrides in (["budget.candidates=4", "seed=9"], []):
        with pytest.raises(UserError, match="another config"):
            evomerge.search(config, run=first.path, overrides=overrides, continue_=True)
    again = evomerge.search(config, run=first.path, overrides=["budget.candidates=4"], continue_=True)
    assert again.results["candidates"] == 4
