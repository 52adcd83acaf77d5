"""Linear expressions of models, parsed without evaluating anything."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.methods.expressions import factors

NAMES = ("a", "b", "c", "math-7b", "llama3.1")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("c + (b - a)", {"c": 1, "b": 1, "a": -1}),
        ("b-a+c", {"c": 1, "b": 1, "a": -1}),
        ("a", {"a": 1}),
        ("-a", {"a": -1}),
        ("--a - -b", {"a": 1, "b": 1}),
        ("0.5 * a + b / 4", {"a": 0.5, "b": 0.25}),
        ("(a + b) / 2 - 2 * (c - 0.5 * a)", {"a": 1.5, "b": 0.5, "c": -2}),
        ("a * 2e-1 * 5", {"a": 1}),
        ("1 / 4 * a + 3 * 2 * b", {"a": 0.25, "b": 6}),
        ("'math-7b' - \"a\"", {"math-7b": 1, "a": -1}),
        ("llama3.1 + a", {"llama3.1": 1, "a": 1}),
        ("a - a + b", {"b": 1}),
        ("a + 1 - 1", {"a": 1}),
    ],
)
def test_factors_of_every_input(text: str, expected: dict[str, float]) -> None:
    assert factors(text, NAMES) == pytest.approx({**dict.fromkeys(NAMES, 0), **expected})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("c + (b - d)", r"'c \+ \(b - d\)': 'd' is not an input of the merge"),
        ("math-7b", "'math-7b': 'math' is not an input of the merge .did you mean 'math-7b'"),
        ("a * b", "'a \\* b' multiplies models"),
        ("2 / a", "divides by a model"),
        ("a / 0", "divides by 0"),
        ("a + 1", "'a \\+ 1' adds a number to models"),
        ("1e308 * 10", "has a factor that is not finite"),
        ("3", "'3' names no input"),
        ("", "'' ends where a name or a number should follow"),
        ("a +", "ends where a name or a number should follow"),
        ("(a", "a parenthesis is not closed"),
        ("a)", r"'a\)': '\)' closes nothing"),
        ("a b", "'b' follows without an operator"),
        ("2a", "'a' follows without an operator"),
        ("a ** 2", r"'\*' stands where a name or a number should"),
        ("a % b", "'%' has no place in an expression"),
        ("__import__('os')", "'__import__' is not an input"),
        ("1e308 * 10 * a", "has a factor that is not finite"),
        ("(" * 60 + "a" + ")" * 60, "parentheses are nested deeper than 50"),
    ],
)
def test_what_is_no_linear_expression_is_one_sentence(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        factors(text, NAMES)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="ab+-*/(). 12'e", max_size=20))
def test_any_text_gives_factors_or_a_value_error(text: str) -> None:
    with contextlib.suppress(ValueError):
        assert set(factors(text, ("a", "b"))) == {"a", "b"}


@given(
    st.lists(
        st.tuples(st.sampled_from("+-"), st.floats(0, 9), st.sampled_from("abc")), min_size=1, max_size=8
    )
)
def test_sums_of_products_are_added_up(terms: list[tuple[str, float, str]]) -> None:
    expected = dict.fromkeys("abc", 0.0)
    for sign, number, name in terms:
        expected[name] += number if sign == "+" else -number
    assert factors(" ".join(f"{s} {n!r} * {name}" for s, n, name in terms), "abc") == pytest.approx(expected)
