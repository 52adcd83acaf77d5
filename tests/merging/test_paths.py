"""Layer paths against a forward pass that goes hop by hop through the parents' own layers."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from evomerge.errors import CheckpointError, UserError
from evomerge.merging import merge, open_parents, plan_merge
from tests.merging.helpers import error, make_recipe, read, read64
from tests.models import VOCAB, make_family, make_model

IDS = torch.randint(3, VOCAB, (2, 11), generator=torch.Generator().manual_seed(0))


def load(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def hop_by_hop(models, hops, ids=IDS):
    """Logits of a path, by definition: each scale multiplies the residual stream that enters its layer."""
    with torch.no_grad():
        first, last = models[hops[0][0]], models[hops[-1][0]]
        hidden = first.model.embed_tokens(ids)
        positions = torch.arange(ids.shape[1])[None]
        rotary = first.model.rotary_emb(hidden, positions)
        length = ids.shape[1]
        causal = torch.full((length, length), -torch.inf).triu(1)[None, None]
        for name, layer, scale in hops:
            hidden = models[name].model.layers[layer](
                hidden * scale, attention_mask=causal, position_ids=positions, position_embeddings=rotary
            )
        return last.lm_head(last.model.norm(hidden))


def to_path(hops):
    return [{"model": name, "layer": layer, "scale": scale} for name, layer, scale in hops]


@pytest.fixture(scope="module")
def exact_family(tmp_path_factory) -> dict[str, Path]:
    """With a tiny epsilon, so that folding is exact up to float32 rounding."""
    return make_family(tmp_path_factory.mktemp("exact"), rms_norm_eps=1e-12)


PATHS = {
    "repeated": [("a", 0, 1), ("a", 1, 1), ("a", 1, 1), ("a", 2, 1), ("a", 1, 1), ("a", 3, 1)],
    "interleaved": [("a", 0, 1), ("b", 2, 1), ("a", 1, 1), ("c", 3, 1), ("b", 0, 1)],
    "short": [("c", 2, 1)],
    "scaled": [("a", 0, 0.8), ("b", 1, 1.25), ("b", 1, 0.7), ("a", 3, 1.9)],
    "negative": [("a", 0, 1), ("a", 1, -0.8), ("b", 2, 1.3), ("a", 3, -1.1), ("c", 1, -1.2)],
    "ends negative": [("a", 0, -1.5), ("b", 1, 1)],
}


@pytest.mark.parametrize("hops", PATHS.values(), ids=PATHS.keys())
def test_the_exported_stock_model_computes_the_path(exact_family, tmp_path, hops):
    out = merge(make_recipe(exact_family, path=to_path(hops)), tmp_path / "out")
    expected = hop_by_hop({name: load(path) for name, path in exact_family.items()}, hops)
    exported = load(out)
    assert type(exported) is LlamaForCausalLM
    with torch.no_grad():
        assert error(exported(IDS).logits, expected) < 1e-4


def test_the_oracle_agrees_with_transformers_on_an_unchanged_model(exact_family):
    model = load(exact_family["a"])
    with torch.no_grad():
        assert error(hop_by_hop({"a": model}, [("a", i, 1) for i in range(4)]), model(IDS).logits) < 1e-5


def test_the_epsilon_of_the_norms_is_the_only_difference(family, tmp_path):
    hops = [("a", 0, 0.5), ("b", 1, 1), ("c", 2, 2.0), ("a", 3, 2.0)]
    out = merge(make_recipe(family, path=to_path(hops)), tmp_path / "out")
    expected = hop_by_hop({name: load(path) for name, path in family.items()}, hops)
    with torch.no_grad():
        assert error(load(out)(IDS).logits, expected) < 1e-3


@pytest.mark.parametrize(
    ("kind", "options"),
    [("qwen2", {}), ("qwen3", {}), ("mistral", {}), ("llama", {"attention_bias": True, "mlp_bias": True})],
)
def test_scales_fold_in_every_llama_like_family(tmp_path, kind, options):
    models = make_family(tmp_path / "models", kind=kind, rms_norm_eps=1e-12, **options)
    hops = [("a", 1, 0.9), ("b", 0, -1.2), ("b", 3, 0.8)]
    out = merge(make_recipe(models, path=to_path(hops)), tmp_path / "out")
    expected = hop_by_hop({name: load(path) for name, path in models.items()}, hops)
    with torch.no_grad():
        assert error(load(out)(IDS).logits, expected) < 1e-4


def test_a_merged_layer_may_be_part_of_a_path(exact_family, tmp_path):
    recipe = make_recipe(
        exact_family,
        merges={
            "mean": {"method": "linear", "inputs": ["b", "c"], "parameters": {"weight": 1.0},
                     "rules": [{"layers": [2], "parameters": {"weight": {"b": 1.0, "c": 3.0}}}]}
        },
        path=[
            {"model": "a", "layer": 0},
            {"merge": "mean", "layer": 2, "scale": 1.5},
            {"merge": "mean", "layer": 1},
        ],
    )  # fmt: skip
    out = merge(recipe, tmp_path / "out")

    b, c = read64(exact_family["b"]), read64(exact_family["c"])
    mean = load(exact_family["b"])
    weights = {name: (b[name] + (3 if ".layers.2." in name else 1) * c[name]) for name in b}
    mean.load_state_dict(
        {name: (w / (4 if ".layers.2." in name else 2)).float() for name, w in weights.items()}
    )
    expected = hop_by_hop(
        {"a": load(exact_family["a"]), "mean": mean}, [("a", 0, 1), ("mean", 2, 1.5), ("mean", 1, 1)]
    )
    with torch.no_grad():
        assert error(load(out)(IDS).logits, expected) < 1e-4


def test_generation_with_a_cache_gives_what_it_gives_without(family, tmp_path):
    hops = [("a", 0, 1.1), ("b", 1, 0.9), ("b", 1, 1), ("c", 2, 1), ("a", 3, 1)]
    model = load(merge(make_recipe(family, path=to_path(hops)), tmp_path / "out"))
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    with_cache = model.generate(IDS, use_cache=True, **options)
    assert with_cache.shape == (2, 23)
    assert torch.equal(with_cache, model.generate(IDS, use_cache=False, **options))


def test_unscaled_layers_are_copied_bit_for_bit(family, tmp_path):
    out = merge(make_recipe(family, path=to_path([("b", 3, 1), ("a", 0, 1)])), tmp_path / "out")
    found, a, b = read(out), read(family["a"]), read(family["b"])
    for name, tensor in found.items():
        if ".layers.0." in name:
            assert torch.equal(tensor, b[name.replace(".0.", ".3.")])
        elif ".layers.1." in name:
            assert torch.equal(tensor, a[name.replace(".1.", ".0.")])
        else:
            assert torch.equal(tensor, (b if "embed" in name else a)[name])
    assert sum(".layers." in name for name in found) == 18


def test_all_layers_of_a_merge_in_order_are_the_merge(family, tmp_path):
    merged = {"method": "ties", "base": "base", "inputs": ["a", "b"], "parameters": {"density": 0.5}}
    plain = merge(make_recipe(family, merge=merged), tmp_path / "plain")
    path = [{"merge": "merged", "layer": i} for i in range(4)]
    hops = merge(make_recipe(family, merge=merged, path=path), tmp_path / "hops")
    one, other = read(plain), read(hops)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("ends", [("a", "a"), ("a", "b")])
def test_a_tied_head_is_untied_where_embedding_and_head_have_different_sources(tmp_path, ends):
    models = make_family(tmp_path / "models", tied=True, rms_norm_eps=1e-12)
    hops = [(ends[0], 0, 1), ("c", 1, 1), (ends[1], 3, 1)]
    out = merge(make_recipe(models, path=to_path(hops)), tmp_path / "out")
    same = ends[0] == ends[1]
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is same
    assert ("lm_head.weight" in read(out)) is not same
    expected = hop_by_hop({name: load(path) for name, path in models.items()}, hops)
    with torch.no_grad():
        assert error(load(out)(IDS).logits, expected) < 1e-4


def test_per_layer_config_lists_follow_their_layers(tmp_path):
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    models = make_family(
        tmp_path / "models", kind="qwen3", use_sliding_window=True, sliding_window=4, layer_types=kinds
    )
    hops = [("a", 1, 1), ("b", 1, 1), ("a", 0, 1), ("b", 3, 1), ("b", 2, 1)]
    out = merge(make_recipe(models, path=to_path(hops)), tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    assert config["num_hidden_layers"] == 5
    assert config["layer_types"] == [kinds[layer] for _, layer, _ in hops]
    assert load(out).generate(IDS, max_new_tokens=2, do_sample=False).shape == (2, 13)


def edit_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        config.pop(key, None)
        if value is not None:
            config[key] = value
    (folder / "config.json").write_text(json.dumps(config))


def test_kinds_of_layers_that_an_old_config_derives_are_written_out(tmp_path):
    model = make_model(
        tmp_path / "a", kind="qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=2
    )
    edit_config(model, layer_types=None)
    recipe = make_recipe({"a": model}, path=to_path([("a", 3, 1), ("a", 0, 1), ("a", 2, 1)]))
    plan = plan_merge(recipe, open_parents(recipe))
    assert plan.config["layer_types"] == ["sliding_attention", "full_attention", "sliding_attention"]


def test_kinds_of_layers_that_depend_on_their_index_are_refused_when_moved(tmp_path):
    model = make_model(tmp_path / "a")
    edit_config(model, sliding_window_pattern=3)
    recipe = make_recipe({"a": model}, path=to_path([("a", 1, 1), ("a", 0, 1)]))
    with pytest.raises(CheckpointError, match="'sliding_window_pattern' gives layers their kind by index"):
        plan_merge(recipe, open_parents(recipe))
    in_order = make_recipe({"a": model}, path=to_path([("a", i, 1) for i in range(4)]))
    assert plan_merge(in_order, open_parents(in_order)).config["sliding_window_pattern"] == 3


def test_a_hop_beyond_the_last_layer_is_refused(family):
    recipe = make_recipe(family, path=to_path([("a", 0, 1), ("b", 4, 1)]))
    with pytest.raises(UserError, match=r"path\.1\.layer: 'b' has the layers 0 to 3, not 4"):
        plan_merge(recipe, open_parents(recipe))


def test_layers_of_models_with_another_arithmetic_cannot_join(family, tmp_path):
    other = make_model(tmp_path / "other", rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    recipe = make_recipe({**family, "other": other}, path=to_path([("a", 0, 1), ("other", 1, 1)]))
    with pytest.raises(CheckpointError, match="'rope_theta' is 500000"):
        plan_merge(recipe, open_parents(recipe))


ARITHMETIC = [
    ("gemma2", {}, {"attn_logit_softcapping": 5.0}, "'attn_logit_softcapping' is 5.0"),
    ("gemma2", {}, {"query_pre_attn_scalar": 32}, "'query_pre_attn_scalar' is 32"),
    ("gemma2", {}, {"hidden_activation": "silu"}, "'hidden_activation' is 'silu'"),
    ("mixtral", {}, {"num_experts_per_tok": 1}, "'num_experts_per_tok' is 1"),
    ("qwen3_moe", {}, {"norm_topk_prob": True}, "'norm_topk_prob' is True"),
    ("gpt_neox", {}, {"use_parallel_residual": False}, "'use_parallel_residual' is False"),
    ("gpt2", {}, {"n_head": 2}, "'n_head' is 2"),
    ("gpt2", {}, {"layer_norm_epsilon": 0.01}, "'layer_norm_epsilon' is 0.01"),
    ("mistral", {"sliding_window": 8}, {"sliding_window": 6}, "'sliding_window' is 6, .* has 8"),
]


@pytest.mark.parametrize(("kind", "options", "changes", "said"), ARITHMETIC)
def test_what_computes_otherwise_from_the_same_tensors_cannot_join(tmp_path, kind, options, changes, said):
    options = {"kind": kind, "tokenizer": False, **options}
    models = {name: make_model(tmp_path / name, seed, **options) for seed, name in enumerate("ab")}
    edit_config(models["b"], **changes)
    recipe = make_recipe(models, path=to_path([("a", 0, 1), ("b", 1, 1), ("a", 3, 1)]))
    with pytest.raises(CheckpointError, match=said):
        plan_merge(recipe, open_parents(recipe))


def test_a_layer_with_a_window_cannot_join_layers_without(tmp_path):
    options = {"kind": "mistral", "tokenizer": False}
    a = make_model(tmp_path / "a", 1, sliding_window=8, **options)
    b = make_model(tmp_path / "b", 2, sliding_window=None, **options)
    recipe = make_recipe({"a": a, "b": b}, path=to_path([("a", 0, 1), ("b", 1, 1), ("a", 3, 1)]))
    with pytest.raises(CheckpointError, match=r"'sliding_window' is not set, .* has 8"):
        plan_merge(recipe, open_parents(recipe))


def test_windows_that_no_layer_uses_keep_nobody_out(tmp_path):
    models = {
        name: make_model(tmp_path / name, seed, kind="qwen2", tokenizer=False)
        for seed, name in enumerate("abc")
    }
    # As transformers 4 wrote it, as 5 does, and a window as long as the longest text.
    edit_config(models["a"], layer_types=None)
    config = json.loads((models["a"] / "config.json").read_text())
    config |= {"sliding_window": 4096, "use_sliding_window": False}
    (models["a"] / "config.json").write_text(json.dumps(config))
    edit_config(models["c"], sliding_window=512, use_sliding_window=True, max_window_layers=4)
    for hops in ([("a", 0, 1), ("b", 1, 1), ("c", 3, 1)], [("b", 0, 1), ("a", 1, 1), ("b", 3, 1)]):
        recipe = make_recipe(models, path=to_path(hops))
        plan = plan_merge(recipe, open_parents(recipe))
        assert plan.config["layer_types"] == ["full_attention"] * 3


def test_layers_of_models_with_other_tensors_cannot_join(family, tmp_path):
    other = make_model(tmp_path / "other", attention_bias=True)
    recipe = make_recipe({**family, "other": other}, path=to_path([("a", 0, 1), ("other", 1, 1)]))
    with pytest.raises(CheckpointError, match=r"layer 1 cannot join the path: .*k_proj\.bias' is .*missing"):
        plan_merge(recipe, open_parents(recipe))


def test_models_of_different_depth_may_share_a_path(family, tmp_path):
    deep = make_model(tmp_path / "deep", layers=6)
    recipe = make_recipe({"a": family["a"], "deep": deep}, path=to_path([("a", 3, 1), ("deep", 5, 1)]))
    assert plan_merge(recipe, open_parents(recipe)).config["num_hidden_layers"] == 2


def test_scales_that_cancel_leave_later_layers_alone(family):
    recipe = make_recipe(family, path=to_path([("a", 0, 1), ("a", 1, 0.5), ("a", 2, 2.0)]))
    plan = plan_merge(recipe, open_parents(recipe))
    factors = {job.name: job.factor for job in plan.jobs if job.factor != 1}
    assert factors == {
        "model.layers.1.self_attn.o_proj.weight": 2.0,
        "model.layers.1.mlp.down_proj.weight": 2.0,
    }


def test_extreme_products_of_scales_are_warned_about(family, tmp_path, caplog):
    recipe = make_recipe(family, path=to_path([("a", 0, 0.2), ("a", 1, 0.5)]))
    plan = plan_merge(recipe, open_parents(recipe))
    assert [warning.split(":")[0] for warning in plan.warnings] == ["path.1.scale"]
    with caplog.at_level(logging.WARNING, "evomerge"):
        merge(recipe, tmp_path / "out")
    assert "0.1, outside [1/8, 8]" in caplog.text
