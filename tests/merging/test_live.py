from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from evomerge.errors import CandidateFailed, CheckpointError
from evomerge.merging import LiveSink, Materializer, live_model, merge, open_parents, plan_merge
from evomerge.merging.binding import bind
from evomerge.methods import all_methods
from evomerge.output import Output
from tests.merging.helpers import digests, make_recipe, read, rewrite
from tests.models import VOCAB, make_family, make_model

IDS = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))
SEED = 11


def merge_of(method, **values):
    """A merge with layer-dependent values for any registered method."""
    declared = all_methods()[method]
    count = declared.inputs[1] or 3
    inputs = ["a", "b", "c"][:count]
    given = {}
    for parameter in declared.parameters_in("paper"):
        if parameter.kind != "float" or (parameter.default is not None and parameter.high not in (None, 1.0)):
            continue
        if parameter.scope == "expert":
            given[parameter.name] = {name: 0.3 + 0.2 * k for k, name in enumerate(inputs)}
        else:
            given[parameter.name] = 0.6
    given |= values
    base = None if declared.base == "unused" else "base"
    return {"method": method, "inputs": inputs, "parameters": given, **({"base": base} if base else {})}


def live_digests(model, plan):
    return digests({name: tensor.data for name, tensor in bind(model, plan).items()})


