"""Arithmetic on a device: the code that a GPU runs, tried on the CPU, and on a GPU where there is one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from evomerge.cli import main
from evomerge.merging import Materializer, merge, open_parents
from evomerge.merging.streams import DeviceTensor, Residents
from evomerge.methods import MaskKey, TensorMerge, all_methods
from evomerge.methods.native import loader
from tests.merging.helpers import make_recipe, read

CPU = torch.device("cpu")
KEY = MaskKey(seed=3, experts=("a" * 64, "b" * 64), tensor="w")
VALUES = {"slerp": {"t": 0.3}}
MOVED = [name for name, method in all_methods().items() if method.on_device]
TIES = {
    "method": "ties",
    "base": "base",
    "inputs": ["a", "b", "c"],
    "parameters": {"weight": 0.6, "density": 0.4},
}


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv(loader.SWITCH, "0")
    loader.library.cache_clear()
    yield
    monkeypatch.undo()
    loader.library.cache_clear()


@pytest.mark.parametrize("name", MOVED)
def test_operands_that_are_copied_slice_by_slice_give_the_same_bits(
    name: str, no_kernels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = all_methods()[name]
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(3000, generator=generator)
    experts = [base + 0.1 * torch.randn(3000, generator=generator) for _ in range(2)]
    values: dict[str, Any] = {
        p.name: 0.4 for p in method.parameters_in("paper") if p.default_in("paper") is None
    } | VALUES.get(name, {})
    results = []
    for moved in (False, True):
        origin, *inputs = [DeviceTensor(x, CPU) if moved else x for x in (base, *experts)]
        origin = None if method.base == "unused" else origin
        merge = TensorMerge(name, origin, inputs, values, masks=KEY)  # type: ignore[arg-type]
        out = torch.empty(3000)
        with monkeypatch.context() as patch:
            if not method.random:
                # Random methods have a way of their own to mask what is on a device.
                patch.setattr(torch.Tensor, "numpy", None)
            assert merge.write(0, 3000, out)
        results.append(out)
    assert torch.equal(*results)


def test_parents_stay_on_the_device_while_they_fit(family: Any) -> None:
    checkpoint = open_parents(make_recipe(family, merge=TIES))["a"]
    names = list(checkpoint.tensors)[:3]
    sizes = [checkpoint.tensors[name].nbytes for name in names]
    residents = Residents(CPU, limit=sizes[0] + sizes[2])
    kinds = []
    for name in (*names, *names):
        held = residents.get(checkpoint, name, checkpoint.tensor(name).view(-1))
        kinds.append(isinstance(held, torch.Tensor))
        assert torch.equal(held[0:10], checkpoint.tensor(name).view(-1)[:10])
    assert kinds == [True, False, True] * 2
    assert residents.nbytes <= sizes[0] + sizes[2]


def test_a_device_that_is_not_there_is_one_sentence(family: Any, tmp_path: Any, capsys: Any) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(make_recipe(family, merge=TIES).to_yaml())
    assert main(["merge", str(recipe), str(tmp_path / "out"), "--device", "cuda:99"]) == 2
    assert "--device cuda:99: cannot be used here" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", MOVED)
def test_a_gpu_gives_what_the_cpu_gives(method: str, family: Any, tmp_path: Any) -> None:
    body = {**TIES, "method": method, "parameters": VALUES.get(method, {"weight": 0.5})}
    if all_methods()[method].base == "unused":
        body["base"] = None
    if method == "slerp":
        body["inputs"] = ["a", "b"]
    recipe = make_recipe(family, merge={k: v for k, v in body.items() if v is not None})
    ours = read(merge(recipe, tmp_path / "cpu"))
    theirs = read(merge(recipe, tmp_path / "gpu", device="cuda"))
    live = Materializer(open_parents(recipe), device="cuda", merge_on=torch.device("cuda"))
    weights = live.materialize(recipe).state_dict()
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(weights[name].cpu(), tensor, rtol=1e-6, atol=1e-7)
