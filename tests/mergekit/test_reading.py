"""What a mergekit YAML becomes, and what is said about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from evomerge.cli import main
from evomerge.errors import CheckpointError, UserError
from evomerge.mergekit import from_mergekit, is_mergekit, open_recipe, read_mergekit
from evomerge.mergekit.parameters import PARAMETERS
from evomerge.merging import merge
from evomerge.methods.registry import all_methods
from evomerge.recipe import Hop
from evomerge.settings import Filtered
from tests.merging.helpers import digests, read
from tests.models import make_family

LINEAR = """
models:
- {model: a, parameters: {weight: 0.3}}
- {model: b, parameters: {weight: 0.7}}
merge_method: linear
dtype: float32
out_dtype: bfloat16
"""


def reading(text: str, **changes: Any) -> Any:
    data = {**yaml.safe_load(text), **changes}
    return from_mergekit({key: value for key, value in data.items() if value != "-"}, "m.yml")


def refused(data: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        from_mergekit(data, "m.yml")
    message = str(caught.value)
    assert message.startswith("m.yml: ")
    assert "\n" not in message
    return message.removeprefix("m.yml: ")


class TestModels:
    def test_are_called_by_their_folders(self) -> None:
        recipe = reading(
            LINEAR, models=[{"model": m, "parameters": {"weight": 1}} for m in ("x/m", "y/m", "m@v2")]
        )
        assert [*recipe.recipe.models] == ["m", "m-2", "m-3"]
        assert [m.source for m in recipe.recipe.models.values()] == ["x/m", "y/m", "m"]
        assert recipe.recipe.models["m-3"].revision == "v2"

    @pytest.mark.parametrize(
        "ref",
        [
            "org/model@main+org/lora",
            {"model": {"path": "org/model", "revision": "main"}, "lora": {"path": "org/lora"}},
            {"model": "org/model@main", "lora": "org/lora", "override_architecture": "LlamaForCausalLM"},
        ],
    )
    def test_with_an_adapter(self, ref: Any) -> None:
        found = reading(LINEAR, models=[{"model": ref, "parameters": {"weight": 1}}]).recipe.models
        (name, source), *_ = found.items()
        assert name == "model+lora"
        assert (source.source, source.revision, source.adapter) == ("org/model", "main", "org/lora")

    def test_are_looked_up_where_one_works_and_beside_the_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        here, there = tmp_path / "here", tmp_path / "there"
        for folder in (here / "a", there / "a", there / "b"):
            folder.mkdir(parents=True)
        monkeypatch.chdir(here)
        file = there / "m.yml"
        file.write_text(LINEAR + "base_model: ./c\nparameters: {weight: 1}\n")
        sources = {name: model.source for name, model in read_mergekit(file).recipe.models.items()}
        assert sources == {"a": str(here / "a"), "b": str(there / "b"), "c": str(there / "c")}

    def test_a_folder_may_have_any_name(self, tmp_path: Path) -> None:
        folder = tmp_path / "a+b@c@d+e"
        folder.mkdir()
        found = reading(LINEAR, models=[{"model": str(folder), "parameters": {"weight": 1}}]).recipe.models
        assert found[folder.name].source == str(folder)
        assert found[folder.name].adapter is None


class TestParameters:
    def test_the_most_specific_place_wins_and_filters_fall_through(self) -> None:
        recipe = reading(
            LINEAR,
            models=[
                {"model": "a", "parameters": {"weight": {"filter": "mlp", "value": [0, 1]}}},
                {"model": "b", "parameters": None},
            ],
            parameters={"weight": [{"filter": "norm", "value": "2"}, {"value": "1e-1"}], "normalize": 0},
        ).recipe
        merge = recipe.main
        assert merge.parameters == {
            "weight": (Filtered(filter="norm", value=2.0), Filtered(value=0.1)),
            "normalize": False,
        }
        assert merge.rules[0].parameters == {"weight": {"a": (Filtered(filter="mlp", value=(0.0, 1.0)),)}}

    def test_what_does_nothing_is_said(self) -> None:
        notes = reading(
            LINEAR,
            models=[{"model": "a", "parameters": {"weight": 1, "normalize": False, "density": 0.5}}],
            parameters={"int8_mask": True, "t": 0.5},
        ).notes
        assert notes == (
            "models.0.parameters.normalize: does nothing, as in mergekit: it is one value for all models; write it "
            "under 'parameters' at the top or of the slice",
            "models.0.parameters.density: does nothing in linear",
            "parameters.int8_mask: does nothing in linear",
            "parameters.t: does nothing in linear",
        )

    def test_every_parameter_of_mergekit_is_known(self) -> None:
        registry = pytest.importorskip("mergekit.merge_methods.registry")
        theirs = {p.name for method in registry.registered_methods() for p in method.spec.parameters}
        assert theirs == PARAMETERS

    def test_methods_have_mergekits_parameters_and_defaults(self) -> None:
        """All but those that cannot change the result."""
        registry = pytest.importorskip("mergekit.merge_methods.registry")
        ours = {name: m for name, m in all_methods().items() if "mergekit" in m.dialects}
        for peer in registry.registered_methods():
            if peer.spec.name not in ours:
                continue
            method = ours.pop(peer.spec.name)
            inert = {"int8_mask"} | ({"density", "rescale"} if method.name == "task_arithmetic" else set())
            found = {p.name: p for p in method.parameters_in("mergekit")}
            theirs = {p.name: p for p in peer.spec.parameters if p.name not in inert}
            assert found.keys() == theirs.keys(), method.name
            for name, parameter in theirs.items():
                scope = "shared" if parameter.scope.value == "shared" else "expert"
                assert found[name].scope == scope, (method.name, name)
                default = found[name].default_in("mergekit")
                if parameter.required and default is not None:
                    assert (name, default) == ("weight", 1.0)
                    continue
                if (method.name, name) == ("passthrough", "scale"):
                    assert (default, parameter.default) == (1.0, None)
                    continue
                assert default == (None if parameter.required else parameter.default), (method.name, name)
        assert not ours, "a method claims a dialect of mergekit that mergekit does not have"


class TestOutput:
    def test_tokenizer_and_template_are_the_output_of_the_recipe(self) -> None:
        tokens = {"<x>": {"source": "c"}, "<y>": {"source": {"kind": "zero"}, "force": True}}
        found = reading(
            LINEAR,
            tokenizer={"source": "union", "tokens": tokens, "pad_to_multiple_of": 64},
            chat_template="chatml",
        )
        tokenizer = found.recipe.output.vocabulary
        assert (tokenizer.source, tokenizer.pad_to_multiple_of) == ("union", 64)
        assert [(rule.source.kind, rule.source.model, rule.force) for rule in tokenizer.tokens.values()] == [
            ("model_token", "c", False),
            ("zero", None, True),
        ]
        assert found.recipe.output.chat_template == "chatml"
        assert any(note.startswith("chat_template: chatml is the format's") for note in found.notes)

    def test_models_are_not_called_as_the_output_calls_other_things(self) -> None:
        models = [
            {"model": f"org/{name}", "parameters": {"weight": 1}} for name in ("union", "auto", "chatml")
        ]
        recipe = reading(LINEAR, models=models, tokenizer_source="union").recipe
        assert [*recipe.models] == ["union-2", "auto-2", "chatml-2"]

    def test_without_a_tokenizer_source_it_is_the_bases(self) -> None:
        recipe = reading(LINEAR, base_model="b").recipe
        assert recipe.output.tokenizer == "b"
        assert recipe.main.base == "b"


class TestSlices:
    TEXT = """
