"""A worker on the CPU has as many threads as its cores, and so has an evaluation by the same config."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import evomerge
from evomerge.config import load_config
from evomerge.engines.hf import HFEngine
from evomerge.merging import Materializer
from evomerge.searching.setup import set_up
from evomerge.workers.local import LocalExecutor
from tests.searching.records import canonical
from tests.tasks import make_config, make_tasks


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def config(family: dict[str, Path], tmp_path: Path) -> Path:
    return make_config(tmp_path, family, make_tasks(tmp_path / "tasks"), budget={"candidates": 4})


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """The numbers of threads with which requests are answered."""
    seen: set[int] = set()
    answer = HFEngine.loglikelihood

    def watched(engine: HFEngine, requests: object) -> object:
        seen.add(torch.get_num_threads())
        return answer(engine, requests)  # type: ignore[arg-type]

    monkeypatch.setattr(HFEngine, "loglikelihood", watched)
    return seen


@pytest.mark.parametrize(("cpus", "threads"), [(0.5, 1), (1, 1), (2, 2), (3.7, 3)])
def test_requests_are_answered_by_as_many_threads_as_cores(
    cpus: float, threads: int, config: Path, seen: set[int]
) -> None:
    setup = set_up(load_config(config, [f"workers.cpus={cpus}"]), file=config)
    executor = LocalExecutor(setup.worker_spec(config))
    fingerprint = executor.start(setup.baselines["base"])
    executor.preview(setup.baselines["base"], setup.suite.items("search")[:2])
    executor.close()
    assert seen == {threads}
    assert (f"/{threads}-threads" in fingerprint) == (threads > 1)


def test_the_same_config_gives_the_same_run_and_its_scores_serve_an_evaluation(
    config: Path, family: dict[str, Path], tmp_path: Path, seen: set[int]
) -> None:
    overrides = ["workers.cpus=2", f"cache.scores={tmp_path / 'scores'}"]
    one = evomerge.search(config, run=tmp_path / "one", overrides=overrides)
    two = evomerge.search(config, run=tmp_path / "two", overrides=["workers.cpus=2"])
    assert canonical(one.path) == canonical(two.path)
    assert seen == {2}
    seen.clear()
    torch.set_num_threads(1)
    found = evomerge.evaluate(family["a"], config, overrides=overrides)
    assert not seen
    assert found.fingerprint == one.results["engine"]
    evomerge.evaluate(family["a"], config, overrides=["workers.cpus=2"])
    assert seen == {2}
    assert torch.get_num_threads() == 1


def test_merged_bits_do_not_depend_on_the_threads(config: Path) -> None:
    setup = set_up(load_config(config), file=config)
    states = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        model = Materializer(setup.checkpoints).materialize(setup.baselines["initial"])
        states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        assert torch.get_num_threads() == threads
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
