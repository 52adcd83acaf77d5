"""Models whose tokenizers or numbers of rows differ: rows belong together by token."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from evomerge.errors import CheckpointError
from evomerge.merging import HashSink, Materializer, execute, merge, open_parents, plan_merge
from tests.merging.helpers import make_recipe, read, read64, rewrite
from tests.merging.speakers import EMBEDDING, HEAD, World, stored, write_model, write_tokenizer

WEIGHTS = {"a": 0.5, "b": 0.75}
ARITHMETIC = {
    "method": "task_arithmetic",
    "base": "base",
    "inputs": ["a", "b"],
    "parameters": {"weight": WEIGHTS},
}
MEAN = {"method": "linear", "inputs": ["base", "a", "b"], "parameters": {"weight": 0.25}}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("tensor", [EMBEDDING, HEAD])
def test_differences_to_the_base_are_taken_token_by_token(world, tmp_path, tensor):
    out = merge(make_recipe(world.models, merge=ARITHMETIC), tmp_path / "out")
    merged, parents = read64(out)[tensor], stored(world, tensor)
    assert merged.shape[0] == world.rows["base"]
    for token, i in world.ids["base"].items():
        expected = base = world.row(parents, "base", token)
        for name, weight in WEIGHTS.items():
            own = world.row(parents, name, token)
            expected = expected + weight * ((base if own is None else own) - base)
        torch.testing.assert_close(merged[i], expected, rtol=1e-5, atol=1e-6, msg=token)
    padding = len(world.ids["base"])
    assert torch.equal(merged[padding:], parents["base"][padding:])


def test_averages_leave_a_model_without_the_token_the_mean_of_the_others(world, tmp_path):
    recipe = make_recipe(
        world.models, merge={**MEAN, "inputs": ["a", "b"], "parameters": {"weight": {"a": 0.7, "b": 0.3}}}
    )
    merged, parents = read64(merge(recipe, tmp_path / "out"))[EMBEDDING], stored(world, EMBEDDING)
    assert len(merged) == world.rows["a"]
    for token, i in world.ids["a"].items():
        a, b = world.row(parents, "a", token), world.row(parents, "b", token)
        torch.testing.assert_close(merged[i], a if b is None else 0.7 * a + 0.3 * b, rtol=1e-5, atol=1e-6)


def test_a_token_that_the_base_lacks_starts_from_the_mean_of_those_that_have_it(world, tmp_path):
    recipe = make_recipe(world.models, merge=ARITHMETIC, output={"tokenizer": "b"})
    out = merge(recipe, tmp_path / "out")
    merged, parents = read64(out)[EMBEDDING], stored(world, EMBEDDING)
    end, tool = world.ids["b"]["<|im_end|>"], world.ids["b"]["<tool>"]
    a, b = (world.row(parents, name, "<|im_end|>") for name in "ab")
    mean = (a + b) / 2
    torch.testing.assert_close(merged[end], mean + 0.5 * (a - mean) + 0.75 * (b - mean), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(merged[tool], parents["b"][tool], rtol=1e-5, atol=1e-6)
    assert len(merged) == world.rows["b"]
    torch.testing.assert_close(merged[262:], parents["b"][262:], rtol=1e-5, atol=1e-6)


def test_one_model_read_through_another_tokenizer_keeps_its_rows(world, tmp_path):
    copy = {"method": "linear", "inputs": ["a"], "parameters": {"weight": 1.0}}
    recipe = make_recipe(world.models, merge=copy, output={"tokenizer": "base"})
    out = merge(recipe, tmp_path / "out")
    merged, parents = read(out)[HEAD], {name: read(path)[HEAD] for name, path in world.models.items()}
    for token, i in world.ids["base"].items():
        own = world.row(parents, "a", token)
        assert torch.equal(merged[i], world.row(parents, "base", token) if own is None else own)


def test_the_output_loads_with_the_tokenizer_that_it_says(world, tmp_path):
    for owner in ("base", "a", "b"):
        out = merge(
            make_recipe(world.models, merge=ARITHMETIC, output={"tokenizer": owner}), tmp_path / owner
        )
        assert AutoTokenizer.from_pretrained(out).get_vocab() == world.ids[owner]
        model = AutoModelForCausalLM.from_pretrained(out)
        assert model.config.vocab_size == len(model.get_input_embeddings().weight) == world.rows[owner]


def test_bytes_depend_on_no_chunk_thread_or_way_of_reading(world):
    recipe = make_recipe(world.models, merge=MEAN, output={"tokenizer": "b", "dtype": "bfloat16"})
    parents = open_parents(recipe)
    plan = plan_merge(recipe, parents)
    digests = []
    for options in ({}, {"chunk": 7}, {"threads": 3, "chunk": 1000}, {"stream": True, "chunk": 61}):
        sink = HashSink()
        execute(plan, parents, sink, **options)
        digests.append(sink.digests())
    assert all(found == digests[0] for found in digests)


def test_live_and_exported_are_the_same(world, tmp_path):
    recipe = make_recipe(world.models, merge=ARITHMETIC)
    materializer = Materializer(open_parents(recipe))
    for weight in (0.1, 0.5):
        changed = make_recipe(world.models, merge={**ARITHMETIC, "parameters": {"weight": weight}})
        state = materializer.materialize(changed).state_dict()
        exported = read(merge(changed, tmp_path / str(weight)))
        assert all(torch.equal(state[name], tensor) for name, tensor in exported.items())


def test_number_formats_may_differ(tmp_path):
    world = World(tmp_path, dtype=torch.bfloat16)
    rewrite(world.models["a"], {name: t.float() for name, t in read(world.models["a"]).items()})
    merged = read(
        merge(make_recipe(world.models, merge=ARITHMETIC, output={"tokenizer": "b"}), tmp_path / "out")
    )
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    parents = stored(world, EMBEDDING)
    end = world.ids["b"]["<|im_end|>"]
    a, b = (world.row(parents, name, "<|im_end|>") for name in "ab")
    mean = (a + b) / 2
    expected = (mean + 0.5 * (a - mean) + 0.75 * (b - mean)).bfloat16()
    torch.testing.assert_close(merged[EMBEDDING][end], expected, rtol=2**-8, atol=0)


def test_tied_and_untied_models_with_other_tokens(tmp_path):
    world = World(tmp_path, tied=True)
    ids = world.ids["a"]
    world.models["a"] = write_model(tmp_path / "a", ids, 9)
    merged = read64(merge(make_recipe(world.models, merge=ARITHMETIC), tmp_path / "out"))
    for tensor in (EMBEDDING, HEAD):
        parents = stored(world, tensor)
        base, a, b = (world.row(parents, name, "t") for name in ("base", "a", "b"))
        expected = base + 0.5 * (a - base) + 0.75 * (b - base)
        torch.testing.assert_close(merged[tensor][world.ids["base"]["t"]], expected, rtol=1e-5, atol=1e-6)


def test_the_ends_of_a_path_are_read_through_the_outputs_tokenizer(world, tmp_path):
    path = [{"model": "base", "layer": 0}, {"model": "a", "layer": 0}]
    out = read(merge(make_recipe(world.models, path=path), tmp_path / "out"))
    base, a = read(world.models["base"]), read(world.models["a"])
    assert torch.equal(out[EMBEDDING], base[EMBEDDING])
    for token, i in world.ids["base"].items():
        own = world.ids["a"].get(token)
        assert torch.equal(out[HEAD][i], base[HEAD][i] if own is None else a[HEAD][own])


def test_models_with_one_tokenizer_are_read_as_they_are(family):
    recipe = make_recipe(family, merge={**MEAN, "inputs": ["a", "b"]})
    plan = plan_merge(recipe, open_parents(recipe))
    assert not plan.views
    assert all(job.view == "" for job in plan.jobs)


def test_padding_of_models_with_one_tokenizer_is_the_bases(tmp_path):
    models = {}
    for seed, name in enumerate(("base", "a", "b")):
        ids = write_tokenizer(tmp_path / name)
        models[name] = write_model(tmp_path / name, ids, seed, rows=272)
    merged = read(merge(make_recipe(models, merge=ARITHMETIC), tmp_path / "out"))[EMBEDDING]
    base, a, b = (read64(models[name])[EMBEDDING] for name in ("base", "a", "b"))
    assert torch.equal(merged[len(ids) :].double(), base[len(ids) :])
    expected = (base + 0.5 * (a - base) + 0.75 * (b - base))[: len(ids)]
    torch.testing.assert_close(merged[: len(ids)].double(), expected, rtol=1e-5, atol=1e-6)


def test_what_is_left_out_is_told(world):
    recipe = make_recipe(world.models, merge=ARITHMETIC)
    told = plan_merge(recipe, open_parents(recipe)).warnings
    assert any(
        w.startswith("'a' has 4 tokens that the output's tokenizer lacks ('Ġd', 'Ġdo', 'Ġdog', …)")
        for w in told
    )
    assert any(
        w.startswith("'b' has 2 tokens that the output's tokenizer lacks ('<|im_end|>', '<tool>');")
        for w in told
    )


def test_a_base_without_tokenizer_is_read_with_an_experts(world, tmp_path):
    ids = {name: world.ids[name] for name in ("base", "b")}
    models = {"a": world.models["a"], "b": world.models["b"]}
    models["base"] = write_model(tmp_path / "base", ids["base"], 7, rows=world.rows["a"])
    out = merge(make_recipe(models, merge=ARITHMETIC), tmp_path / "out")
    assert AutoTokenizer.from_pretrained(out).get_vocab() == world.ids["a"]
    merged, base = read64(out)[EMBEDDING], read64(models["base"])[EMBEDDING]
    parents = stored(world, EMBEDDING)
    i, j = world.ids["a"]["t"], world.ids["b"]["t"]
    expected = base[i] + 0.5 * (parents["a"][i] - base[i]) + 0.75 * (parents["b"][j] - base[i])
    torch.testing.assert_close(merged[i], expected, rtol=1e-5, atol=1e-6)


class TestMistakes:
    def test_no_tokenizer_and_another_number_of_rows(self, world, tmp_path):
        shutil.copytree(world.models["b"], tmp_path / "b")
        for file in (tmp_path / "b").glob("tokenizer*"):
            file.unlink()
        recipe = make_recipe({**world.models, "b": tmp_path / "b"}, merge=ARITHMETIC)
        with pytest.raises(
            CheckpointError,
            match="'b' has no tokenizer files, and 288 rows in its embedding where 'base' has",
        ):
            plan_merge(recipe, open_parents(recipe))

    def test_no_tokenizer_but_as_many_rows(self, tmp_path):
        ids = write_tokenizer(tmp_path / "base")
        models = {"base": write_model(tmp_path / "base", ids, 1), "a": write_model(tmp_path / "a", ids, 2)}
        models["b"] = write_model(tmp_path / "b", write_tokenizer(tmp_path / "b", ["the"]), 3)
        merged = read64(merge(make_recipe(models, merge=ARITHMETIC), tmp_path / "out"))[EMBEDDING]
        base, a, b = (read64(models[name])[EMBEDDING] for name in ("base", "a", "b"))
        torch.testing.assert_close(
            merged, base + 0.5 * (a - base) + 0.75 * (b[: len(base)] - base), rtol=1e-5, atol=1e-6
        )

    def test_a_tokenizer_file_that_is_broken(self, world, tmp_path):
        shutil.copytree(world.models["b"], tmp_path / "b")
        (tmp_path / "b" / "tokenizer.json").write_text('{"model": {"vocab": {"a": "x"}}}')
        recipe = make_recipe({**world.models, "b": tmp_path / "b"}, merge=ARITHMETIC)
        with pytest.raises(
            CheckpointError, match=r"b/tokenizer.json: not a tokenizer file that can be understood"
        ):
            plan_merge(recipe, open_parents(recipe))

    def test_tokenizers_without_a_common_token(self, tmp_path):
        models = {"base": write_model(tmp_path / "base", write_tokenizer(tmp_path / "base"), 1)}
        for name in ("a", "b"):
            models[name] = write_model(tmp_path / name, write_tokenizer(tmp_path / name), 1)
        file = tmp_path / "b" / "tokenizer.json"
        data = json.loads(file.read_text())
        data["model"]["vocab"] = {f"{token}{token}": i for token, i in data["model"]["vocab"].items()}
        data["added_tokens"] = []
        file.write_text(json.dumps(data))
        (tmp_path / "b" / "tokenizer_config.json").unlink()
        recipe = make_recipe(models, merge=ARITHMETIC)
        with pytest.raises(
            CheckpointError, match="the tokenizer of 'b' shares no token with that of the output"
        ):
            plan_merge(recipe, open_parents(recipe))
