"""Gradients, filters, layers per input and method groups, down to the merged weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from evomerge.errors import UserError
from evomerge.merging import open_parents, plan_merge
from evomerge.recipe import Recipe
from tests.merging.helpers import make_recipe, read64
from tests.merging.test_plan import LAYER, run
from tests.models import make_family, make_model

Family = dict[str, Path]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("family"), hidden=16, layers=3)


def values(recipe: Recipe) -> dict[str, Any]:
    return {job.name: job.values for job in plan_merge(recipe, open_parents(recipe)).jobs}


def linear(family: Family, weight: Any, **parts: Any) -> Recipe:
    merge = {"method": "linear", "inputs": ["a", "b"], "parameters": {"weight": weight, "normalize": False}}
    return make_recipe(family, merge=merge | parts)


def test_a_gradient_starts_at_the_first_layer_and_holds_for_what_lies_outside(family: Family) -> None:
    weights = values(linear(family, {"a": [0, 1], "b": 2}))
    for layer, weight in enumerate((0, 0.5, 1)):
        assert weights[LAYER.format(layer, "mlp.up_proj")]["weight"] == (weight, 2)
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert weights[name]["weight"] == (0, 2)


def test_filters_select_by_a_part_of_the_name_and_fall_through(family: Family) -> None:
    recipe = linear(
        family,
        {"a": [{"filter": "mlp", "value": [0, 4]}, {"filter": "norm", "value": 9}], "b": 7},
        rules=[
            {"layers": [1], "parameters": {"weight": {"a": [{"filter": "up_proj", "value": 5}]}}},
            {"roles": ["attention"], "parameters": {"weight": {"a": 3}}},
            {"layers": ["pre", "post"], "parameters": {"weight": 1}},
        ],
    )
    weights = {name: found["weight"] for name, found in values(recipe).items()}
    assert weights[LAYER.format(1, "mlp.up_proj")] == (5, 7)
    assert weights[LAYER.format(1, "mlp.down_proj")] == (2, 7)
    assert weights[LAYER.format(2, "mlp.up_proj")] == (4, 7)
    assert weights[LAYER.format(1, "self_attn.q_proj")] == (3, 7)
    assert weights[LAYER.format(0, "input_layernorm")] == (9, 7)
    assert weights["lm_head.weight"] == (1, 1)


def test_a_tensor_that_no_filter_selects_is_named(family: Family) -> None:
    recipe = linear(family, {"a": [{"filter": "layers", "value": 1}], "b": 1})
    with pytest.raises(
        UserError, match=r"tensor '(lm_head|model\.\w+)\.weight' has no value for 'weight' of"
    ):
        plan_merge(recipe, open_parents(recipe))


def test_inputs_of_a_hop_may_give_layers_of_their_own(family: Family) -> None:
    recipe = make_recipe(
        family,
        merges={
            "m": {
                "method": "task_arithmetic",
                "base": "base",
                "inputs": ["a", "b"],
                # Filters see the name in the input for its own parameters, in the output for shared ones.
                "parameters": {
                    "weight": {"a": [0.25, 0.75], "b": [{"filter": "layers.0.", "value": 2}, {"value": 1}]},
                    "lambda": [{"filter": "layers.1.", "value": 0.5}, {"value": 1}],
                },
            }
        },
        path=[
            {"merge": "m", "layer": 1, "layers": {"a": 2}},
            {"model": "c", "layer": 0},
            {"merge": "m", "layer": 2, "layers": {"a": 1, "b": 0}},
        ],
    )
    merged = run(recipe)
    base, a, b, c = (read64(family[name]) for name in ("base", "a", "b", "c"))
    assert sorted(merged) == sorted(base)
    for part in ("self_attn.k_proj", "mlp.down_proj", "post_attention_layernorm"):
        x, y, z = (LAYER.format(layer, part) for layer in range(3))
        first = base[y] + 0.5 * (0.25 * (a[z] - base[y]) + 1 * (b[y] - base[y]))
        first = 2 * (first - base[y]) + base[y]
        third = base[z] + 0.75 * (a[y] - base[z]) + 2 * (b[x] - base[z])
        torch.testing.assert_close(merged[x].double(), first, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(merged[y].double(), c[x])
        torch.testing.assert_close(merged[z].double(), third, rtol=1e-5, atol=1e-6)
    embedding = "model.embed_tokens.weight"
    mean = 0.25 * (a[embedding] - base[embedding]) + (b[embedding] - base[embedding])
    torch.testing.assert_close(merged[embedding].double(), base[embedding] + mean, rtol=1e-5, atol=1e-6)
    assert (
        recipe.pinned(dict.fromkeys("abc", "x") | {"base": "y"}).hash
        != make_recipe(
            family,
            merges={"m": recipe.merges["m"]},
            path=[{"merge": "m", "layer": 1}, {"model": "c", "layer": 0}, {"merge": "m", "layer": 2}],
        )
        .pinned(dict.fromkeys("abc", "x") | {"base": "y"})
        .hash
    )


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"a": 3}, r"path\.0\.layers\.a: 'a' has the layers 0 to 2, not 3"),
        ({"base": 1}, r"path\.0\.layers: 'base' gives the merge its form; write its layer as 'layer'"),
        ({"bb": 1}, r"path\.0\.layers: 'bb' is not an input of 'm' \(did you mean 'b'\?\)"),
        ({"a": -1}, r"path\.0\.layers\.a: -1 is not accepted: give a number of at least 0"),
    ],
)
def test_layers_that_do_not_exist(family: Family, layers: dict[str, int], message: str) -> None:
    merge = {"method": "task_arithmetic", "base": "base", "inputs": ["a", "b"], "parameters": {"weight": 1}}
    hop = {"merge": "m", "layer": 0, "layers": layers}

    def plan() -> None:
        recipe = make_recipe(family, merges={"m": merge}, path=[hop])
        plan_merge(recipe, open_parents(recipe))

    with pytest.raises(UserError, match=message):
        plan()


def test_a_gradient_between_whole_numbers_must_meet_whole_numbers(family: Family) -> None:
    from evomerge.merging.plan import _check_whole
    from evomerge.methods.registry import Parameter

    steps = Parameter("steps", "shared", "", 1, kind="int")
    _check_whole(steps, 3.0, "tensor 'x': steps", "merges.m")
    with pytest.raises(UserError, match=r"merges\.m: tensor 'x': steps: 2\.5 is not a whole number"):
        _check_whole(steps, 2.5, "tensor 'x': steps", "merges.m")


def test_methods_with_different_roles_of_the_base_share_a_recipe(family: Family) -> None:
    recipe = make_recipe(
        family,
        merge={
            "method": "ties",
            "base": "base",
            "inputs": ["a", "b"],
            "parameters": {"weight": 0.5, "density": 1.0, "t": [0, 1]},
            "rules": [
                {"roles": ["attention"], "method": "slerp"},
                {"roles": ["norm"], "method": "linear", "parameters": {"weight": {"a": 3, "b": 1}}},
                {"layers": [2], "roles": ["mlp"], "method": "task_arithmetic"},
            ],
        },
    )
    merged = run(recipe)
    base, a, b = (read64(family[name]) for name in ("base", "a", "b"))
    for layer, t in enumerate((0.0, 0.5, 1.0)):
        q = LAYER.format(layer, "self_attn.q_proj")
        angle = torch.arccos(torch.nn.functional.cosine_similarity(a[q].flatten(), b[q].flatten(), 0))
        parts = torch.sin(torch.stack([(1 - t) * angle, t * angle])) / torch.sin(angle)
        torch.testing.assert_close(
            merged[q].double(), parts[0] * a[q] + parts[1] * b[q], rtol=1e-3, atol=1e-3
        )
        norm = LAYER.format(layer, "input_layernorm")
        torch.testing.assert_close(merged[norm].double(), (3 * a[norm] + b[norm]) / 4, rtol=1e-6, atol=1e-6)
    up = LAYER.format(2, "mlp.up_proj")
    torch.testing.assert_close(merged[up].double(), (a[up] + b[up]) / 2, rtol=1e-5, atol=1e-6)
    up = LAYER.format(0, "mlp.up_proj")
    one, two = (0.5 * (model[up] - base[up]) for model in (a, b))
    agree = torch.where(one * two > 0, (one + two) / 2, torch.where(one.abs() > two.abs(), one, two))
    torch.testing.assert_close(merged[up].double(), base[up] + agree, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": None, "method": "linear"}, "merges.merged: ties needs a base to take differences from"),
        ({"inputs": ["a", "b", "c"]}, "merges.merged: slerp takes exactly 2 inputs, here are 3"),
        (
            {"parameters": {"weight": 1}},
            "merges.merged.parameters: slerp needs a value for 't' for every input",
        ),
        (
            {"parameters": {"weight": 1, "t": 0.5, "nromalize": True}},
            "merges.merged.parameters: linear and ties and slerp have no parameter 'nromalize' (did you mean",
        ),
        (
            {"parameters": {"weight": 1, "t": 0.5, "density": [0.1, 1.5]}},
            "merges.merged.parameters.density: 1.5 lies outside [0, 1]",
        ),
        (
            {"parameters": {"weight": {"a": [{"filter": "x", "value": ["y"]}]}, "t": 0.5}},
            "merges.merged.parameters.weight.a: 'y' is not a finite number",
        ),
    ],
)
def test_mistakes_in_method_groups(family: Family, change: dict[str, Any], message: str) -> None:
    merge: dict[str, Any] = {
        "method": "linear",
        "base": "base",
        "inputs": ["a", "b"],
        "parameters": {"weight": 1, "t": 0.5},
        "rules": [{"roles": ["mlp"], "method": "ties"}, {"roles": ["attention"], "method": "slerp"}],
    }
    with pytest.raises(UserError) as caught:
        make_recipe(family, merge=merge | change)
    assert str(caught.value).startswith(message)


def test_models_of_different_depth_can_share_layers(family: Family, tmp_path: Path) -> None:
    deep = make_model(tmp_path / "deep", seed=5, hidden=16, layers=5)
    recipe = make_recipe(
        {"a": family["a"], "deep": deep},
        merges={"m": {"method": "linear", "inputs": ["a", "deep"], "parameters": {"weight": 1}}},
        path=[{"merge": "m", "layer": 0}, {"merge": "m", "layer": 2, "layers": {"deep": 4}}],
    )
    merged, a, other = run(recipe), read64(family["a"]), read64(deep)
    for part in ("mlp.up_proj", "input_layernorm"):
        mean = (a[LAYER.format(2, part)] + other[LAYER.format(4, part)]) / 2
        torch.testing.assert_close(merged[LAYER.format(1, part)].double(), mean, rtol=1e-6, atol=1e-6)
    with pytest.raises(UserError, match="num_hidden_layers 5"):
        open_parents(make_recipe({"a": family["a"], "deep": deep}, merge=dict(recipe.merges["m"])))
