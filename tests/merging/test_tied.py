"""When the output's head is its embedding, and what it is where it is not."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from evomerge.merging import Materializer, merge, open_parents, plan_merge
from tests.merging.helpers import make_recipe, read, read64, rewrite
from tests.models import make_model

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
MEAN = {"method": "linear", "inputs": ["a", "b"], "parameters": {"weight": 0.5}}
ARITHMETIC = {
    "method": "task_arithmetic",
    "base": "base",
    "inputs": ["a", "b"],
    "parameters": {"weight": {"a": 0.5, "b": -0.25}},
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Models by name and tying, e.g. ``a`` (tied) and ``A`` (untied)."""
    folder = tmp_path_factory.mktemp("pairs")
    return {
        name: make_model(folder / f"{name}-{name.islower()}", seed=i, layers=1, tied=name[0].islower())
        for i, name in enumerate(("base", "a", "b", "Base", "A", "B"))
    }


def choose(pairs, names):
    return {name.lower(): pairs[name] for name in names}


def is_tied(out):
    config = json.loads((out / "config.json").read_text())
    assert config["tie_word_embeddings"] is (HEAD not in read(out))
    return config["tie_word_embeddings"]


@pytest.mark.parametrize(
    "names", [("base", "a", "b"), ("Base", "a", "b"), ("base", "A", "b"), ("base", "A", "B")]
)
def test_the_output_is_tied_only_if_every_parent_is(pairs, tmp_path, names):
    models = choose(pairs, names)
    out = merge(make_recipe(models, merge=ARITHMETIC), tmp_path / "out")
    assert is_tied(out) is all(name.islower() for name in names)
    parents = {name: read64(path) for name, path in models.items()}
    heads = {name: tensors.get(HEAD, tensors[EMBEDDING]) for name, tensors in parents.items()}
    merged = read(out)
    expected = heads["base"] + 0.5 * (heads["a"] - heads["base"]) - 0.25 * (heads["b"] - heads["base"])
    torch.testing.assert_close(merged.get(HEAD, merged[EMBEDDING]).double(), expected, rtol=1e-5, atol=1e-6)
    loaded = AutoModelForCausalLM.from_pretrained(out)
    ours = loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()
    assert ours is is_tied(out)


def test_a_base_that_only_lends_its_config_has_no_say(pairs, tmp_path):
    for base in ("base", "Base"):
        models = {**choose(pairs, ["a", "b"]), "base": pairs[base]}
        recipe = make_recipe(models, merge={**MEAN, "base": "base"})
        assert is_tied(merge(recipe, tmp_path / base))


def test_an_untied_head_that_equals_the_embedding_counts_as_tied_beside_tied_parents(pairs, tmp_path):
    equal = make_model(tmp_path / "equal", seed=7, layers=1)
    rewrite(equal, {HEAD: read(equal)[EMBEDDING]})
    assert is_tied(merge(make_recipe({"a": pairs["a"], "b": equal}, merge=MEAN), tmp_path / "mixed"))
    other = make_model(tmp_path / "other", seed=8, layers=1)
    rewrite(other, {HEAD: read(other)[EMBEDDING]})
    assert not is_tied(merge(make_recipe({"a": other, "b": equal}, merge=MEAN), tmp_path / "untied"))


def test_a_head_that_contradicts_the_config_is_merged(pairs, tmp_path, caplog):
    odd = make_model(tmp_path / "odd", seed=9, layers=1, tied=True)
    rewrite(odd, {HEAD: 2 * read(odd)[EMBEDDING]})
    out = merge(make_recipe({"a": pairs["a"], "b": odd}, merge=MEAN), tmp_path / "out")
    assert not is_tied(out)
    assert "both are used" in caplog.text
    expected = (read64(pairs["a"])[EMBEDDING] + 2 * read64(odd)[EMBEDDING]) / 2
    torch.testing.assert_close(read(out)[HEAD].double(), expected, rtol=1e-6, atol=1e-6)


def test_rules_for_the_head_apply_to_the_head_of_a_tied_parent(pairs, tmp_path):
    rules = [{"roles": ["head"], "parameters": {"weight": {"a": 1.0, "b": 0.0}}}]
    models = choose(pairs, ["base", "a", "B"])
    out = merge(make_recipe(models, merge={**MEAN, "rules": rules}), tmp_path / "out")
    assert torch.equal(read(out)[HEAD], read(models["a"])[EMBEDDING])


def test_live_and_exported_are_the_same(pairs, tmp_path):
    recipe = make_recipe(choose(pairs, ["base", "A", "b"]), merge=ARITHMETIC)
    parents = open_parents(recipe)
    live = Materializer(parents).materialize(recipe)
    exported = read(merge(recipe, tmp_path / "out"))
    state = live.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in exported.items())
    assert plan_merge(recipe, parents).config["tie_word_embeddings"] is False
