from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from evomerge.checkpoints import parse
from evomerge.errors import CheckpointError, UserError
from evomerge.merging import HashSink, execute, open_parents, plan_merge
from tests.merging.helpers import make_recipe, read, read64, rewrite
from tests.models import make_model

LAYER = "model.layers.{}.{}.weight"


class Collect:
    """A sink that keeps whole tensors."""

    def __init__(self, plan):
        self.tensors = {job.name: torch.full(job.shape, torch.nan, dtype=job.dtype) for job in plan.jobs}

    def pieces(self, name, numel, dtype, chunk):
        assert self.tensors[name].dtype == dtype
        for start in range(0, numel, chunk):
            yield start, self.tensors[name].view(-1)[start : start + chunk]


def run(recipe, **options):
    checkpoints = open_parents(recipe)
    plan = plan_merge(recipe, checkpoints)
    sink = Collect(plan)
    execute(plan, checkpoints, sink, **options)
    return sink.tensors


def test_rules_by_layer_role_and_tensor_give_each_tensor_its_own_formula(family):
    recipe = make_recipe(
        family,
        merge={
            "method": "task_arithmetic",
            "base": "base",
            "inputs": ["a", "b"],
            "parameters": {"weight": {"a": 0.5, "b": -0.25}, "lambda": 0.75},
            "rules": [
                {"tensors": "*.k_proj.weight", "method": "linear", "parameters": {"weight": 1.0}},
                {"layers": [0, 1], "roles": ["mlp"], "parameters": {"weight": {"a": 1.5, "b": 0.125}}},
                {"layers": [1, "pre"], "parameters": {"lambda": 2.0}},
                {"roles": ["norm"], "parameters": {"weight": 0.0}},
            ],
        },
    )
    base, a, b = (read64(family[name]) for name in ("base", "a", "b"))

    def arithmetic(name, wa, wb, scale):
        return base[name] + scale * (wa * (a[name] - base[name]) + wb * (b[name] - base[name]))

    expected = {name: arithmetic(name, 0.5, -0.25, 0.75) for name in base}
    for layer in range(4):
        for part in ("gate_proj", "up_proj", "down_proj"):
            name = LAYER.format(layer, f"mlp.{part}")
            if layer == 0:
                expected[name] = arithmetic(name, 1.5, 0.125, 0.75)
            if layer == 1:
                expected[name] = arithmetic(name, 1.5, 0.125, 2.0)
        for part in ("q_proj", "v_proj", "o_proj"):
            if layer == 1:
                name = LAYER.format(1, f"self_attn.{part}")
                expected[name] = arithmetic(name, 0.5, -0.25, 2.0)
        name = LAYER.format(layer, "self_attn.k_proj")
        expected[name] = (a[name] + b[name]) / 2
        for part in ("input_layernorm", "post_attention_layernorm"):
            expected[LAYER.format(layer, part)] = base[LAYER.format(layer, part)]
    expected["model.embed_tokens.weight"] = arithmetic("model.embed_tokens.weight", 0.5, -0.25, 2.0)
    expected["model.norm.weight"] = base["model.norm.weight"]

    merged = run(recipe)

    assert merged.keys() == expected.keys()
    for name, tensor in merged.items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-6, atol=1e-7, msg=name)


def test_jobs_come_in_the_order_of_the_base_file(family):
    recipe = make_recipe(
        family, merge={"method": "linear", "inputs": ["b", "a"], "parameters": {"weight": 1.0}}
    )
    plan = plan_merge(recipe, open_parents(recipe))
    from safetensors import safe_open

    with safe_open(family["b"] / "model.safetensors", "pt") as file:
        assert [job.name for job in plan.jobs] == file.offset_keys()
    assert plan.donor == plan.vocabulary.source.owner == "b"


def test_an_expert_without_a_value_is_named_with_tensor_and_parameter(family):
    recipe = make_recipe(
        family,
        merge={
            "method": "task_arithmetic",
            "base": "base",
            "inputs": ["a", "b"],
            "rules": [
                {"layers": [2], "parameters": {"weight": {"b": 0.5}}},
                {"layers": [0, 1, 3, "pre", "post"], "parameters": {"weight": 1.0}},
            ],
        },
    )
    with pytest.raises(UserError, match=r"'model\.layers\.2\..*' has no value for 'weight' .*'a'"):
        plan_merge(recipe, open_parents(recipe))


def test_a_parameter_set_for_some_layers_only_is_refused_at_the_first_layer_without(family):
    recipe = make_recipe(
        family,
        merge={
            "method": "task_arithmetic",
            "base": "base",
            "inputs": ["a"],
            "rules": [{"layers": [0, 1, 2, "pre", "post"], "parameters": {"weight": 1.0}}],
        },
    )
    with pytest.raises(
        UserError, match=r"'model\.layers\.3\..*' has no value for 'weight' of task_arithmetic"
    ):
        plan_merge(recipe, open_parents(recipe))


