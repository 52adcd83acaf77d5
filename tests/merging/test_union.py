"""The tokenizer of the output: of several models, of a folder, with rows of choice; the ids in its settings."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer

from evomerge.checkpoints.tokenizer import read_vocabulary
from evomerge.checkpoints.union import UnionTokenizer
from evomerge.errors import CheckpointError, UserError
from evomerge.merging import merge, open_parents, plan_merge
from tests.merging.helpers import make_recipe, read, read64
from tests.merging.speakers import EMBEDDING, HEAD, World, stored, write_model, write_tokenizer
from tests.merging.test_vocabulary import ARITHMETIC, MEAN, WEIGHTS


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


def build(world, out, tokenizer, merge_=ARITHMETIC, **output):
    return merge(make_recipe(world.models, merge=merge_, output={"tokenizer": tokenizer, **output}), out)


class TestUnion:
    def test_the_tokens_of_the_base_keep_their_ids_and_those_of_the_experts_follow_in_order(
        self, world, tmp_path
    ):
        tokenizer = AutoTokenizer.from_pretrained(build(world, tmp_path / "out", "union"))
        vocab = tokenizer.get_vocab()
        further = ["Ġd", "Ġdo", "Ġdog", "<|im_end|>", "<tool>"]
        count = len(world.ids["base"])
        assert vocab == world.ids["base"] | {token: count + i for i, token in enumerate(further)}
        assert tokenizer.convert_ids_to_tokens(tokenizer("the cat dog<|im_end|><tool>").input_ids) == [
            *("the", "Ġcat", "Ġdog", "<|im_end|>", "<tool>")
        ]
        assert tokenizer.decode(tokenizer("the dog<tool>").input_ids, skip_special_tokens=True) == "the dog"

    @pytest.mark.parametrize("tensor", [EMBEDDING, HEAD])
    def test_every_token_has_the_row_that_was_merged_for_it(self, world, tmp_path, tensor):
        out = build(world, tmp_path / "out", "union")
        merged, parents = read64(out)[tensor], stored(world, tensor)
        vocab = AutoTokenizer.from_pretrained(out).get_vocab()
        for token, i in vocab.items():
            rows = {name: world.row(parents, name, token) for name in parents}
            having = [row for row in rows.values() if row is not None]
            base = rows["base"] if rows["base"] is not None else sum(having) / len(having)
            expected = base + sum(
                w * ((base if rows[n] is None else rows[n]) - base) for n, w in WEIGHTS.items()
            )
            torch.testing.assert_close(merged[i], expected, rtol=1e-5, atol=1e-6, msg=token)
        assert len(merged) == world.rows["base"] > len(vocab)
        assert torch.equal(merged[len(vocab) :], parents["base"][len(vocab) :])

    def test_models_with_one_tokenizer_have_it_as_it_is(self, family, tmp_path):
        merged = {**MEAN, "inputs": ["a", "b"]}
        out = merge(make_recipe(family, merge=merged, output={"tokenizer": "union"}), tmp_path / "out")
        for file in family["a"].glob("tokenizer*"):
            assert (out / file.name).read_bytes() == file.read_bytes()

    def test_rows_beyond_the_bases_are_added(self, tmp_path):
        ids = {
            name: write_tokenizer(tmp_path / name, (), ["<t>"] * (name == "b")) for name in ("base", "a", "b")
        }
        models_ = {n: write_model(tmp_path / n, own, i) for i, (n, own) in enumerate(ids.items())}
        out = merge(make_recipe(models_, merge=ARITHMETIC, output={"tokenizer": "union"}), tmp_path / "out")
        model = AutoModelForCausalLM.from_pretrained(out)
        assert model.config.vocab_size == len(ids["b"]) == len(ids["base"]) + 1
        assert torch.equal(read(out)[EMBEDDING][-1], read(models_["b"])[EMBEDDING][-1])

    def test_tokens_without_a_row_in_their_model_do_not_come_along(self, tmp_path):
        ids = write_tokenizer(tmp_path / "base")
        models_ = {"base": write_model(tmp_path / "base", ids, 1)}
        for i, name in enumerate("ab"):
            own = write_tokenizer(tmp_path / name, (), ["<t>"])
            models_[name] = write_model(tmp_path / name, own, i, rows=len(ids))
        out = merge(make_recipe(models_, merge=ARITHMETIC, output={"tokenizer": "union"}), tmp_path / "out")
        assert AutoTokenizer.from_pretrained(out).get_vocab() == ids
        assert len(read(out)[EMBEDDING]) == len(ids)

    def test_settings_of_older_tokenizers_are_extended(self, world, tmp_path):
        shutil.copytree(world.models["base"], tmp_path / "base")
        file = tmp_path / "base" / "tokenizer_config.json"
        data = json.loads(file.read_text())
        data["added_tokens_decoder"] = {
            str(i): {"content": token, "special": True} for i, token in enumerate(("<s>", "</s>", "<pad>"))
        }
        file.write_text(json.dumps(data))
        models_ = {**world.models, "base": tmp_path / "base"}
        out = merge(make_recipe(models_, merge=ARITHMETIC, output={"tokenizer": "union"}), tmp_path / "out")
        decoder = json.loads((out / "tokenizer_config.json").read_text())["added_tokens_decoder"]
        assert {entry["content"] for entry in decoder.values()} >= {"<|im_end|>", "<tool>", "<s>"}
        assert AutoTokenizer.from_pretrained(out).get_vocab() == dict(read_vocabulary(out).ids)

    @pytest.mark.parametrize("kind", ["Qwen2Tokenizer", "GPT2Tokenizer", "LlamaTokenizer"])
    def test_the_classes_of_transformers_load_it(self, world, tmp_path, kind):
        shutil.copytree(world.models["base"], tmp_path / "base")
        file = tmp_path / "base" / "tokenizer_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "tokenizer_class": kind}))
        models_ = {**world.models, "base": tmp_path / "base"}
        own = set(AutoTokenizer.from_pretrained(tmp_path / "base").get_vocab()) - set(world.ids["base"])
        out = merge(make_recipe(models_, merge=ARITHMETIC, output={"tokenizer": "union"}), tmp_path / "out")
        vocab = AutoTokenizer.from_pretrained(out).get_vocab()
        assert {t: i for t, i in vocab.items() if t not in own} == dict(read_vocabulary(out).ids)

    def test_unigram_vocabularies_keep_their_scores(self, tmp_path):
        def write(folder, words, added):
            folder.mkdir()
            scored = [("<unk>", 0.0), *((word, -1.0 - i) for i, word in enumerate(words))]
            tokenizer = Tokenizer(models.Unigram(scored, unk_id=0))
            tokenizer.add_special_tokens(added)
            tokenizer.save(str(folder / "tokenizer.json"))
            return folder

        base = write(tmp_path / "base", ["a", "b"], ["<s>"])
        other = write(tmp_path / "other", ["b", "ab", "c"], ["<s>", "<t>"])
        union = UnionTokenizer(base, ((other, 6),))
        assert union.ids == {"<unk>": 0, "a": 1, "b": 2, "<s>": 3, "ab": 4, "c": 5, "<t>": 6}
        union.write(tmp_path)
        loaded = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        assert loaded.get_vocab() == union.ids
        assert loaded.encode("abc<t>").tokens == ["ab", "c", "<t>"]

    def test_a_tokenizer_that_cannot_be_understood(self, world, tmp_path):
        shutil.copytree(world.models["b"], tmp_path / "b")
        file = tmp_path / "b" / "tokenizer.json"
        data = json.loads(file.read_text())
        data["model"]["merges"] = [3]
        file.write_text(json.dumps(data))
        recipe = make_recipe(
            {**world.models, "b": tmp_path / "b"}, merge=ARITHMETIC, output={"tokenizer": "union"}
        )
        with pytest.raises(CheckpointError, match=r"b/tokenizer.json: not a tokenizer file"):
            plan_merge(recipe, open_parents(recipe))


class TestFolder:
    def test_a_folder_gives_the_tokens(self, world, tmp_path):
        ids = write_tokenizer(tmp_path / "other", ["Ġdog"], ["<new>"])
        recipe = make_recipe(
            world.models, merge=ARITHMETIC, output={"tokenizer": {"source": str(tmp_path / "other")}}
        )
        plan = plan_merge(recipe, open_parents(recipe))
        assert any("known to no model ('<new>')" in warning for warning in plan.warnings)
        out = merge(recipe, tmp_path / "out")
        assert AutoTokenizer.from_pretrained(out).get_vocab() == ids
        merged, parents = read64(out)[EMBEDDING], stored(world, EMBEDDING)
        assert len(merged) == len(ids)
        torch.testing.assert_close(merged[ids["Ġdog"]], world.row(parents, "a", "Ġdog"), rtol=1e-5, atol=1e-6)
        assert not merged[ids["<new>"]].any()

    def test_a_folder_with_the_models_own_tokens_changes_no_row(self, world, tmp_path):
        write_tokenizer(tmp_path / "same", ["the", "Ġcat"])
        plain = read(build(world, tmp_path / "plain", "base"))
        out = read(build(world, tmp_path / "out", str(tmp_path / "same")))
        assert all(torch.equal(tensor, plain[name]) for name, tensor in out.items())

    def test_its_content_is_pinned(self, world, tmp_path):
        write_tokenizer(tmp_path / "same", ["the", "Ġcat"])
        out = build(world, tmp_path / "out", str(tmp_path / "same"))
        (tmp_path / "same" / "tokenizer_config.json").write_text("{}")
        with pytest.raises(UserError, match=r"output.tokenizer.sha256: the recipe expects"):
            merge(out / "evomerge_recipe.yaml", tmp_path / "again")

    def test_a_folder_without_tokenizer(self, world, tmp_path):
        with pytest.raises(CheckpointError, match="nowhere: has no tokenizer files"):
            build(world, tmp_path / "out", str(tmp_path / "nowhere"))


class TestPadding:
    def test_rows_are_a_multiple(self, world, tmp_path):
        out = build(world, tmp_path / "out", {"source": "a", "pad_to_multiple_of": 32})
        merged = read64(out)[EMBEDDING]
        assert len(merged) == 288 == AutoModelForCausalLM.from_pretrained(out).config.vocab_size
        mean = merged[: len(world.ids["a"])].mean(dim=0)
        torch.testing.assert_close(merged[-1], mean, rtol=1e-4, atol=1e-5)

    def test_the_bases_own_padding_comes_first(self, world, tmp_path):
        out = build(world, tmp_path / "out", {"source": "base", "pad_to_multiple_of": 266})
        parents = stored(world, EMBEDDING)
        assert torch.equal(read64(out)[EMBEDDING][-1], parents["base"][265])

    def test_equal_tokenizers_are_padded_too(self, family, tmp_path):
        merged = {**MEAN, "inputs": ["a", "b"]}
        output = {"tokenizer": {"source": "base", "pad_to_multiple_of": 64}}
        assert (
            len(read(merge(make_recipe(family, merge=merged, output=output), tmp_path / "out"))[HEAD]) == 320
        )


class TestTokenRules:
    def test_rows_come_from_where_the_rules_say(self, world, tmp_path):
        rules = {
            "<tool>": {"source": {"kind": "zero"}, "force": True},
            "<|im_end|>": {"source": "b"},
            "Ġdog": {"source": {"kind": "model_token", "model": "base", "token": "Ġcat"}, "force": True},
            "t": {"source": {"kind": "model_token", "model": "a", "token_id": 3}, "force": True},
        }
        out = build(world, tmp_path / "out", {"source": "union", "tokens": rules})
        vocab, merged = AutoTokenizer.from_pretrained(out).get_vocab(), read64(out)[EMBEDDING]
        parents = stored(world, EMBEDDING)
        assert not merged[vocab["<tool>"]].any()
        cat = world.row(parents, "base", "Ġcat")
        torch.testing.assert_close(merged[vocab["Ġdog"]], cat, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(merged[vocab["t"]], parents["a"][3], rtol=1e-6, atol=1e-6)
        base = world.row(parents, "b", "<|im_end|>")
        expected = base + 0.5 * (world.row(parents, "a", "<|im_end|>") - base)
        torch.testing.assert_close(merged[vocab["<|im_end|>"]], expected, rtol=1e-5, atol=1e-6)

    def test_models_with_one_tokenizer_follow_them_too(self, family, tmp_path):
        rules = {"A": {"source": {"kind": "zero"}, "force": True}}
        output = {"tokenizer": {"source": "base", "tokens": rules}}
        out = merge(
            make_recipe(family, merge={**MEAN, "inputs": ["a", "b"]}, output=output), tmp_path / "out"
        )
        row = AutoTokenizer.from_pretrained(out).get_vocab()["A"]
        assert [i for i, r in enumerate(read(out)[EMBEDDING]) if not r.any()] == [row]

    @pytest.mark.parametrize(
        ("rules", "message"),
        [
            ({"<x>": {"source": "a"}}, "tokens.<x>: the output's tokenizer has no such token"),
            ({"<tool>": {"source": "a"}}, r"tokens.<tool>.source: the model 'a' has no token '<tool>'"),
            ({"t": {"source": {"model": "a", "token_id": 999}}}, "the model 'a' has no row 999"),
            ({"t": {"source": "c"}}, "output.tokenizer.tokens.t: no model is called 'c'"),
            ({"t": {"source": {"kind": "zero", "model": "a"}}}, "give either kind: zero, or a model"),
        ],
    )
    def test_rules_that_name_nothing(self, world, tmp_path, rules, message):
        with pytest.raises(UserError, match=message):
            build(world, tmp_path / "out", {"source": "b", "tokens": rules})


class TestSettings:
    """Which ids config and generation config have."""

    @pytest.fixture
    def chat(self, tmp_path):
        """A base, and an expert that ends its turns with a token of its own and lists two ends."""
        base = write_tokenizer(tmp_path / "base", ["the"])
        own = write_tokenizer(
            tmp_path / "a", ["the"], ["<|im_end|>"], eos="<|im_end|>", order=[*reversed(base)]
        )
        found = {
            "base": write_model(tmp_path / "base", base, 1),
            "a": write_model(tmp_path / "a", own, 2, eos="<|im_end|>"),
        }
        file = found["a"] / "generation_config.json"
        data = json.loads(file.read_text())
        ends = [own["<|im_end|>"], own["</s>"]]
        file.write_text(json.dumps({**data, "eos_token_id": ends}))
        file = found["base"] / "generation_config.json"
        data = json.loads(file.read_text())
        file.write_text(json.dumps({**data, "temperature": 0.25, "do_sample": True, "suppress_tokens": [5]}))
        return found, base, own

    def ends(self, out):
        model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
        return model, tokenizer

    def test_another_models_tokenizer_brings_its_ends(self, chat, tmp_path):
        found, base, own = chat
        merged = {"method": "linear", "base": "base", "inputs": ["base", "a"], "parameters": {"weight": 0.5}}
        out = merge(make_recipe(found, merge=merged, output={"tokenizer": "a"}), tmp_path / "out")
        model, tokenizer = self.ends(out)
        assert tokenizer.eos_token_id == model.config.eos_token_id == own["<|im_end|>"]
        assert model.config.bos_token_id == tokenizer.bos_token_id == own["<s>"] != base["<s>"]
        assert model.config.pad_token_id == tokenizer.pad_token_id == own["<pad>"]
        assert model.generation_config.eos_token_id == [own["<|im_end|>"], own["</s>"]]
        assert model.generation_config.temperature == 0.25
        token = {i: t for t, i in base.items()}[5]
        assert model.generation_config.suppress_tokens == [own[token]]

    def test_a_union_keeps_the_bases(self, chat, tmp_path):
        found, base, _ = chat
        merged = {"method": "linear", "base": "base", "inputs": ["base", "a"], "parameters": {"weight": 0.5}}
        out = merge(make_recipe(found, merge=merged, output={"tokenizer": "union"}), tmp_path / "out")
        model, tokenizer = self.ends(out)
        assert tokenizer.eos_token_id == model.config.eos_token_id == base["</s>"]
        assert (out / "generation_config.json").read_bytes() == (
            found["base"] / "generation_config.json"
        ).read_bytes()

    def test_a_folders_settings_name_the_ends(self, chat, tmp_path):
        found, base, _ = chat
        ids = write_tokenizer(tmp_path / "f", (), ["<end>"], eos="<end>", order=[*reversed(base)])
        merged = {"method": "linear", "base": "base", "inputs": ["base", "a"], "parameters": {"weight": 0.5}}
        out = merge(make_recipe(found, merge=merged, output={"tokenizer": f"{tmp_path}/f"}), tmp_path / "out")
        model, tokenizer = self.ends(out)
        assert model.config.eos_token_id == tokenizer.eos_token_id == ids["<end>"]
        assert model.generation_config.eos_token_id == ids["<end>"]
        assert model.config.pad_token_id == ids["<pad>"]
