"""Every architecture: merged to disk, loaded with transformers, run; and the same in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from evomerge.checkpoints import open_checkpoint
from evomerge.errors import CheckpointError
from evomerge.merging import Materializer, live_model, merge, open_parents, plan_merge
from evomerge.merging.binding import bind
from tests.merging.helpers import digests, make_recipe, read
from tests.models import ARCHITECTURES, VOCAB, make_model

IDS = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))

MERGES = {
    "linear": {"method": "linear", "inputs": ["a", "b"], "parameters": {"weight": {"a": 0.3, "b": 0.5}}},
    "slerp": {"method": "slerp", "inputs": ["a", "b"], "parameters": {"t": 0.3}},
    "dare_ties": {
        "method": "dare_ties",
        "base": "base",
        "inputs": ["a", "b"],
        "parameters": {"density": 0.6},
    },
}


def run(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


@pytest.fixture(scope="module", params=ARCHITECTURES)
def small_family(request, tmp_path_factory) -> dict[str, Path]:
    """A base and two experts of each architecture, two layers, in bfloat16: do not write into them."""
    folder = tmp_path_factory.mktemp(request.param)
    options = {"kind": request.param, "layers": 2, "dtype": torch.bfloat16, "tokenizer": False}
    base = make_model(folder / "base", seed=1, **options)
    return {"base": base} | {
        n: make_model(folder / n, seed=s, base=base, **options) for s, n in enumerate("ab")
    }


@pytest.fixture(scope="module")
def parent_logits(small_family) -> list[torch.Tensor]:
    return [run(AutoModelForCausalLM.from_pretrained(path)) for path in small_family.values()]


@pytest.mark.parametrize("method", MERGES)
def test_what_is_written_loads_and_runs_as_what_is_live(small_family, parent_logits, tmp_path, method):
    recipe = make_recipe(small_family, merge=MERGES[method], seed=5)
    checkpoints = open_parents(recipe)
    out = merge(recipe, tmp_path / "out")
    loaded, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    live = Materializer(checkpoints).materialize(recipe)
    assert type(live) is type(loaded)
    bound = bind(live, plan_merge(recipe, checkpoints))
    assert digests({name: tensor.data for name, tensor in bound.items()}) == digests(read(out))
    logits = run(loaded)
    assert torch.equal(run(live), logits)
    assert logits.isfinite().all()
    assert not any(torch.equal(logits, parent) for parent in parent_logits)


@pytest.mark.parametrize(
    "changed", [{"num_local_experts": 2}, {"num_local_experts": 4}, {"intermediate_size": 48}]
)
def test_experts_that_do_not_fit_the_live_model_are_named(tmp_path, changed):
    model = make_model(tmp_path / "m", kind="mixtral", layers=1, tokenizer=False)
    recipe = make_recipe({"m": model}, path=[{"model": "m", "layer": 0}])
    plan = plan_merge(recipe, open_parents(recipe))
    with pytest.raises(
        CheckpointError, match=r"experts\.0\.w[13]\.weight' has shape|which its \d tensors \("
    ):
        bind(live_model({**plan.config, **changed}, plan.dtype), plan)


def test_the_output_has_the_tensors_that_transformers_writes(small_family, tmp_path):
    out = merge(make_recipe(small_family, merge=MERGES["linear"]), tmp_path / "out")
    written = {name: (tensor.shape, tensor.dtype) for name, tensor in read(out).items()}
    assert written == {name: (t.shape, t.dtype) for name, t in read(small_family["base"]).items()}
    assert open_checkpoint(out).num_layers == 2
