from __future__ import annotations

from evomerge.spaces import baseline_recipes, undefined_baselines
from tests.spaces.conftest import make_config, make_sources

WEIGHT = {"weight": {"range": [0, 1]}}


def test_base_and_experts_are_single_inputs_of_weight_one():
    config = make_config(WEIGHT)
    recipes = baseline_recipes(config, make_sources(config))
    assert list(recipes) == ["base", "a", "b", "c", "uniform"]
    for name in ("base", "a", "b", "c"):
        merge = recipes[name].main
        assert (merge.method, merge.inputs, merge.parameters) == ("linear", (name,), {"weight": 1.0})
    assert len({recipe.hash for recipe in recipes.values()}) == 5


def test_uniform_weighs_all_experts_alike():
    config = make_config(WEIGHT, experts=("a", "b", "c", "d"))
    merge = baseline_recipes(config, make_sources(config))["uniform"].main
    assert merge.inputs == ("a", "b", "c", "d")
    assert merge.parameters == {"weight": 0.25}


def test_uniform_of_one_expert_is_undefined_with_a_reason():
    config = make_config(WEIGHT, experts=("only",))
    assert list(baseline_recipes(config, make_sources(config))) == ["base", "only"]
    assert undefined_baselines(config) == {
        "uniform": "there is only one expert, its average is the expert itself"
    }
    assert undefined_baselines(make_config(WEIGHT)) == {}
