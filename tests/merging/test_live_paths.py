"""Live layer paths that share their tensors, against the folders that `merge` writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from evomerge.errors import CandidateFailed
from evomerge.merging import Materializer, merge, open_parents
from evomerge.merging.paths import FOLDABLE_TYPES
from tests.merging.helpers import make_recipe, read, rewrite
from tests.merging.hops import greedy
from tests.models import ARCHITECTURES, VOCAB, make_model

IDS = torch.randint(3, VOCAB - 3, (2, 11), generator=torch.Generator().manual_seed(0))
WINDOWS = {"layer_types": [*["sliding_attention"] * 3, "full_attention"]}
OPTIONS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 4},
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
    "qwen3": {"tied": True},
    "gemma3_text": WINDOWS,
    "gemma3": WINDOWS,
    "qwen3_moe": {"mlp_only_layers": [1], "decoder_sparse_step": 2},
    "smollm3": {"no_rope_layers": [1, 0, 1, 0]},
    "cohere2": {"sliding_window": 4, **WINDOWS},
    "exaone4": {"sliding_window": 4, **WINDOWS},
}
MEAN = {"method": "linear", "inputs": ["a", "b"], "parameters": {"weight": {"a": 0.3, "b": [0.5, 0.9]}}}
KINDS = [*ARCHITECTURES, "gemma3", "smollm3", "cohere2", "exaone4"]


def to_path(hops) -> list[dict[str, Any]]:
    return [
        {"merge" if name == "m" else "model": name, "layer": i, "scale": scale} for name, i, scale in hops
    ]


def path_recipe(models, hops, **parts: Any):
    merges = {"m": MEAN} if any(name == "m" for name, _, _ in hops) else {}
    return make_recipe(models, path=to_path(hops), merges=merges, **parts)


CANDIDATES = [
    [("a", 0, 1), ("b", 1, 1), ("b", 1, 1), ("a", 2, 1), ("b", 1, 1), ("a", 3, 1)],
    [("a", 0, 1), ("a", 3, 1)],
    [("a", 0, 1), ("b", 2, 0.8), ("b", 2, 1), ("b", 1, -1.3), ("a", 3, 1.1)],
    [("a", 1, 1), ("m", 1, 1), ("m", 2, 1), ("a", 3, 1)],
    [("b", 2, 1), ("a", 0, 1), ("b", 0, 1)],
    [("a", 0, 1), ("a", 1, 1), ("a", 2, 1), ("a", 3, 1)],
]


@pytest.fixture(scope="module", params=KINDS)
def family(request, tmp_path_factory) -> tuple[str, dict[str, Path]]:
    folder = tmp_path_factory.mktemp(request.param)
    options = {"kind": request.param, "tokenizer": False, **OPTIONS.get(request.param, {})}
    a = make_model(folder / "a", 1, **options)
    return request.param, {"a": a, "b": make_model(folder / "b", 2, base=a, noise=0.1, **options)}


def test_every_candidate_is_what_its_export_is(family, tmp_path):
    kind, models = family
    materializer, seen = None, set()
    for number, hops in enumerate(CANDIDATES):
        if kind not in FOLDABLE_TYPES | {"gemma3"}:
            hops = [(name, layer, 1) for name, layer, _ in hops]
        recipe = path_recipe(models, hops)
        if materializer is None:
            materializer = Materializer(open_parents(recipe))
        live = materializer.materialize(recipe)
        seen.add(live)
        stock = AutoModelForCausalLM.from_pretrained(merge(recipe, tmp_path / str(number))).eval()
        assert type(live) is type(stock)
        theirs = stock.state_dict()
        assert live.state_dict().keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in live.state_dict().items())
        with torch.no_grad():
            assert torch.equal(live(IDS).logits, stock(IDS).logits)
        assert live.generation_config.to_dict() == stock.generation_config.to_dict()
        expected = greedy(stock, IDS, 6, cached=True)
        assert torch.equal(greedy(live, IDS, 6, cached=True), expected)
        assert torch.equal(greedy(live, IDS, 6, cached=False), greedy(stock, IDS, 6, cached=False))
        options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
        assert torch.equal(live.generate(IDS, **options), stock.generate(IDS, **options))
    if kind in ("llama", "mistral", "phi3", "gpt2", "mixtral"):
        assert len(seen) == 1


@pytest.fixture(scope="module")
def llamas(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("llamas")
    return {name: make_model(folder / name, seed, tokenizer=False) for seed, name in enumerate("ab")}


def memory(model) -> list[list[int]]:
    """Addresses of the tensors of each layer."""
    return [[p.data_ptr() for p in layer.parameters()] for layer in model.model.layers]


def test_layers_are_aliased_and_never_copied(llamas):
    first = path_recipe(llamas, [("a", 0, 1), ("b", 1, 1), ("b", 1, 1), ("a", 3, 1)])
    materializer = Materializer(open_parents(first))
    model = materializer.materialize(first)
    one = memory(model)
    assert one[1] == one[2]
    assert not set(one[0]) & set(one[1])
    size = sum(p.nbytes for p in model.parameters())
    assert materializer.shared_bytes == size == sum(p.nbytes for p in set(model.parameters()))

    longer = path_recipe(llamas, [("a", 0, 1), *[("b", 1, 1)] * 5, ("a", 3, 1)])
    assert materializer.materialize(longer) is model
    assert memory(model) == [one[0], *[one[1]] * 5, one[3]]
    assert materializer.shared_bytes == size
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == list(range(7))
    assert model.config.num_hidden_layers == 7

    whole = path_recipe(llamas, [("a", i, 1) for i in range(4)])
    materializer.materialize(whole)
    assert memory(model)[0] == one[0]
    assert memory(model)[3] == one[3]


def test_of_a_scaled_hop_only_what_the_scale_is_folded_into_is_its_own(llamas):
    plain = path_recipe(llamas, [("a", 0, 1), ("b", 1, 1), ("a", 3, 1)])
    materializer = Materializer(open_parents(plain))
    model = materializer.materialize(plain)
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    scaled = path_recipe(llamas, [("a", 0, 1), ("b", 1, 0.5), ("a", 3, 2)])
    assert materializer.materialize(scaled) is model
    changed = {name for name, p in model.named_parameters() if p.data_ptr() != before[name]}
    assert changed == {f"model.layers.1.{name}.weight" for name in ("self_attn.o_proj", "mlp.down_proj")}


def test_nothing_is_written_for_a_candidate_that_reorders(llamas, monkeypatch):
    from evomerge.merging import live

    written = []
    execute = live.execute

    def counted(*args, jobs, **kwargs):
        written.append(len(jobs))
        execute(*args, jobs=jobs, **kwargs)

    monkeypatch.setattr(live, "execute", counted)
    first = path_recipe(llamas, [*[(name, i, 1) for i in range(4) for name in "ab"][:-1], ("a", 3, 1)])
    materializer = Materializer(open_parents(first))
    materializer.materialize(first)
    for hops in (
        [("a", 0, 1), ("b", 2, 1), ("a", 3, 1)],
        [("a", 0, 1), ("b", 1, 1), ("b", 0, 1), ("a", 3, 1)],
    ):
        materializer.materialize(path_recipe(llamas, hops))
    assert len(written) == 1


def test_what_is_kept_stays_within_what_the_sources_hold(llamas):
    recipe = path_recipe(llamas, [("a", 0, 1), ("b", 1, 1.5), ("a", 3, 1)])
    materializer = Materializer(open_parents(recipe))
    whole = sum(tensor.nbytes for tensor in read(llamas["a"]).values())
    for step in range(40):
        hops = [("a", 0, 1), ("b", step % 4, 0.5 + step / 40), ("a", 3, 1)]
        model = materializer.materialize(path_recipe(llamas, hops))
        assert materializer.shared_bytes < 3 * whole
    again = Materializer(open_parents(recipe)).materialize(path_recipe(llamas, hops))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


def test_a_whole_model_among_the_candidates_shares_their_tensors(llamas):
    path = path_recipe(llamas, [("a", i, 1) for i in range(4)])
    alone = make_recipe(llamas, merge={"method": "linear", "inputs": ["a"], "parameters": {"weight": 1.0}})
    materializer = Materializer(open_parents(path))
    model = materializer.materialize(path)
    where = memory(model)
    assert materializer.materialize(alone) is model
    assert memory(model) == where


def test_a_failed_candidate_leaves_nothing_behind(tmp_path):
    models = {name: make_model(tmp_path / name, seed, tokenizer=False) for seed, name in enumerate("ab")}
    name = "model.layers.2.mlp.down_proj.weight"
    rewrite(models["b"], {name: read(models["b"])[name] * 1e38})
    good = path_recipe(models, [("a", 0, 1), ("b", 1, 0.5), ("a", 3, 1)])
    materializer = Materializer(open_parents(good))
    with torch.no_grad():
        before = materializer.materialize(good)(IDS).logits
        for _ in range(2):
            with pytest.raises(CandidateFailed, match=r"layers\.1\.mlp\.down_proj.* not finite"):
                materializer.materialize(path_recipe(models, [("a", 0, 1), ("b", 2, 1e-4), ("a", 3, 1)]))
        assert torch.equal(materializer.materialize(good)(IDS).logits, before)


def test_thresholds_of_the_whole_model_follow_the_path(tmp_path):
    models = {"base": make_model(tmp_path / "base", 0, tokenizer=False)}
    for seed, name in enumerate("ab", 1):
        models[name] = make_model(
            tmp_path / name, seed, base=models["base"], noise=0.1 * seed, tokenizer=False
        )
    merged = {
        "method": "ties", "base": "base", "inputs": ["a", "b"], "parameters": {"density": 0.3, "trim": "global"}
    }  # fmt: skip
    materializer = None
    for layers in ([0, 1, 2, 3], [0, 2, 2, 3], [0, 3]):
        path = [{"merge": "m", "layer": layer} for layer in layers]
        recipe = make_recipe(models, merges={"m": merged}, path=path)
        materializer = materializer or Materializer(open_parents(recipe))
        live = materializer.materialize(recipe).state_dict()
        expected = read(merge(recipe, tmp_path / str(layers)))
        assert all(torch.equal(live[name], tensor) for name, tensor in expected.items())


def test_leading_dense_layers_and_buffers_that_are_weights_follow_the_path(tmp_path):
    sizes = dict.fromkeys(
        ("kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8
    )
    mixture = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
    options = {"first_k_dense_replace": 1, "moe_intermediate_size": 24, "num_key_value_heads": 4}
    folder = make_model(tmp_path / "a", 1, kind="deepseek_v3", tokenizer=False, **sizes, **mixture, **options)
    materializer, seen = None, set()
    for number, layers in enumerate(([0, 1, 1, 3], [0, 3], [0, 0, 2, 1, 2, 3])):
        recipe = path_recipe({"a": folder}, [("a", layer, 1) for layer in layers])
        materializer = materializer or Materializer(open_parents(recipe))
        live = materializer.materialize(recipe)
        seen.add(live)
        stock = AutoModelForCausalLM.from_pretrained(merge(recipe, tmp_path / str(number))).eval()
        assert "model.layers.2.mlp.gate.e_score_correction_bias" in stock.state_dict() or len(layers) < 3
        with torch.no_grad():
            assert torch.equal(live(IDS).logits, stock(IDS).logits)
    assert len(seen) == 1


def test_models_whose_layers_depend_on_their_index_are_held_one_by_one(tmp_path):
    model = make_model(tmp_path / "a", kind="gpt2", tokenizer=False, scale_attn_by_inverse_layer_idx=True)
    recipe = make_recipe({"a": model}, path=[{"model": "a", "layer": i} for i in range(4)])
    live = Materializer(open_parents(recipe)).materialize(recipe)
    stock = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        assert torch.equal(live(IDS).logits, stock(IDS).logits)


def test_a_whole_model_of_an_old_config_is_of_its_paths_shape(tmp_path):
    models = {}
    for seed, name in enumerate("ab"):
        models[name] = make_model(tmp_path / name, seed, kind="gemma2", tokenizer=False, sliding_window=4)
        file = models[name] / "config.json"
        config = {key: value for key, value in json.loads(file.read_text()).items() if key != "layer_types"}
        file.write_text(json.dumps(config))
    path = path_recipe(models, [("a", 0, 1), ("b", 2, 1), ("a", 1, 1), ("a", 3, 1)])
    merge_of_one = {"method": "linear", "inputs": ["a"], "parameters": {"weight": 1.0}}
    whole = make_recipe(models, merge=merge_of_one)
    materializer = Materializer(open_parents(path))
    model = materializer.materialize(path)
    assert materializer.materialize(whole) is model
    assert materializer.path is not None
    stock = AutoModelForCausalLM.from_pretrained(merge(whole, tmp_path / "out")).eval()
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, stock(IDS).logits)