def test_a_rule_that_names_some_experts_leaves_the_others_as_they_were(family):
    recipe = make_recipe(
        family,
        merge={
            "method": "ties",
            "base": "base",
            "inputs": ["a", "b", "c"],
            "parameters": {"density": 0.9, "weight": {"a": 0.5, "b": 0.6}},
            "rules": [
                {"layers": [2], "parameters": {"density": {"b": 0.1}, "weight": {"b": 0.7}}},
                {"layers": [2, 3], "parameters": {"density": {"a": 0.3, "b": 0.4}}},
            ],
        },
    )
    jobs = plan_merge(recipe, open_parents(recipe)).jobs
    values = {parse(job.name).position: (job.values["density"], job.values["weight"]) for job in jobs}
    assert values[1] == ((0.9, 0.9, 0.9), (0.5, 0.6, 1.0))
    assert values[2] == ((0.3, 0.1, 0.9), (0.5, 0.7, 1.0))
    assert values[3] == ((0.3, 0.4, 0.9), (0.5, 0.6, 1.0))


def test_an_expert_missing_from_a_value_takes_the_default_if_there_is_one(family):
    recipe = make_recipe(
        family,
        merge={
            "method": "ties",
            "base": "base",
            "inputs": ["a", "b"],
            "parameters": {"density": {"b": 0.75}},
        },
    )
    for job in plan_merge(recipe, open_parents(recipe)).jobs:
        assert job.values["density"] == (0.2, 0.75)


def test_each_tensor_keeps_its_dtype_unless_the_recipe_names_one(tmp_path):
    base = make_model(tmp_path / "base", dtype=torch.bfloat16)
    expert = make_model(tmp_path / "a", seed=5, base=base, dtype=torch.bfloat16)
    norm = "model.layers.0.input_layernorm.weight"
    rewrite(base, {norm: read(base)[norm].float()})
    merge = {"method": "linear", "inputs": ["base", "a"], "parameters": {"weight": 1.0}}
    recipe = make_recipe({"base": base, "a": expert}, merge=merge)
    plan = plan_merge(recipe, open_parents(recipe))
    assert {job.name for job in plan.jobs if job.dtype == torch.float32} == {norm}
    assert plan.dtype == torch.bfloat16
    assert plan.config["dtype"] == "bfloat16"

    half = plan_merge(
        make_recipe({"base": base, "a": expert}, merge=merge, output={"dtype": "float16"}),
        open_parents(recipe),
    )
    assert {job.dtype for job in half.jobs} == {half.dtype} == {torch.float16}
    assert half.config["dtype"] == "float16"


def test_float64_weights_are_scaled_in_float64(family, tmp_path):
    shutil.copytree(family["a"], tmp_path / "double")
    weights = {name: tensor.double() / 3 for name, tensor in read(tmp_path / "double").items()}
    rewrite(tmp_path / "double", weights)
    hop = {"model": "a", "layer": 0, "scale": 1.5}
    merged = run(make_recipe({"a": tmp_path / "double"}, path=[hop]))
    name = LAYER.format(0, "self_attn.o_proj")
    assert torch.equal(merged[name], weights[name] * (1 / 1.5))


def test_results_are_rounded_once_to_the_output_dtype(family):
    merge = {
        "method": "linear",
        "inputs": ["a", "b", "c"],
        "parameters": {"weight": {"a": 1, "b": 2, "c": 5}},
    }
    exact = run(make_recipe(family, merge=merge))
    rounded = run(make_recipe(family, merge=merge, output={"dtype": "bfloat16"}))
    for name, tensor in rounded.items():
        assert torch.equal(tensor, exact[name].to(torch.bfloat16))


@pytest.mark.parametrize("method", ["linear", "ties", "slerp", "dare_ties"])
def test_bytes_depend_neither_on_chunks_threads_nor_streaming(family, method):
    inputs = ["a", "b"] if method == "slerp" else ["a", "b", "c"]
    values = {"t": 0.3} if method == "slerp" else {"weight": 0.7}
    merge = {"method": method, "inputs": inputs, "parameters": values}
    recipe = make_recipe(family, merge={**merge, "base": "base"}, seed=3)
    checkpoints = open_parents(recipe)
    plan = plan_merge(recipe, checkpoints)
    found = []
    for options in ({}, {"chunk": 1000}, {"chunk": 37, "threads": 3}, {"stream": True, "chunk": 4096}):
        sink = HashSink()
        execute(plan, checkpoints, sink, **options)
        found.append(sink.digests())
    assert all(digests == found[0] for digests in found)


def test_masks_follow_the_content_of_the_expert_not_its_name_or_folder(family, tmp_path):
    shutil.copytree(family["a"], tmp_path / "elsewhere")
    merge = {
        "method": "dare_linear",
        "base": "base",
        "inputs": ["a"],
        "parameters": {"weight": 1.0, "density": 0.5},
    }
    named = run(make_recipe(family, merge=merge, seed=1))
    renamed = run(
        make_recipe(
            {"base": family["base"], "x": tmp_path / "elsewhere"}, merge={**merge, "inputs": ["x"]}, seed=1
        )
    )
    reseeded = run(make_recipe(family, merge=merge, seed=2))
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(named[name], renamed[name])
    assert not torch.equal(named[name], reseeded[name])
    kept = named[name] != read(family["base"])[name]
    assert 0.45 < kept.double().mean() < 0.55


