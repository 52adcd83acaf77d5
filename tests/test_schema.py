"""YAML as people write it, and sentences that say where it went wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, field_validator

from evomerge.errors import UserError, at, nearest
from evomerge.schema import Frozen, Number, Whole, dump_yaml, parse_yaml, read_yaml, shown, validate


def refusal(text: str) -> str:
    with pytest.raises(UserError) as caught:
        parse_yaml(text, "x.yaml")
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "number"),
    [("1e-3", 1e-3), ("1e5", 1e5), ("-2.5E+4", -25000.0), (".5e3", 500.0), ("1.e2", 100.0), ("0.25", 0.25)],
)
def test_numbers_in_exponential_notation_are_numbers(text: str, number: float) -> None:
    value = parse_yaml(f"a: {text}", None)["a"]
    assert isinstance(value, float)
    assert value == number


@pytest.mark.parametrize("text", ["e5", "1e", "1e5x", "0x1e5z", "1-e5", ".e5"])
def test_words_that_only_resemble_numbers_stay_words(text: str) -> None:
    assert parse_yaml(f"a: {text}", None) == {"a": text}


def test_a_key_written_twice_is_refused_with_its_line() -> None:
    assert (
        refusal("a: 1\nb:\n  c: 1\n  c: 2\n")
        == "x.yaml: line 4: not valid YAML: the key 'c' is written twice"
    )
    assert "line 2" in refusal("a: 1\na: 1")


def test_a_merged_key_may_be_overridden() -> None:
    text = "one: &one {a: 1, b: 2}\ntwo:\n  <<: *one\n  b: 3\n"
    assert parse_yaml(text, None)["two"] == {"a": 1, "b": 3}
    assert "written twice" in refusal(text + "  b: 4\n")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: [1", "expected ',' or ']'"),
        ("\ta: 1", "cannot start any token"),
        ("a: 1\n---\nb: 2", "another document"),
        ("a: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("? [a, b]\n: 1", "the key ['a', 'b'] is not a plain value"),
        ("a: 2024-13-45", "month must be in 1..12"),
        ("a: " + "9" * 5000, "limit"),
        ("[" * 5000, "nested too deeply"),
        ("a: \x00", "special characters are not allowed"),
    ],
)
def test_what_is_not_yaml_is_refused_in_one_sentence(text: str, problem: str) -> None:
    message = refusal(text)
    assert message.startswith("x.yaml: ")
    assert "not valid YAML: " in message
    assert problem in message
    assert "\n" not in message


def test_files_that_hold_no_mapping_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    for content, problem in [
        (b"", "this config is empty"),
        (b"# nothing\n", "this config is empty"),
        (b"- 1\n- 2\n", "a config is a mapping of keys to values, this is a list"),
        (b"hello", "a config is a mapping of keys to values, this is the plain value 'hello'"),
        (b"a: \xff\xfe", "this config is not UTF-8 text"),
    ]:
        path.write_bytes(content)
        with pytest.raises(UserError) as caught:
            read_yaml(path, "config")
        assert str(caught.value).startswith(f"{path}: {problem}")
    with pytest.raises(UserError, match=r"nowhere.yaml: no such config$"):
        read_yaml(tmp_path / "nowhere.yaml", "config")
    with pytest.raises(UserError, match="is a folder; name the config file inside it"):
        read_yaml(tmp_path, "config")
    with pytest.raises(UserError, match="cannot read this config: Not a directory"):
        read_yaml(path / "c.yaml", "config")


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: 1\n")
    assert read_yaml(path, "config") == {"a": 1}


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False),
    st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=20),
    st.from_regex(r"\A[-+]?[0-9]{1,3}\.?[0-9]{0,2}[eE][-+]?[0-9]{1,3}\Z"),
)
PLAIN = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text("abcxyz159e.-_", min_size=1), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(PLAIN)
def test_what_is_written_reads_back_the_same(data: object) -> None:
    back = parse_yaml(dump_yaml({"data": data}), None)["data"]
    assert repr(back) == repr(data)


class Inner(Frozen):
    ratio: Number = Field(default=0.5, gt=0, lt=1)
    whole: Whole | None = None

    @field_validator("ratio")
    @classmethod
    def _not_a_third(cls, value: float) -> float:
        if value == 0.75:
            raise ValueError("0.75 is not liked")
        return value


class Outer(Frozen):
    kind: str = "a"
    inner: tuple[Inner, ...] = ()
    named: dict[str, Inner] = Field(default_factory=dict)
    renamed: int = Field(default=1, alias="from")

    @field_validator("inner", mode="before")
    @classmethod
    def _one(cls, data: object) -> object:
        return [data] if isinstance(data, dict) else data


def sentence(data: object) -> str:
    with pytest.raises(UserError) as caught:
        validate(Outer, data, "f.yaml")
    return str(caught.value)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"knd": "x"}, "f.yaml: unknown key 'knd' (did you mean 'kind'?)"),
        ({"zzz": 1}, "f.yaml: unknown key 'zzz' (known: kind, inner, named, from)"),
        ({"inner": {"ratio": 2}}, "f.yaml: inner.ratio: 2 is not accepted: give a number less than 1"),
        ({"inner": [{"ratio": 2}]}, "f.yaml: inner.0.ratio: 2 is not accepted: give a number less than 1"),
        ({"inner": {"ratio": 0.75}}, "f.yaml: inner.ratio: 0.75 is not liked"),
        ({"inner": {"whole": True}}, "f.yaml: inner.whole: true is not accepted: give a whole number"),
        ({"inner": {"ratio": False}}, "f.yaml: inner.ratio: false is not accepted: give a number"),
        ({"named": {"int": {"ratio": "x"}}}, "f.yaml: named.int.ratio: 'x' is not accepted: give a number"),
        (
            {"named": {"Upper": {"ratio": "x"}}},
            "f.yaml: named.Upper.ratio: 'x' is not accepted: give a number",
        ),
        ({"named": {3: {}}}, "f.yaml: named.3: this name is not text; put it in quotes"),
        ({"named": {"a": 3}}, "f.yaml: named.a: 3 is not accepted: give a mapping of keys to values"),
        ({"named": None}, "f.yaml: named: is empty; give a mapping of keys to values"),
        ({"kind": 3}, "f.yaml: kind: 3 is not accepted: give text, in quotes"),
        ({"from": "x"}, "f.yaml: from: 'x' is not accepted: give a whole number"),
        (
            {"inner": {"ratio": float("nan")}},
            "f.yaml: inner.ratio: nan is not accepted: give a finite number",
        ),
    ],
)
def test_sentences_name_the_key_as_the_user_wrote_it(data: object, expected: str) -> None:
    assert sentence(data) == expected


def test_long_values_are_shortened() -> None:
    message = sentence({"inner": {"ratio": "x" * 5000}})
    assert len(message) < 200
    assert shown([None, True, 2.0, 0.5, "a", {"b": (1, 2)}]) == "[null, true, 2, 0.5, 'a', {b: [1, 2]}]"


def test_prefixes_and_hints() -> None:
    assert at("f", "k") == "f: k: "
    assert at(None, "k") == "k: "
    assert at(None) == ""
    assert nearest("wieght", ["weight", "density"]) == " (did you mean 'weight'?)"
    assert nearest("qqq", ["weight"]) == ""
