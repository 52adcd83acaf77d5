"""Merged tensors one after another: the bytes of every other sink, and nothing left behind."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest
import torch

from evomerge.errors import CandidateFailed
from evomerge.merging import HashSink, execute, open_parents, plan_merge
from evomerge.merging.outflow import Outflow
from tests.merging.helpers import digests, make_recipe, read, rewrite

TIES = {
    "method": "ties",
    "base": "base",
    "inputs": ["a", "b", "c"],
    "parameters": {"weight": 1.0, "density": 0.4},
}


@pytest.mark.parametrize(("chunk", "threads"), [(1 << 20, 1), (100, 1), (100, 3)])
def test_the_tensors_are_those_of_every_other_sink(family: dict[str, Path], chunk: int, threads: int) -> None:
    recipe = make_recipe(family, merge=TIES)
    checkpoints = open_parents(recipe)
    sink = HashSink()
    execute(plan_merge(recipe, checkpoints), checkpoints, sink)
    outflow = Outflow(checkpoints, chunk=chunk, threads=threads)
    plan = outflow.plan(recipe)
    tensors = dict(outflow.tensors(plan))
    assert digests(tensors) == sink.digests()
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        job.name: job.shape for job in plan.jobs
    }


def test_a_failure_comes_after_the_tensors_before_it(family: dict[str, Path], tmp_path: Path) -> None:
    name = "model.layers.2.mlp.up_proj.weight"
    broken = shutil.copytree(family["a"], tmp_path / "broken")
    rewrite(broken, {name: torch.full_like(read(broken)[name], torch.inf)})
    recipe = make_recipe({**family, "a": broken}, merge=TIES)
    outflow = Outflow(open_parents(recipe))
    plan = outflow.plan(recipe)
    names: list[str] = []

    def take() -> None:
        names.extend(taken for taken, _ in outflow.tensors(plan))

    with pytest.raises(CandidateFailed, match=rf"{name}: the merged weights are not finite"):
        take()
    order = [job.name for job in plan.jobs]
    assert names == order[: order.index(name)]


def test_an_outflow_that_nobody_takes_to_its_end_leaves_no_thread(family: dict[str, Path]) -> None:
    recipe = make_recipe(family, merge=TIES)
    outflow = Outflow(open_parents(recipe))
    before = threading.active_count()
    tensors = outflow.tensors(outflow.plan(recipe))
    next(tensors)
    assert threading.active_count() == before + 1
    tensors.close()
    assert threading.active_count() == before