@pytest.fixture(scope="module")
def half_family(tmp_path_factory):
    return make_family(tmp_path_factory.mktemp("half"), dtype=torch.bfloat16, tied=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", [name for name, method in all_methods().items() if not method.needs])
def test_live_weights_are_the_exported_ones(family, half_family, tmp_path, method, dtype):
    models = family if dtype == "float32" else half_family
    recipe = make_recipe(models, merge=merge_of(method), seed=SEED)
    checkpoints = open_parents(recipe)
    model = Materializer(checkpoints).materialize(recipe)
    out = merge(recipe, tmp_path / "out")
    assert live_digests(model, plan_merge(recipe, checkpoints)) == digests(read(out))
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_the_live_model_is_the_loaded_one_buffers_and_logits_included(tmp_path, kind):
    rope = {"rope_type": "llama3", "rope_theta": 5e4, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
    options = {"rope_parameters": rope} if kind == "llama" else {}
    models = make_family(tmp_path / "models", kind=kind, tied=kind == "qwen3", **options)
    recipe = make_recipe(models, merge=merge_of("task_arithmetic"))
    live = Materializer(open_parents(recipe)).materialize(recipe)
    loaded = AutoModelForCausalLM.from_pretrained(merge(recipe, tmp_path / "out"))
    assert type(live) is type(loaded)
    assert not live.training
    assert not any(parameter.requires_grad for parameter in live.parameters())
    buffers, expected = dict(live.named_buffers()), dict(loaded.named_buffers())
    assert buffers.keys() == expected.keys()
    assert all(torch.equal(buffers[name], expected[name]) for name in expected)
    assert live.generation_config.to_dict() == loaded.generation_config.to_dict()
    with torch.no_grad():
        assert torch.equal(live(IDS).logits, loaded(IDS).logits)


def test_a_scaled_path_is_live_as_it_is_exported(family, tmp_path):
    path = [{"model": "a", "layer": 1, "scale": -0.7}, {"merge": "merged", "layer": 0, "scale": 1.5}]
    recipe = make_recipe(family, merge=merge_of("dare_ties"), path=path, seed=SEED)
    checkpoints = open_parents(recipe)
    model = Materializer(checkpoints).materialize(recipe)
    assert live_digests(model, plan_merge(recipe, checkpoints)) == digests(
        read(merge(recipe, tmp_path / "out"))
    )


def test_an_untied_path_of_tied_models_is_live_as_it_is_exported(half_family, tmp_path):
    path = [{"model": "a", "layer": 1}, {"model": "b", "layer": 0}]
    recipe = make_recipe(half_family, path=path)
    checkpoints = open_parents(recipe)
    model = Materializer(checkpoints).materialize(recipe)
    assert torch.equal(model.lm_head.weight, read(half_family["b"])["model.embed_tokens.weight"])
    assert live_digests(model, plan_merge(recipe, checkpoints)) == digests(
        read(merge(recipe, tmp_path / "out"))
    )


def test_going_to_another_recipe_and_back_restores_every_bit_in_the_same_storage(family):
    one = make_recipe(family, merge=merge_of("dare_ties"), seed=SEED)
    other = make_recipe(family, merge=merge_of("ties", density={"a": 0.9, "b": 0.2, "c": 0.5}))
    materializer = Materializer(open_parents(one))
    model = materializer.materialize(one)
    places = [parameter.data_ptr() for parameter in model.parameters()]
    first = digests({name: p.data for name, p in model.named_parameters()})
    assert materializer.materialize(other) is model
    between = digests({name: p.data for name, p in model.named_parameters()})
    assert all(between[name] != first[name] for name in first)
    assert materializer.materialize(one) is model
    assert digests({name: p.data for name, p in model.named_parameters()}) == first
    assert [parameter.data_ptr() for parameter in model.parameters()] == places


def test_only_tensors_whose_merge_changed_are_written_again(family, monkeypatch):
    recipe = make_recipe(family, merge=merge_of("ties"))
    rule = {"layers": [2], "parameters": {"lambda": 0.1}}
    changed = make_recipe(family, merge={**merge_of("ties"), "rules": [rule]})
    materializer = Materializer(open_parents(recipe))
    materializer.materialize(recipe)
    written = set()
    pieces = LiveSink.pieces

    def spy(self, name, numel, dtype, chunk):
        written.add(name)
        return pieces(self, name, numel, dtype, chunk)

    monkeypatch.setattr(LiveSink, "pieces", spy)
    materializer.materialize(recipe)
    assert written == set()
    materializer.materialize(changed)
    assert {name.split(".")[2] for name in written} == {"2"}
    assert len(written) == 9


def test_paths_of_all_lengths_are_one_module(family):
    def path(*layers):
        return make_recipe(family, path=[{"model": "a", "layer": layer} for layer in layers])

    materializer = Materializer(open_parents(path(0)))
    model = materializer.materialize(path(0, 3))
    assert materializer.materialize(path(3, 0)) is model
    assert materializer.materialize(path(0, 1, 1, 3)) is model
    assert len(model.model.layers) == 4
    assert materializer.model is model


def test_each_recipe_has_the_generation_defaults_of_its_own_donor(family, tmp_path):
    folders = {name: shutil.copytree(family[name], tmp_path / name) for name in ("a", "b")}
    for folder, penalty in ((folders["a"], 1.3), (folders["b"], 1.7)):
        (folder / "generation_config.json").write_text(json.dumps({"repetition_penalty": penalty}))
    copies = {
        name: make_recipe(folders, merge={"method": "passthrough", "inputs": [name]}) for name in folders
    }
    materializer = Materializer(open_parents(copies["a"]))
    model = materializer.materialize(copies["a"])
    assert model.generation_config.repetition_penalty == 1.3
    assert materializer.materialize(copies["b"]) is model
    assert model.generation_config.repetition_penalty == 1.7


def test_an_output_of_another_form_gets_a_new_model(family):
    recipe = make_recipe(family, merge=merge_of("slerp"))
    materializer = Materializer(open_parents(recipe))
    model = materializer.materialize(recipe)
    half = recipe.model_copy(update={"output": Output(dtype="bfloat16")})
    assert materializer.materialize(half) is not model


def test_a_failed_candidate_leaves_no_trace_in_the_next(family, tmp_path):
    good = make_recipe(family, merge=merge_of("task_arithmetic"), output={"dtype": "float16"})
    overflow = {"layers": [3], "parameters": {"weight": 1e30}}
    bad = make_recipe(
        family,
        merge={**merge_of("task_arithmetic", weight=0.9), "rules": [overflow]},
        output={"dtype": "float16"},
    )
    expected = digests(read(merge(good, tmp_path / "out")))
    materializer = Materializer(open_parents(good))
    for _ in range(2):
        with pytest.raises(CandidateFailed, match=r"model\.layers\.3\..*not finite"):
            materializer.materialize(bad)
        assert digests(materializer.materialize(good).state_dict()) == expected


def test_a_parent_with_nan_fails_the_candidate(family, tmp_path):
    shutil.copytree(family["a"], tmp_path / "nan")
    weights = read(tmp_path / "nan")["model.norm.weight"]
    weights[0] = -torch.inf
    rewrite(tmp_path / "nan", {"model.norm.weight": weights})
    recipe = make_recipe({**family, "a": tmp_path / "nan"}, merge=merge_of("linear"))
    with pytest.raises(CandidateFailed, match=r"model\.norm\.weight"):
        Materializer(open_parents(recipe)).materialize(recipe)


def test_binding_names_the_tensor_that_has_no_counterpart(family):
    recipe = make_recipe(family, merge=merge_of("linear"))
    plan = plan_merge(recipe, open_parents(recipe))
    fewer = live_model({**plan.config, "num_hidden_layers": 3}, plan.dtype)
    with pytest.raises(CheckpointError, match=r"'model\.layers\.3\..*' has no counterpart .* \(and 8 more\)"):
        bind(fewer, plan)
    more = live_model({**plan.config, "num_hidden_layers": 5}, plan.dtype)
    with pytest.raises(
        CheckpointError, match=r"'model\.layers\.4\..*' of LlamaForCausalLM is in no checkpoint"
    ):
        bind(more, plan)
    wide = live_model({**plan.config, "intermediate_size": 96}, plan.dtype)
    with pytest.raises(CheckpointError, match=r"mlp\..*' has shape .*64.*expects .*96"):
        bind(wide, plan)


def test_an_unknown_architecture_is_one_sentence():
    with pytest.raises(CheckpointError, match="'nonsense' cannot be built"):
        live_model({"model_type": "nonsense"}, torch.float32)


def test_building_a_live_model_leaves_torchs_initialisers_and_generator_alone(family):
    recipe = make_recipe(family, merge=merge_of("linear"))
    plan = plan_merge(recipe, open_parents(recipe))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    live_model(plan.config, plan.dtype)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.nn.Linear(4, 4).weight.abs().max() <= 0.5


def test_a_global_trim_is_renewed_where_one_of_its_tensors_changes(family, tmp_path):
    def recipe(layers):
        merged = merge_of("ties", density=0.3, trim="global")
        merged["rules"] = [{"layers": layers, "method": "task_arithmetic"}]
        return make_recipe(family, merge=merged)

    materializer = Materializer(open_parents(recipe([0])))
    for number, layers in enumerate(([0], [0, 1, 2])):
        live = materializer.materialize(recipe(layers)).state_dict()
        written = read(merge(recipe(layers), tmp_path / str(number)))
        assert all(torch.equal(live[name], tensor) for name, tensor in written.items())


def test_infinity_in_a_config_is_a_number_as_transformers_writes_it(tmp_path):
    folder = make_model(
        tmp_path / "a", kind="mamba2", tokenizer=False, num_heads=8, head_dim=8, state_size=8, n_groups=1
    )
    config = json.loads((folder / "config.json").read_text())
    assert config["time_step_limit"] == [0.0, {"__float__": "Infinity"}]
    assert list(live_model(config, torch.float32).config.time_step_limit) == [0.0, float("inf")]