slices:
- sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [2, 4]}]
- sources: [{model: b, layer_range: [1, 2]}, {model: a, layer_range: [1, 2]}]
  base_model: b
merge_method: slerp
base_model: a
parameters: {t: 0.5}
dtype: float16
"""

    def test_become_hops_with_a_layer_per_model(self) -> None:
        found = reading(self.TEXT)
        assert found.recipe.path == (
            Hop(merge="slice0", layer=0, layers={"b": 2}),
            Hop(merge="slice0", layer=1, layers={"b": 3}),
            Hop(merge="slice1", layer=1),
        )
        assert [merge.base for merge in found.recipe.merges.values()] == ["a", "b"]
        assert found.recipe.output.dtype == "float16"
        assert found.notes == (
            "dtype: float16 would be mergekit's arithmetic; here it is float32, rounded once at the end",
        )

    def test_a_base_that_gives_no_layers_is_told(self) -> None:
        slices = [{"sources": [{"model": m, "layer_range": [i, i + 1]}]} for i, m in enumerate("ab")]
        stack = {"merge_method": "passthrough", "dtype": "float16", "slices": slices}
        for base, told in (("c", True), ("a", False)):
            found = from_mergekit({**stack, "base_model": base})
            note = (
                "base_model: the config comes from 'a', whose layers come first; mergekit takes that of 'c'"
            )
            assert (note in found.notes) is told
            assert found.recipe.output.tokenizer == base

    def test_a_model_that_mergekit_leaves_out_of_the_head_is_told(self) -> None:
        slices = [
            {"sources": [{"model": "a", "layer_range": [0, 1]}]},
            {"sources": [{"model": m, "layer_range": [1, 2]} for m in "ab"]},
        ]
        found = reading(LINEAR, models="-", slices=slices, parameters={"weight": 1})
        assert any(
            note.startswith("slices.1.sources: all models take part in the final") for note in found.notes
        )


def changed(**changes: Any) -> dict[str, Any]:
    data = {**yaml.safe_load(LINEAR), **changes}
    return {key: value for key, value in data.items() if value != "-"}


def sources(*ranges: Any) -> list[dict[str, Any]]:
    return [{"sources": [{"model": m, "layer_range": r} for m, r in zip("abc", ranges, strict=False)]}]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (changed(dtpe="float32"), "unknown key 'dtpe' (did you mean 'dtype'?)"),
        (changed(paramters={}), "unknown key 'paramters' (did you mean 'parameters'?)"),
        (changed(models=[{"modle": "a"}]), "models.0: unknown key 'modle' (did you mean 'model'?)"),
        (
            changed(merge_method="linaer"),
            "merge_method: no method is called 'linaer' (did you mean 'linear'?)",
        ),
        (changed(merge_method="-"), "merge_method: this key is required"),
        (
            changed(parameters={"wieght": 1}),
            "parameters: linear has no parameter 'wieght' (did you mean 'weight'?)",
        ),
        (
            changed(parameters={"densty": 1}),
            "parameters: linear has no parameter 'densty' (did you mean 'density'?)",
        ),
        (changed(models="-"), "exactly one of models, slices, modules is needed, here is none"),
        (
            changed(slices=sources([0, 1])),
            "exactly one of models, slices, modules is needed, here is models and",
        ),
        (changed(models=[{"model": "a"}]), "models: 'a' has no weight, which linear needs"),
        (
            changed(base_model="base"),
            "models: 'base' has no weight, which linear needs; it is the base_model, which this method counts as a",
        ),
        (changed(models=[{"model": "a"}, {"model": "a"}]), "models.1.model: 'a' is listed twice"),
        (changed(models=[{"model": 3}]), "models.0.model: 3 is not accepted: give a folder or a hub id"),
        (changed(models=[{"model": "a@b@c"}]), "models.0.model: 'a@b@c' has more than one '@'"),
        (changed(models=[{"model": "a+b+c"}]), "models.0.model: 'a+b+c' has more than one '+'"),
        (
            changed(models=[{"model": {"model": "a", "loar": "b"}}]),
            "models.0.model: unknown key 'loar' (did you me",
        ),
        (changed(parameters={"weight": []}), "parameters.weight: is empty; give at least one value"),
        (changed(parameters={"weight": "much"}), "parameters.weight: 'much' is not a finite number"),
        (
            changed(parameters={"normalize": "perhaps"}),
            "parameters.normalize: 'perhaps' is neither true nor false",
        ),
        (changed(parameters={"weight": {"x": 1}}), "parameters.weight: unknown key 'x'"),
        (
            changed(dtype="bf16"),
            "dtype: 'bf16' is not accepted (did you mean 'bfloat16'?): give bfloat16, float16",
        ),
        (
            changed(out_dtype="float64"),
            "out_dtype: 'float64' cannot be written; give float32, bfloat16, float16",
        ),
        (
            changed(models="-", slices=sources([0, 0])),
            "slices.0.sources.0.layer_range: [0, 0] holds no layer",
        ),
        (
            changed(models="-", slices=sources([0])),
            "slices.0.sources.0.layer_range: [0] is not accepted: give [first",
        ),
        (
            changed(models="-", slices=sources(3)),
            "slices.0.sources.0.layer_range: 3 is not accepted: give [first, on",
        ),
        (
            changed(models="-", slices=sources([0, 1], [0, 2])),
            "slices.0.sources: the layer ranges have 1, 2 layers; they must be equally long",
        ),
        (
            changed(models="-", slices=[{"sources": [{"model": "a"}]}]),
            "slices.0.sources.0.layer_range: this key is",
        ),
        (
            changed(models="-", modules={"text": {}}),
            "modules.text: a module has either 'slices' or 'models', this",
        ),
        (
            changed(models="-", modules={k: {"models": [{"model": "a"}]} for k in ("text", "vision")}),
            "modules: text, vision are several; models with more than one module are not read from a mergekit YAML",
        ),
        (
            changed(merge_method="slerp", parameters={"t": 0.5}),
            "base_model: this key is required; slerp needs a base",
        ),
        (
            changed(merge_method="passthrough", parameters={}),
            "models: passthrough takes exactly 1 input, here are 2",
        ),
        (
            changed(merge_method="slerp", base_model="c", parameters={"t": 0.5}),
            "models: slerp takes exactly 2 inputs, here are 3",
        ),
        (
            changed(chat_template="chatlm"),
            "chat_template: no template is called 'chatlm' (did you mean 'chatml'?)",
        ),
        (changed(tokenizer_source="base"), "tokenizer_source: base is given, but there is no base_model"),
        (
            changed(tokenizer_source="base", tokenizer={}),
            "tokenizer_source: 'tokenizer' takes its place; give one",
        ),
    ],
)
def test_mistakes_are_told_with_key_and_fix(data: dict[str, Any], message: str) -> None:
    assert refused(data).startswith(message)


def test_a_tokenizer_source_needs_tokenizers(tmp_path: Path) -> None:
    family = make_family(tmp_path, hidden=16, layers=1, tokenizer=False)
    models = [{"model": str(family[name]), "parameters": {"weight": 1}} for name in "ab"]
    recipe = reading(LINEAR, models=models, tokenizer_source="union").recipe
    with pytest.raises(CheckpointError, match="none of the models has tokenizer files"):
        merge(recipe, tmp_path / "out")


def test_the_kinds_of_files_are_told_apart_by_their_keys(tmp_path: Path) -> None:
    assert is_mergekit({"slices": []})
    assert not is_mergekit({"evomerge": 1, "models": {}})
    file = tmp_path / "x.yml"
    file.write_text("version: 1\n")
    with pytest.raises(UserError, match=r"x\.yml: not an evomerge recipe"):
        open_recipe(file)


def test_the_merge_command_takes_both_and_says_what_differs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_family(tmp_path, hidden=16, layers=2)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    (tmp_path / "m.yml").write_text(LINEAR + "parameters: {int8_mask: true}\n")
    assert main(["merge", "m.yml", "out", "--max-shard-size", "20KB"]) == 0
    printed = capsys.readouterr()
    assert printed.out.strip() == "out"
    assert printed.err.splitlines() == [
        "dialect: mergekit",
        "note: parameters.int8_mask: does nothing in linear",
        "note: no base_model: config and tokenizer come from 'a'; mergekit takes those of any of the models",
    ]
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert main(["merge", "out/evomerge_recipe.yaml", "again"]) == 0
    assert digests(read(tmp_path / "again")) == digests(read(tmp_path / "out"))
    assert capsys.readouterr().err.splitlines() == ["dialect: mergekit"]
