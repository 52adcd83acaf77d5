"""The registry says what each method takes, and refuses what does not fit."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest

from evomerge.methods import Parameter, all_methods, get_method, methods_table
from evomerge.methods.describe import describe_methods
from evomerge.methods.registry import register
from tests.methods.cases import YEAR


@pytest.mark.parametrize("name", list(all_methods()))
def test_every_method_explains_itself(name: str) -> None:
    method = get_method(name)
    assert method.summary.endswith(".")
    assert YEAR.search(method.paper)
    assert method.dialects
    for parameter in method.parameters:
        assert parameter.doc.endswith(".")
        assert set(parameter.dialects) <= set(method.dialects)
        for dialect in method.dialects:
            if parameter.default_in(dialect) is not None:
                parameter.check(parameter.default_in(dialect), "default")


@pytest.mark.parametrize("name", list(all_methods()))
def test_dialects_that_differ_say_in_what(name: str) -> None:
    method = get_method(name)
    if len(method.dialects) > 1:
        assert method.differs.endswith(".")
    else:
        assert not method.differs


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("linear", "unused"),
        ("slerp", "unused"),
        ("task_arithmetic", "origin"),
        ("ties", "origin"),
        ("dare_linear", "origin"),
        ("dare_ties", "origin"),
    ],
)
def test_what_the_base_is_for(name: str, role: str) -> None:
    assert get_method(name).base == role


def test_the_base_is_an_input_of_mergekits_slerp() -> None:
    assert get_method("slerp").base_in("mergekit") == "input"


def test_what_draws_masks_says_so() -> None:
    for name, method in all_methods().items():
        assert method.random == name.startswith(("dare", "della", "knots")), name


def test_a_name_can_be_taken_once() -> None:
    with pytest.raises(ValueError, match="'ties' is registered twice"):
        register(dataclasses.replace(get_method("ties")))


def test_an_unknown_method_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown merge method 'tise' \(did you mean 'ties'\?\)"):
        get_method("tise")


def test_slerp_takes_exactly_two_inputs() -> None:
    with pytest.raises(ValueError, match=r"merges\.m: slerp takes exactly 2 inputs, here are 3"):
        get_method("slerp").check_inputs(None, ("a", "b", "c"), "merges.m")


def test_a_base_that_is_an_input_counts_as_one() -> None:
    slerp = get_method("slerp")
    for inputs in (("b",), ("a", "b"), ("b", "a")):
        slerp.check_inputs("a", inputs, "here", "mergekit")
        assert slerp.merged("a", inputs, "mergekit") == ("a", "b")
    with pytest.raises(ValueError, match="here: slerp takes exactly 2 inputs, here are 3 with the base"):
        slerp.check_inputs("c", ("a", "b"), "here", "mergekit")
    with pytest.raises(ValueError, match="here are 1 with the base"):
        slerp.check_inputs("a", ("a",), "here", "mergekit")
    with pytest.raises(ValueError, match="slerp needs a base as the first of the models it merges"):
        slerp.check_inputs(None, ("a", "b"), "here", "mergekit")


def test_a_base_that_is_an_input_leaves_no_room_for_values_by_input() -> None:
    method = dataclasses.replace(get_method("linear"), name="new", base="input")
    with pytest.raises(ValueError, match="new: the base as an input has no value of its own for 'weight'"):
        register(method)


def test_task_vectors_need_a_base_that_is_no_input() -> None:
    with pytest.raises(ValueError, match="needs a base"):
        get_method("ties").check_inputs(None, ("a",), "here")
    with pytest.raises(ValueError, match="'a' is the base and an input"):
        get_method("ties").check_inputs("a", ("a", "b"), "here")


@pytest.mark.parametrize("value", [True, "0.3", None, float("nan"), float("inf")])
def test_a_number_is_a_finite_number(value: object) -> None:
    with pytest.raises(ValueError, match=r"place: .* is not a finite number"):
        Parameter("x", "shared", "").check(value, "place")


def test_values_outside_the_bounds_are_refused_with_the_bounds() -> None:
    with pytest.raises(ValueError, match=r"place: 1.5 lies outside \[0, 1\]"):
        Parameter("x", "shared", "", low=0, high=1).check(1.5, "place")
    with pytest.raises(ValueError, match=r"place: -1 lies outside \[0, inf\)"):
        Parameter("x", "shared", "", low=0).check(-1, "place")


def test_words_and_switches_are_checked() -> None:
    with pytest.raises(ValueError, match="neither true nor false"):
        Parameter("x", "shared", "", kind="bool").check(1, "place")
    with pytest.raises(ValueError, match="'c' is not one of a, b"):
        Parameter("x", "shared", "", kind="choice", choices=("a", "b")).check("c", "place")


def test_negative_weights_are_allowed_except_as_factors_of_what_is_divided_by() -> None:
    for method in all_methods().values():
        for parameter in method.parameters:
            if parameter.name == "weight" and not method.needs:
                parameter.check(-0.2, "weight")
            elif parameter.name == "weight":
                with pytest.raises(ValueError, match="lies outside"):
                    parameter.check(-0.2, "weight")


def test_the_table_is_plain_data() -> None:
    table = methods_table()
    assert json.loads(json.dumps(table)) == table
    entries = {entry["name"]: entry for entry in table}
    ties = {parameter["name"]: parameter for parameter in entries["ties"]["parameters"]}
    weight, density, scale = (ties[name] for name in ("weight", "density", "lambda"))
    assert (weight["scope"], weight["default"]) == ("expert", 1.0)
    assert (density["scope"], density["default"], density["low"], density["high"]) == (
        "expert",
        0.2,
        0.0,
        1.0,
    )
    assert (scale["scope"], scale["default"]) == ("shared", 1.0)
    assert entries["linear"]["parameters"][0]["required"]
    assert entries["slerp"]["inputs"] == {"least": 2, "most": 2}


def test_the_description_names_every_parameter() -> None:
    text = describe_methods("dare_ties")
    assert all(word in text for word in ("dare_ties", "weight", "density", "lambda", "2311.03099"))
    with pytest.raises(ValueError, match="unknown merge method"):
        describe_methods("nothing")


def test_the_description_says_what_a_dialect_changes_and_which_data_is_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    method = dataclasses.replace(
        get_method("linear"),
        kernels=dict.fromkeys(("paper", "mergekit"), get_method("linear").kernels["paper"]),
        needs="fisher",
        differs="The latter is greener.",
        parameters=(
            Parameter("x", "shared", "How green.", 1.0, defaults={"mergekit": 2.0}),
            Parameter("y", "expert", "How blue.", dialects=("mergekit",)),
        ),
    )
    monkeypatch.setattr("evomerge.methods.describe.all_methods", lambda: {"linear": method})
    text = describe_methods()
    assert "needs data: a diagonal Fisher information of every input" in text
    assert "dialects differ: The latter is greener." in text
    assert "x (one for all, default 1, in mergekit 2): How green." in text
    assert "y (one per expert, mergekit only, required): How blue." in text
    (entry,) = methods_table()
    assert (entry["needs"], entry["differs"]) == ("fisher", "The latter is greener.")
    assert entry["parameters"][0]["defaults"] == {"paper": 1.0, "mergekit": 2.0}
    assert entry["parameters"][1]["dialects"] == ["mergekit"]


def test_importing_the_registry_brings_all_methods_and_no_transformers() -> None:
    code = (
        "import sys; from evomerge.methods.registry import all_methods; "
        "print('ties' in all_methods(), 'transformers' in sys.modules, 'ray' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["True", "False", "False"]
