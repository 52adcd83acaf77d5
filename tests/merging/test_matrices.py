"""Methods of dense linear algebra through a plan: files, threads, streaming, transposed layers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from evomerge.merging import merge, open_parents, plan_merge
from evomerge.merging.execute import NonFinite, execute
from evomerge.merging.sinks import HashSink
from tests.merging.helpers import make_recipe, read, read64, rewrite
from tests.methods import dense_oracle
from tests.models import make_model

METHODS = {
    "tsv_m": {},
    "iso_c": {},
    "iso_cts": {},
    "wudi": {"solver": "closed_form"},
    "knots": {"inner": "dare_ties", "density": 0.6},
}


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("gpt2")
    options = {"kind": "gpt2", "layers": 1, "tokenizer": False, "tied": True}
    base = make_model(folder / "base", seed=1, **options)
    return {"base": base} | {
        n: make_model(folder / n, seed=s, base=base, **options) for s, n in enumerate("ab")
    }


def recipe_of(models: dict[str, Path], method: str):
    parts = {"method": method, "base": "base", "inputs": ["a", "b"], "parameters": METHODS[method]}
    return make_recipe(models, merge=parts)


@pytest.mark.parametrize("method", METHODS)
def test_bytes_do_not_depend_on_threads_chunks_and_streaming(gpt2, method: str) -> None:
    recipe = recipe_of(gpt2, method)
    checkpoints = open_parents(recipe)
    found = []
    for options in ({}, {"threads": 2, "chunk": 1000}, {"stream": True, "chunk": 5000}):
        sink = HashSink()
        execute(plan_merge(recipe, checkpoints), checkpoints, sink, **options)
        found.append(sink.digests())
    assert found[0] == found[1] == found[2]


def test_layers_that_are_kept_transposed_are_merged_on_their_input_side(gpt2, tmp_path: Path) -> None:
    merged = read64(merge(recipe_of(gpt2, "wudi"), tmp_path / "out"))
    base, a, b = (read64(gpt2[name]) for name in ("base", "a", "b"))
    for name, transposed in (("transformer.h.0.mlp.c_fc.weight", True), ("transformer.wte.weight", False)):
        deltas = [(x[name] - base[name]).numpy() for x in (a, b)]
        deltas = [delta.T if transposed else delta for delta in deltas]
        wanted = dense_oracle.wudi_minimum(deltas, (1.0, 1.0))
        actual = (merged[name] - base[name]).numpy()
        np.testing.assert_allclose(actual.T if transposed else actual, wanted, atol=1e-5)


def test_a_weight_that_is_not_finite_is_named(gpt2, tmp_path: Path) -> None:
    broken = make_model(
        tmp_path / "b", seed=7, base=gpt2["base"], kind="gpt2", layers=1, tokenizer=False, tied=True
    )
    name = "transformer.h.0.mlp.c_fc.weight"
    tensor = read(broken)[name]
    tensor[3, 4] = torch.nan
    rewrite(broken, {name: tensor})
    recipe = recipe_of({**gpt2, "b": broken}, "tsv_m")
    checkpoints = open_parents(recipe)
    with pytest.raises(NonFinite, match=r"mlp\.c_fc\.weight: the merged weights are not finite \(nan\)"):
        execute(plan_merge(recipe, checkpoints), checkpoints, HashSink())