def test_progress_counts_every_byte_once(family):
    recipe = make_recipe(
        family, merge={"method": "linear", "inputs": ["a", "b"], "parameters": {"weight": 1.0}}
    )
    calls = []
    merged = run(recipe, progress=lambda done, total: calls.append((done, total)), threads=2)
    total = sum(tensor.nbytes for tensor in merged.values())
    assert [call[0] for call in calls] == sorted(call[0] for call in calls)
    assert calls[-1] == (total, total)


def test_models_of_other_sizes_are_refused(family, tmp_path):
    small = make_model(tmp_path / "small", hidden=16)
    models = {"base": family["base"], "small": small}
    merge = {"method": "linear", "inputs": ["base", "small"], "parameters": {"weight": 1.0}}
    recipe = make_recipe(models, merge=merge)
    with pytest.raises(CheckpointError, match="hidden_size 16"):
        open_parents(recipe)
    from evomerge.checkpoints import open_checkpoint

    checkpoints = {name: open_checkpoint(path, name=name) for name, path in models.items()}
    with pytest.raises(CheckpointError, match=r"has shape \(.*16.*\), the output's is \(.*32.*\)"):
        plan_merge(recipe, checkpoints)


def test_a_model_that_was_not_opened_is_named(family):
    recipe = make_recipe(family, merge={"method": "linear", "inputs": ["a"], "parameters": {"weight": 1.0}})
    checkpoints = open_parents(recipe)
    del checkpoints["a"]
    with pytest.raises(UserError, match=r"models\.a: no checkpoint"):
        plan_merge(recipe, checkpoints)


@pytest.fixture
def damaged(family, tmp_path) -> Path:
    folder = tmp_path / "nan"
    shutil.copytree(family["c"], folder)
    name = "model.layers.2.mlp.up_proj.weight"
    tensor = read(folder)[name]
    tensor[3, 5] = torch.nan
    rewrite(folder, {name: tensor})
    return folder


@pytest.mark.parametrize("threads", [1, 2])
def test_a_parent_with_nan_fails_the_candidate_and_names_the_tensor(family, damaged, threads):
    from evomerge.errors import CandidateFailed

    recipe = make_recipe(
        {**family, "c": damaged},
        merge={"method": "linear", "inputs": ["a", "c"], "parameters": {"weight": 1.0}},
    )
    with pytest.raises(CandidateFailed, match=r"model\.layers\.2\.mlp\.up_proj\.weight.*nan"):
        run(recipe, threads=threads)


def test_a_result_too_large_for_the_output_dtype_fails_the_candidate(family):
    from evomerge.errors import CandidateFailed

    recipe = make_recipe(
        family,
        merge={"method": "task_arithmetic", "base": "base", "inputs": ["a"], "parameters": {"weight": 1e8}},
        output={"dtype": "float16"},
    )
    with pytest.raises(CandidateFailed, match="inf"):
        run(recipe)


def test_large_finite_weights_whose_sum_overflows_pass(tmp_path):
    base = make_model(tmp_path / "base")
    name = "model.layers.0.mlp.up_proj.weight"
    rewrite(base, {name: torch.full_like(read(base)[name], 3e38)})
    recipe = make_recipe({"base": base}, path=[{"model": "base", "layer": 0}])
    assert torch.equal(run(recipe)[name], read(base)[name])


@pytest.mark.parametrize("inputs", [["b"], ["a", "b"], ["b", "a"]])
def test_a_base_that_is_an_input_is_merged_once_and_first(family, inputs):
    merge = {"method": "slerp", "dialect": "mergekit", "base": "a", "inputs": inputs}
    merged = run(make_recipe(family, merge={**merge, "parameters": {"t": 0.3}}))
    expected = run(
        make_recipe(family, merge={"method": "slerp", "inputs": ["a", "b"], "parameters": {"t": 0.3}})
    )
    assert all(torch.equal(tensor, expected[name]) for name, tensor in merged.items())


def test_an_optional_base_decides_between_weights_and_task_vectors(family):
    merge = {"method": "nuslerp", "inputs": ["a", "b"], "parameters": {"weight": {"a": 1.0, "b": 3.0}}}
    base, a, b = (read(family[name]) for name in ("base", "a", "b"))
    name = LAYER.format(1, "mlp.up_proj")
    weights = run(make_recipe(family, merge=merge))[name]
    deltas = run(make_recipe(family, merge={**merge, "base": "base"}))[name]
    torch.testing.assert_close(weights, slerp(a[name], b[name], 0.75), rtol=1e-5, atol=1e-7)
    expected = base[name] + slerp(a[name] - base[name], b[name] - base[name], 0.75)
    torch.testing.assert_close(deltas, expected, rtol=1e-5, atol=1e-7)
    assert not torch.equal(weights, deltas)


def slerp(x, y, t):
    x, y = x.double(), y.double()
    angle = torch.acos((x * y).sum() / x.norm() / y.norm())
    return (((1 - t) * angle).sin() * x + (t * angle).sin() * y).div(angle.sin()).float()
