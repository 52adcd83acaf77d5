"""The recipe: what its hash covers, how its rules resolve, and what it refuses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomerge.checkpoints.names import parse
from evomerge.errors import UserError
from evomerge.methods import get_method
from evomerge.recipe import Hop, Merge, Recipe, Rule, Source, load_recipe
from evomerge.schema import parse_yaml
from evomerge.settings import Filtered

A, B, C, D = ("a" * 64, "b" * 64, "c" * 64, "d" * 64)
TIES: dict[str, Any] = {
    "evomerge": 1,
    "models": {
        "base": {"source": "/m/base", "sha256": A},
        "x": {"source": "/m/x", "sha256": B},
        "y": {"source": "/m/y", "sha256": C},
    },
    "merges": {
        "merge": {
            "method": "ties",
            "base": "base",
            "inputs": ["x", "y"],
            "parameters": {"weight": {"x": 0.25, "y": 0.5}, "density": 0.5},
            "rules": [
                {"layers": [0, 1], "roles": ["mlp", "attention"], "parameters": {"weight": 0.75}},
                {"tensors": "*norm*", "method": "linear", "parameters": {"weight": 1}},
            ],
        }
    },
    "output": {"dtype": "bfloat16"},
}
LINEAR: dict[str, Any] = {
    "evomerge": 1,
    "models": TIES["models"],
    "merges": {"m": {"method": "linear", "inputs": ["x", "y"], "parameters": {"weight": 0.5}}},
}
Change = Callable[[dict[str, Any]], object]


def changed(data: dict[str, Any], change: Change) -> Recipe:
    before = repr(data)
    data = copy.deepcopy(data)
    change(data)
    assert repr(data) != before
    return Recipe.from_dict(data)


def merge_of(data: dict[str, Any]) -> dict[str, Any]:
    return next(iter(data["merges"].values()))  # type: ignore[no-any-return]


def rename_model(data: dict[str, Any]) -> None:
    data["models"]["zed"] = data["models"].pop("y")
    merge_of(data)["inputs"] = ["x", "zed"]
    merge_of(data)["parameters"]["weight"] = {"zed": 0.5, "x": 0.25}


SAME: dict[str, Change] = {
    "the model's name": rename_model,
    "the merge's name": lambda d: d.update(merges={"other": merge_of(d)}),
    "the folder": lambda d: d["models"]["x"].update(source="/elsewhere/x"),
    "the revision": lambda d: d["models"]["x"].update(revision="main"),
    "the order of models": lambda d: d.update(models=dict(reversed(d["models"].items()))),
    "the order of parameters": lambda d: merge_of(d).update(
        parameters=dict(reversed(merge_of(d)["parameters"].items()))
    ),
    "a model that is not used": lambda d: d["models"].update(w={"source": "/m/w", "sha256": D}),
    "a default spelled out": lambda d: merge_of(d)["parameters"].update({"lambda": 1.0}),
    "a default of a rule's method spelled out": lambda d: merge_of(d)["parameters"].update(normalize=True),
    "the dialect spelled out": lambda d: merge_of(d).update(dialect="paper"),
    "an int for a float": lambda d: merge_of(d)["rules"][1]["parameters"].update(weight=1.0),
    "a value for each input where all agree": lambda d: merge_of(d)["rules"][0]["parameters"].update(
        weight={"x": 0.75, "y": 0.75}
    ),
    "the order of a rule's layers and roles": lambda d: merge_of(d)["rules"][0].update(
        layers=[1, 0, 1], roles=["attention", "mlp"]
    ),
    "the seed of a method without masks": lambda d: d.update(seed=7),
}


@pytest.mark.parametrize("what", SAME)
def test_the_hash_does_not_depend_on(what: str) -> None:
    assert changed(TIES, SAME[what]).hash == Recipe.from_dict(TIES).hash


OTHER: dict[str, Change] = {
    "a weight": lambda d: merge_of(d)["parameters"]["weight"].update(x=0.25000000000000006),
    "weights swapped": lambda d: merge_of(d)["parameters"].update(weight={"x": 0.5, "y": 0.25}),
    "a default overridden": lambda d: merge_of(d)["parameters"].update({"lambda": 1.5}),
    "an input's content": lambda d: d["models"]["x"].update(sha256=D),
    "the base's content": lambda d: d["models"]["base"].update(sha256=D),
    "the order of inputs": lambda d: merge_of(d).update(inputs=["y", "x"]),
    "the order of rules": lambda d: merge_of(d)["rules"].reverse(),
    "a rule's layers": lambda d: merge_of(d)["rules"][0].update(layers=[0, 2]),
    "a rule's roles": lambda d: merge_of(d)["rules"][0].update(roles=["mlp"]),
    "a rule's pattern": lambda d: merge_of(d)["rules"][1].update(tensors="*layernorm*"),
    "a rule's method": lambda d: merge_of(d)["rules"][1].pop("method"),
    "a rule less": lambda d: merge_of(d)["rules"].pop(),
    "the method": lambda d: merge_of(d).update(method="dare_ties"),
    "the number format": lambda d: d["output"].update(dtype="float16"),
    "whose tokenizer": lambda d: d["output"].update(tokenizer="x"),
}


@pytest.mark.parametrize("what", OTHER)
def test_the_hash_depends_on(what: str) -> None:
    assert changed(TIES, OTHER[what]).hash != Recipe.from_dict(TIES).hash


def test_the_base_counts_where_only_a_rule_needs_it() -> None:
    def with_base(digest: str) -> Recipe:
        data = copy.deepcopy(LINEAR)
        data["models"]["base"]["sha256"] = digest
        merge_of(data)["base"] = "base"
        merge_of(data)["rules"] = [{"roles": ["mlp"], "method": "ties"}]
        return Recipe.from_dict(data)

    assert with_base(A).hash != with_base(D).hash


def test_a_base_that_no_method_reads_counts_because_the_output_takes_its_config_from_it() -> None:
    def with_base(digest: str) -> Recipe:
        data = copy.deepcopy(LINEAR)
        data["models"]["base"]["sha256"] = digest
        merge_of(data)["base"] = "base"
        return Recipe.from_dict(data)

    assert len({with_base(A).hash, with_base(D).hash, Recipe.from_dict(LINEAR).hash}) == 3


def test_the_seed_counts_for_random_methods_only() -> None:
    dare = changed(TIES, lambda d: merge_of(d).update(method="dare_ties")).to_dict()
    assert Recipe.from_dict({**dare, "seed": 1}).hash != Recipe.from_dict({**dare, "seed": 2}).hash


def test_an_expression_of_the_inputs_is_another_way_to_write_their_weights() -> None:
    def recipe(weight: object, rule: object) -> Recipe:
        merge = {
            "method": "task_arithmetic",
            "base": "base",
            "inputs": ["a", "b", "the c"],
            "parameters": {"weight": weight},
            "rules": [{"layers": [0], "parameters": {"weight": rule}}],
        }
        models = {name: {"source": name, "sha256": name} for name in ("base", "a", "b", "the c")}
        return Recipe.from_dict({"models": models, "merges": {"m": merge}})

    written = recipe("'the c' + (b - a)", "b / 2")
    assert written.main.parameters["weight"] == {"a": -1, "b": 1, "the c": 1}
    by_name = recipe({"a": -1.0, "b": 1.0, "the c": 1.0}, {"a": 0.0, "b": 0.5, "the c": 0.0})
    assert written.hash == by_name.hash
    assert Recipe.from_dict(parse_yaml(written.to_yaml(), None)) == by_name
    with pytest.raises(
        UserError, match=r"merges\.m\.rules\.0\.parameters\.weight: 'a \* b' multiplies models"
    ):
        recipe(1.0, "a * b")


def test_inputs_of_equal_content_keep_their_own_weights() -> None:
    def twins(x: float, y: float) -> str:
        data = copy.deepcopy(LINEAR)
        data["models"]["y"]["sha256"] = B
        merge_of(data)["parameters"]["weight"] = {"x": x, "y": y}
        return Recipe.from_dict(data).hash

    assert len({twins(0.2, 0.8), twins(0.8, 0.2), twins(0.8, 0.8)}) == 3


def test_the_hash_needs_pinned_models_and_follows_the_pins() -> None:
    loose = changed(LINEAR, lambda d: [model.pop("sha256") for model in d["models"].values()])
    with pytest.raises(ValueError, match=r"models.base: the content hash is not known yet"):
        loose.hash  # noqa: B018
    pinned = loose.pinned({"base": A, "x": B, "y": C})
    assert pinned.hash == Recipe.from_dict(LINEAR).hash
    assert pinned.pinned({"base": A, "x": B, "y": D}).hash != pinned.hash
    assert pinned.model_copy(update={"output": {"dtype": "float16"}}).__dict__.get("hash") is None


def test_the_hash_stays_what_recorded_runs_know() -> None:
    assert Recipe.from_dict(LINEAR).hash == "8d81f4bc4f6ab28c44073fa47bdb34c3808c83eb9b3e7cee429be6862663b954"


def test_paths_hash_by_what_they_visit() -> None:
    def path(*hops: dict[str, Any]) -> Recipe:
        return Recipe.from_dict({**LINEAR, "path": list(hops)})

    plain = path({"model": "x", "layer": 0}, {"merge": "m", "layer": 1})
    assert plain.hash == path({"model": "x", "layer": 0, "scale": 1}, {"merge": "m", "layer": 1}).hash
    others = [
        path({"model": "y", "layer": 0}, {"merge": "m", "layer": 1}),
        path({"model": "x", "layer": 1}, {"merge": "m", "layer": 1}),
        path({"model": "x", "layer": 0, "scale": 0.5}, {"merge": "m", "layer": 1}),
        path({"merge": "m", "layer": 1}, {"model": "x", "layer": 0}),
        path({"model": "x", "layer": 0}),
        Recipe.from_dict(LINEAR),
    ]
    assert len({recipe.hash for recipe in (plain, *others)}) == 1 + len(others)
    unused = {**LINEAR, "path": [{"model": "x", "layer": 0}], "merges": {}}
    assert Recipe.from_dict(unused).hash == path({"model": "x", "layer": 0}).hash


FINITE = st.floats(allow_nan=False, allow_infinity=False)


@given(
    weights=st.tuples(FINITE, FINITE),
    density=st.floats(0, 1),
    scale=FINITE.filter(bool),
    layer=st.integers(0, 500),
    source=st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1),
)
def test_yaml_and_back_keeps_the_hash(
    weights: tuple[float, float], density: float, scale: float, layer: int, source: str
) -> None:
    recipe = Recipe(
        models={"b": Source(source=source, sha256=A), "x": Source(source="1e5", sha256="1" * 60 + "1e55")},
        merges={
            "m": Merge(
                method="ties",
                base="b",
                inputs=("x",),
                parameters={"weight": {"x": weights[0]}, "density": density},
                rules=(
                    Rule(layers=("pre", layer), parameters={"weight": weights[1]}),
                    Rule(roles=("norm",)),
                    Rule(
                        parameters={
                            "weight": {"x": (*weights, 0.0)},
                            "density": (
                                Filtered(filter="1e5", value=(density, 1.0)),
                                Filtered(value=density),
                            ),
                        }
                    ),
                ),
            )
        },
        path=(
            Hop(merge="m", layer=layer, scale=scale),
            Hop(merge="m", layer=0, layers={"x": layer}),
            Hop(model="b", layer=0),
        ),
    )
    back = Recipe.from_dict(parse_yaml(recipe.to_yaml(), None))
    assert back == recipe
    assert back.hash == recipe.hash


def test_a_recipe_file_reads_back_and_its_sources_are_relative_to_it(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "evomerge: 1\n"
        "models:\n"
        "  x: ./x\n"
        "  y: {source: ../y, adapter: ./lora}\n"
        "  z: org/hub\n"
        "merges: {m: {method: linear, inputs: [x, y, z], parameters: {weight: 1e-3}}}\n"
    )
    recipe = load_recipe(file)
    assert recipe.models["x"].source == str(tmp_path / "x")
    assert recipe.models["y"].source == str(tmp_path.parent / "y")
    assert recipe.models["y"].adapter == str(tmp_path / "lora")
    assert recipe.models["z"].source == "org/hub"
    assert recipe.main.parameters == {"weight": 0.001}
    file.write_text(recipe.to_yaml())
    assert load_recipe(file) == recipe


class TestResolve:
    MERGE = Merge(
        method="ties",
        base="base",
        inputs=("x", "y"),
        parameters={"weight": 0.1, "density": 0.9},
        rules=(
            Rule(layers=(2,), parameters={"weight": 0.2}),
            Rule(roles=("mlp",), method="linear", parameters={"weight": 0.3, "density": 0.8}),
            Rule(tensors="*down_proj*", method="task_arithmetic", parameters={"weight": 0.4, "lambda": 2.0}),
        ),
    )

    @pytest.mark.parametrize(
        ("tensor", "method", "values"),
        [
            ("model.embed_tokens.weight", "ties", {"weight": 0.1, "density": 0.9, "lambda": 1.0}),
            (
                "model.layers.2.self_attn.q_proj.weight",
                "ties",
                {"weight": 0.2, "density": 0.9, "lambda": 1.0},
            ),
            ("model.layers.0.mlp.up_proj.weight", "linear", {"weight": 0.3, "normalize": True}),
            ("model.layers.2.mlp.up_proj.weight", "linear", {"weight": 0.2, "normalize": True}),
            ("model.layers.0.mlp.down_proj.weight", "linear", {"weight": 0.3, "normalize": True}),
            ("model.layers.0.self_attn.down_proj.weight", "task_arithmetic", {"weight": 0.4, "lambda": 2.0}),
        ],
    )
    def test_the_first_rule_that_sets_a_parameter_wins(
        self, tensor: str, method: str, values: dict[str, float]
    ) -> None:
        assert self.MERGE.resolve(parse(tensor)) == (method, get_method(method).defaults() | values)

    def test_pre_and_post_are_places_too(self) -> None:
        pre, post = Rule(layers=("pre",)), Rule(layers=("post", 3))
        assert pre.matches(parse("model.embed_tokens.weight"))
        assert not pre.matches(parse("lm_head.weight"))
        assert post.matches(parse("lm_head.weight"))
        assert post.matches(parse("model.layers.3.mlp.up_proj.weight"))
        assert not post.matches(parse("model.layers.13.mlp.up_proj.weight"))

    def test_every_method_in_use_is_listed_once(self) -> None:
        assert self.MERGE.methods == ("ties", "linear", "task_arithmetic")


def rules(*rules_: dict[str, Any]) -> Change:
    return lambda d: merge_of(d).update(rules=list(rules_))


def parameters(**values: Any) -> Change:
    return lambda d: merge_of(d)["parameters"].update(values)


REFUSED: list[tuple[Change, str]] = [
    (lambda d: d.update(modles={}), "unknown key 'modles' (did you mean 'models'?)"),
    (
        lambda d: merge_of(d).update(method="tise"),
        "merges.merge.method: unknown merge method 'tise' (did you mean 't",
    ),
    (
        rules({"method": "liner"}),
        "merges.merge.rules.0.method: unknown merge method 'liner' (did you mean 'linear'?)",
    ),
    (lambda d: merge_of(d).update(inputs=["x", "yy"]), "merges.merge.inputs: no model is called 'yy'"),
    (lambda d: merge_of(d).update(inputs=["x", "x"]), "merges.merge.inputs: a model is listed twice"),
    (lambda d: merge_of(d).update(inputs=[]), "merges.merge.inputs: is empty; give at least 1 entry"),
    (
        lambda d: merge_of(d).update(base="bse"),
        "merges.merge.base: no model is called 'bse' (did you mean 'base'?)",
    ),
    (lambda d: merge_of(d).pop("base"), "merges.merge: ties needs a base to take differences from"),
    (
        lambda d: merge_of(d).update(inputs=["x", "base"]),
        "merges.merge: 'base' is the base and an input; ties needs",
    ),
    (
        lambda d: merge_of(d).update(dialect="other"),
        "merges.merge.dialect: 'other' is not accepted: give paper or me",
    ),
    (lambda d: d["merges"].update(x=merge_of(d)), "merges.x: a model is called 'x' too; rename one"),
    (lambda d: d["merges"].update(n=merge_of(d)), "merges: without a path there is exactly one, here are 2"),
    (lambda d: d.update(merges={}), "merges: without a path there is exactly one, here are 0"),
    (
        parameters(wieght=1),
        "merges.merge.parameters: ties and linear have no parameter 'wieght' (did you mean 'weight'?)",
    ),
    (parameters(density=1.5), "merges.merge.parameters.density: 1.5 lies outside [0, 1]"),
    (parameters(density={"x": 2.0}), "merges.merge.parameters.density.x: 2.0 lies outside [0, 1]"),
    (parameters(weight={"z": 1}), "merges.merge.parameters.weight: 'z' is not an input of the merge"),
    (
        parameters(weight={}),
        "merges.merge.parameters.weight: is empty; give one value for all inputs, or one each by",
    ),
    (
        parameters(weight="big"),
        "merges.merge.parameters.weight: 'big' is not an input of the merge (known: x, y)",
    ),
    (
        parameters(weight=float("nan")),
        "merges.merge.parameters.weight: nan is not accepted: give a finite number",
    ),
    (
        parameters(**{"lambda": {"x": 1}}),
        "merges.merge.parameters.lambda: has one value for all inputs, not one each",
    ),
    (
        rules({"parameters": {"density": 7}}),
        "merges.merge.rules.0.parameters.density: 7.0 lies outside [0, 1]",
    ),
    (
        rules({"roles": ["attn"]}),
        "merges.merge.rules.0.roles: unknown role 'attn' (did you mean 'attention'?)",
    ),
    (
        rules({"layers": [-1]}),
        "merges.merge.rules.0.layers: -1 is not accepted: give layer numbers from 0, pre or post",
    ),
    (
        rules({"layers": ["first"]}),
        "merges.merge.rules.0.layers: 'first' is not accepted: give layer numbers from 0, p",
    ),
    (rules({"layers": 3}), "merges.merge.rules.0.layers: 3 is not accepted: give a list"),
    (
        lambda d: d["models"].update(x=3),
        "models.x: 3 is not accepted: give a folder, a hub id or {source: ..., sha256",
    ),
    (lambda d: d.update(models={}), "models: is empty; give at least 1 entry"),
    (
        lambda d: d["output"].update(dtype="bf16"),
        "output.dtype: 'bf16' is not accepted: give float32, bfloat16 or flo",
    ),
    (
        lambda d: d["output"].update(tokenizer="bse"),
        "output.tokenizer: no model is called 'bse' (did you mean 'base'?)",
    ),
    (lambda d: d.update(seed=1.5), "seed: 1.5 is not accepted: give a whole number"),
    (lambda d: d.update(path=[]), "path: is empty; leave it out for all layers in order"),
    (
        lambda d: d.update(path=[{"layer": 0}]),
        "path.0: a hop names either a 'model' or a 'merge', this one neither",
    ),
    (
        lambda d: d.update(path=[{"model": "x", "merge": "merge", "layer": 0}]),
        "path.0: a hop names either a 'model' or a 'merge', this one both",
    ),
    (lambda d: d.update(path=[{"model": "x"}]), "path.0.layer: this key is required"),
    (
        lambda d: d.update(path=[{"model": "x", "layer": -1}]),
        "path.0.layer: -1 is not accepted: give a number of at l",
    ),
    (
        lambda d: d.update(path=[{"model": "x", "layer": 0, "scale": 0}]),
        "path.0.scale: 0 wipes out the residual strea",
    ),
    (
        lambda d: d.update(path=[{"model": "x", "layer": 0}, {"merge": "mrge", "layer": 0}]),
        "path.1.merge: no merge is called 'mrge' (did you mean 'merge'?)",
    ),
    (lambda d: d.update(path=[{"model": "", "layer": 0}]), "path.0.model: no model is called ''"),
]


@pytest.mark.parametrize(("change", "expected"), REFUSED, ids=[expected[:60] for _, expected in REFUSED])
def test_a_mistake_is_told_in_one_sentence(change: Change, expected: str) -> None:
    data = copy.deepcopy(TIES)
    change(data)
    with pytest.raises(UserError) as caught:
        Recipe.from_dict(data, "r.yaml")
    message = str(caught.value)
    assert message.startswith(f"r.yaml: {expected}")
    assert "\n" not in message


def test_a_parameter_must_suit_every_method_that_takes_it() -> None:
    data = copy.deepcopy(LINEAR)
    merge_of(data)["parameters"] = {}
    with pytest.raises(
        UserError, match=r"merges.m.parameters: linear needs a value for 'weight' for every input"
    ):
        Recipe.from_dict(data)
    merge_of(data)["parameters"] = {"weight": {"x": 0.5}}
    with pytest.raises(UserError, match="needs a value for 'weight' for every input"):
        Recipe.from_dict(data)


def test_slerp_takes_two() -> None:
    data = copy.deepcopy(LINEAR)
    data["models"]["z"] = {"source": "/m/z", "sha256": D}
    merge_of(data).update(method="slerp", inputs=["x", "y", "z"], parameters={"t": 0.5})
    with pytest.raises(UserError, match=r"^merges.m: slerp takes exactly 2 inputs, here are 3$"):
        Recipe.from_dict(data)


def test_files_that_are_no_recipes_are_told_apart(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    for text, expected in [
        ("slices: []\n", "not an evomerge recipe: the first key should be 'evomerge: 1'"),
        ("evomerge: 2\n", "evomerge: version 2 is not known; this is version 1"),
        ("evomerge: 1\n", "models: this key is required"),
        ("- a\n", "a recipe is a mapping of keys to values, this is a list"),
        ("", "this recipe is empty"),
    ]:
        file.write_text(text)
        with pytest.raises(UserError) as caught:
            load_recipe(file)
        assert str(caught.value) == f"{file}: {expected}"
    with pytest.raises(UserError, match="no such recipe"):
        load_recipe(tmp_path / "none.yaml")


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Recipe.from_dict(LINEAR).seed = 1  # type: ignore[misc]
