"""Settings mean what mergekit's mean, and say what is wrong with them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from evomerge.schema import dump_yaml, parse_yaml
from evomerge.settings import canonical, depth_of, evaluate, read_setting, read_value

numbers = st.floats(-1e6, 1e6)
gradients = st.lists(numbers, min_size=1, max_size=6)
filters = st.one_of(st.none(), st.sampled_from(["*", "", "self_attn", "mlp", "layers.1.", "weight"]))
conditions = st.lists(
    st.fixed_dictionaries({"value": st.one_of(numbers, gradients)}, optional={"filter": filters}),
    min_size=1,
    max_size=4,
)
NAMES = ["model.layers.1.self_attn.q_proj.weight", "model.layers.11.mlp.up_proj.bias", "lm_head.weight"]


@pytest.fixture(scope="module")
def config() -> Any:
    return pytest.importorskip("mergekit.config")


@settings(deadline=None)
@given(
    data=st.one_of(numbers, gradients, conditions),
    name=st.sampled_from(NAMES),
    index=st.integers(0, 40),
    rest=st.integers(0, 40),
)
def test_values_are_those_of_mergekit(config: Any, data: Any, name: str, index: int, rest: int) -> None:
    depth = depth_of(index, index + rest + 1)
    theirs = config.evaluate_setting(
        name, TypeAdapter(config.ParameterSetting).validate_python(data), depth, validate=float
    )
    assert evaluate(read_setting(data), name, depth) == theirs


@pytest.mark.parametrize(
    ("depth", "value"), [(0.0, "sum"), (0.49, "sum"), (0.5, "count"), (0.99, "count"), (1.0, "max")]
)
def test_words_step_and_the_last_one_holds_at_the_last_layer_only(depth: float, value: str) -> None:
    assert evaluate(read_setting(["sum", "count", "max"]), "x", depth) == value
    truth = {"sum": False, "count": True, "max": False}
    assert evaluate(read_setting([False, True, False]), "x", depth) is truth[value]


def test_the_only_layer_is_the_last() -> None:
    assert depth_of(0, 1) == 1.0
    assert [depth_of(i, 5) for i in range(5)] == [0, 0.25, 0.5, 0.75, 1]


@given(st.one_of(numbers, gradients, conditions))
def test_yaml_and_back_keeps_a_setting(data: Any) -> None:
    setting = read_setting(data)
    text = dump_yaml({"v": data})
    assert read_setting(parse_yaml(text, None)["v"]) == setting
    assert canonical(read_setting(parse_yaml(text, None)["v"])) == canonical(setting)


def test_inputs_may_each_have_a_form_of_their_own() -> None:
    value = read_value({"a": 1, "b": [0, 1], "c": {"filter": "mlp", "value": [0.5]}, "d": [{"value": True}]})
    assert isinstance(value, dict)
    assert value["a"] == 1.0
    assert value["b"] == (0.0, 1.0)
    assert evaluate(value["c"], "x.mlp.y", 0.3) == 0.5
    assert evaluate(value["c"], "x.attn.y", 0.3) is None
    assert evaluate(value["d"], "anything", 0.3) is True


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "is empty; give at least one value"),
        (None, "is empty; give a value, a list of values over depth, or a list of {filter:"),
        ([0.5, {"value": 1}], "a list holds plain values, one after another over depth, or entries"),
        ([{"filter": "mlp"}], "'value' is missing"),
        ([{"filtre": "mlp", "value": 1}], "unknown key 'filtre' (did you mean 'filter'?)"),
        ([{"filter": 3, "value": 1}], "the filter 3 is not text"),
        ([{"filter": "mlp", "value": [{"value": 1}]}], "filters cannot be nested"),
        ([[0.5, 1]], "[0.5, 1] is not accepted: give a value, a list"),
        (float("inf"), "inf is not accepted: give a finite number"),
        (10**400, "is not accepted: give a finite number"),
        ({"a": {"b": 1}}, "a: {b: 1} is not accepted"),
        ({1: 2}, "the name 1 is not text"),
    ],
)
def test_mistakes(data: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        read_value(data)
    assert message in str(caught.value)
