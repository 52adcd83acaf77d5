"""An engine that crashes or runs out of memory is infrastructure: it is replaced, and never becomes fitness."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch

import evomerge.engines
import evomerge.workers.ray_executor
from evomerge.engines.hf import HFEngine
from evomerge.errors import CandidateFailed, EngineLost, InfrastructureError
from evomerge.losses import loss
from evomerge.scoring import evaluate
from evomerge.searching.run import Run, resume, search
from evomerge.searching.rundir import open_run
from evomerge.searching.scheduler import MAX_ATTEMPTS
from evomerge.task_scoring import evaluate_tasks
from tests.searching.records import canonical
from tests.tasks import make_config, make_tasks
from tests.workers.faulty import PLAN, FaultyHost, FaultyWorker, open_faulty, plan_losses

RAY = {"type": "ray", "count": 2, "cpus": 0.4}
PREVIEWS = 8
"""Calls that the preview of base and initial makes: two tasks with two items each."""


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (EngineLost("the engine core died\nwith a trace"), "the engine core died"),
        (MemoryError(), "out of memory: MemoryError"),
        (torch.OutOfMemoryError("CUDA out of memory."), "out of memory: CUDA out of memory."),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: x"),
            "out of memory: DefaultCPUAllocator: ",
        ),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"),
            "out of memory: CUDA error: CUBLAS",
        ),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "out of memory: [Errno 12] Cannot allocate memory"),
        (
            RuntimeError("CUDA error: device-side assert triggered"),
            "the device failed: CUDA error: device-side",
        ),
        (torch.AcceleratorError("an illegal access"), "the device failed: an illegal access"),
    ],
)
def test_engines_that_are_gone_are_known_by_their_errors(error: Exception, reason: str) -> None:
    assert (loss(error) or "").startswith(reason)


@pytest.mark.parametrize(
    "error",
    [
        CandidateFailed("a logit is not finite"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        FileNotFoundError(errno.ENOENT, "x"),
        ValueError("out of memory"),
    ],
)
def test_mistakes_are_not_losses(error: Exception) -> None:
    assert loss(error) is None


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tasks(tmp_path_factory.mktemp("losses") / "tasks")


@pytest.fixture(scope="module")
def undisturbed(family: dict[str, Path], tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("undisturbed")
    return search(make_config(folder, family, tasks), run=folder / "run")


@pytest.fixture
def losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "losses"
    folder.mkdir()
    monkeypatch.setenv(PLAN, str(folder))
    monkeypatch.setattr(evomerge.engines, "open_host", open_faulty)
    monkeypatch.setattr(evomerge.workers.ray_executor, "Worker", FaultyWorker)
    monkeypatch.setattr(FaultyHost, "opened", 0)
    monkeypatch.setattr(FaultyHost, "closed", 0)
    return folder


def attempts(run: Path) -> list[str]:
    store = open_run(run)
    try:
        return [reason for (reason,) in store.query("SELECT reason FROM attempts ORDER BY id")[1]]
    finally:
        store.close()


def test_a_local_worker_recovers_in_its_process(
    family: dict[str, Path], tasks: Path, tmp_path: Path, undisturbed: Run, losses: Path
) -> None:
    kinds = ["crash", "host memory", "device memory", "python"]
    plan_losses(losses, {PREVIEWS + 1 + 3 * i: kind for i, kind in enumerate(kinds)})
    run = search(make_config(tmp_path, family, tasks), run=tmp_path / "run")
    assert canonical(run.path) == canonical(undisturbed.path)
    reasons = attempts(run.path)
    assert reasons[0] == "the engine process died"
    assert [reason.split(":")[0] for reason in reasons[1:]] == ["out of memory"] * 3
    assert (FaultyHost.opened, FaultyHost.closed) == (5, 5)


def test_the_preview_recovers_too(
    family: dict[str, Path], tasks: Path, tmp_path: Path, undisturbed: Run, losses: Path
) -> None:
    plan_losses(losses, {1: "crash", PREVIEWS // 2 + 3: "device memory"})
    run = search(make_config(tmp_path, family, tasks), run=tmp_path / "run")
    assert canonical(run.path) == canonical(undisturbed.path)


def test_an_engine_that_is_lost_each_time_stops_the_run_resumable(
    family: dict[str, Path], tasks: Path, tmp_path: Path, undisturbed: Run, losses: Path
) -> None:
    plan_losses(losses, dict.fromkeys(range(PREVIEWS + 2, 200), "host memory"))
    with pytest.raises(InfrastructureError, match=f"a request was lost {MAX_ATTEMPTS} times") as caught:
        search(make_config(tmp_path, family, tasks), run=tmp_path / "run")
    assert caught.value.exit_code == 3
    assert "evomerge resume" in str(caught.value)
    for plan in losses.glob("loss-*"):
        plan.unlink()
    assert canonical(resume(tmp_path / "run").path) == canonical(undisturbed.path)


def test_an_engine_that_does_not_start_is_told_as_such(
    family: dict[str, Path], tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 40 GiB")

    monkeypatch.setattr(evomerge.engines, "open_host", too_large)
    with pytest.raises(
        InfrastructureError, match=r"worker local cannot start its engine: out of memory: CUDA"
    ):
        search(make_config(tmp_path, family, tasks), run=tmp_path / "run")


def test_an_evaluation_whose_engine_is_lost_says_so(
    family: dict[str, Path], tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(HFEngine, "loglikelihood", lose)
    with pytest.raises(
        InfrastructureError, match=r"a: the engine was lost: out of memory: CUDA out of memory"
    ):
        evaluate(family["a"], make_config(tmp_path, family, tasks))
    with pytest.raises(InfrastructureError, match=r"a: the engine was lost: .*; try again, with a smaller"):
        evaluate_tasks(family["a"], ["tiny_a"], include=[str(tasks)])


def test_ray_workers_recover_and_are_replaced_if_that_does_not_help(
    family: dict[str, Path], tasks: Path, tmp_path: Path, undisturbed: Run, losses: Path
) -> None:
    plan_losses(
        losses, dict.fromkeys([PREVIEWS + 1, PREVIEWS + 6, PREVIEWS + 7, PREVIEWS + 8], "device memory")
    )
    run = search(make_config(tmp_path, family, tasks, workers=RAY), run=tmp_path / "run")
    assert canonical(run.path) == canonical(undisturbed.path)
    assert len(attempts(run.path)) == 4
