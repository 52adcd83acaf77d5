"""A global trim ranks the magnitudes of the whole model, as the authors' code of TIES does."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from evomerge.errors import UserError
from evomerge.merging import Materializer, merge, open_parents
from tests.merging.helpers import make_recipe, read, read64
from tests.methods import oracle


def ties(density, **more):
    parameters = {"weight": {"a": 1.0, "b": 0.5, "c": 1.0}, "density": density, "trim": "global"}
    return {"method": "ties", "base": "base", "inputs": ["a", "b", "c"], "parameters": parameters, **more}


@pytest.mark.parametrize("density", [0.2, {"a": 0.1, "b": 0.5, "c": 1.0}, 0.0])
def test_thresholds_are_those_of_all_weights_together(family, tmp_path, density):
    out = read64(merge(make_recipe(family, merge=ties(density)), tmp_path / "out", threads=2))
    parents = {name: read64(path) for name, path in family.items()}
    names = list(out)
    base = np.concatenate([parents["base"][name].numpy().ravel() for name in names])
    trimmed = []
    for expert in "abc":
        delta = np.concatenate([parents[expert][name].numpy().ravel() for name in names]) - base
        trimmed.append(oracle.trim(delta, density[expert] if isinstance(density, dict) else density))
    place = 0
    for name in names:
        n = parents["base"][name].numel()
        part = [delta[place : place + n] for delta in trimmed]
        expected = base[place : place + n] + oracle.disjoint_merge(part, [1.0, 0.5, 1.0])
        np.testing.assert_allclose(out[name].numpy().ravel(), expected, rtol=0, atol=1e-6)
        place += n


def test_a_live_model_gets_the_same_weights(family, tmp_path):
    recipe = make_recipe(family, merge=ties(0.3), output={"dtype": "bfloat16"})
    exported = read(merge(recipe, tmp_path / "out"))
    materializer = Materializer(open_parents(recipe))
    materializer.materialize(make_recipe(family, merge=ties(0.9), output={"dtype": "bfloat16"}))
    live = materializer.materialize(recipe).state_dict()
    assert all(torch.equal(live[name], tensor) for name, tensor in exported.items())


def test_densities_that_differ_between_layers_are_refused(family, tmp_path):
    rules = [{"layers": [1], "parameters": {"density": 0.9}}]
    with pytest.raises(UserError, match=r"trim: global ranks all tensors together, but density differs"):
        merge(make_recipe(family, merge=ties(0.2, rules=rules)), tmp_path / "out")
    assert not (tmp_path / "out").exists()
