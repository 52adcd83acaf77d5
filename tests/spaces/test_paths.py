"""Layer paths: what every genotype decodes to, and that equal paths are equal recipes."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.config import Config, parse_config
from evomerge.errors import UserError
from evomerge.recipe import Hop
from evomerge.spaces import PathSpace, baseline_recipes, space_for, undefined_baselines
from evomerge.spaces.describe import describe_path
from evomerge.spaces.edits import Edit
from evomerge.spaces.genotype import Genotype
from evomerge.spaces.paths import Step, tidied
from tests.spaces.conftest import make_sources

SCALE = {"range": [0.5, 2.0]}


def make_config(**space: Any) -> Config:
    data = {
        "version": 1,
        "models": {"base": "/zoo/base", "experts": {name: f"/zoo/{name}" for name in "abc"}},
        "space": {"type": "layers", "pool": ["a", "b"], **space},
        "budget": {"candidates": 100},
        "suite": {"tasks": ["add"]},
    }
    return parse_config(data, Path("config.yaml"))


def make_space(*, layers: int = 6, **space: Any) -> PathSpace:
    config = make_config(**space)
    return PathSpace(config, num_layers=layers, sources=make_sources(config))


def hops_of(space: PathSpace, genotype: Genotype, layers: int = 6) -> list[tuple[str, int, float]]:
    """A genotype's path; that of a whole model written out."""
    recipe = space.decode(genotype)
    if recipe.path is None:
        return [(recipe.main.inputs[0], layer, 1.0) for layer in range(layers)]
    return [(str(hop.model), hop.layer, hop.scale) for hop in recipe.path]


@st.composite
def spaces(draw: Any) -> tuple[PathSpace, int, dict[str, Any]]:
    layers = draw(st.integers(3, 9))
    options = {
        "pool": draw(st.sampled_from([["a"], ["a", "b"], ["b", "base", "c"]])),
        "repeats": draw(st.integers(1, 3)),
        "genome": draw(st.sampled_from(["edits", "indicators"])),
        "scale": draw(st.sampled_from([1, SCALE, {"range": [0.9, 1.0], "step": 0.03}])),
        "min_layers": draw(st.integers(2, layers)),
        "max_layers": draw(st.integers(layers, 2 * layers)),
        "max_edits": draw(st.integers(1, 6)),
    }
    if options["pool"] == ["a"] and options["repeats"] == 1:
        options["repeats"] = 2
    return make_space(layers=layers, **options), layers, options


@st.composite
def genotypes(draw: Any, space: PathSpace) -> Genotype:
    return tuple(
        float(draw(st.integers(0, len(c.choices) - 1)))
        if c.kind == "choice"
        else draw(st.floats(0, 1, allow_nan=False))
        for c in space.coordinates
    )


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_every_genotype_is_a_path_within_the_limits(data: Any) -> None:
    space, layers, options = data.draw(spaces())
    hops = hops_of(space, data.draw(genotypes(space)), layers)
    first = options["pool"][0]
    assert hops[0] == (first, 0, 1.0)
    assert hops[-1][:2] == (first, layers - 1)
    assert options["min_layers"] <= len(hops) <= space.longest <= options["max_layers"]
    most = max(Counter((model, layer) for model, layer, _ in hops).values())
    # The last layer of a path of indicators stands behind its repetitions.
    assert most <= options["repeats"] + (options["genome"] == "indicators")
    low, high = options["scale"]["range"] if options["scale"] != 1 else (1, 1)
    step = options["scale"].get("step", 0.05) if options["scale"] != 1 else 1
    for (model, layer, _), (other, following, scale) in pairwise(hops):
        assert low - 1e-9 <= scale <= high + 1e-9
        assert abs((scale - 1) / step - round((scale - 1) / step)) < 1e-6
        if (model, layer + 1) == (other, following):
            assert scale == 1
    products = np.cumprod([scale for *_, scale in hops])
    assert all(1 / 8 <= p <= 8 for p in products)


def test_the_longest_path_is_one_that_there_is() -> None:
    space = make_space(genome="indicators", repeats=1, max_layers=12)
    everything = tuple(1.0 for _ in space.coordinates)
    assert len(hops_of(space, everything)) == space.longest == 12
    assert make_space(genome="indicators", repeats=1, max_layers=40).longest == 13
    assert make_space(repeats=1, max_edits=4, max_layers=40).longest == 12
    assert make_space(repeats=3, max_edits=2, max_layers=40).longest == 6 + 2 * 3


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_equal_paths_are_equal_recipes(data: Any) -> None:
    space, layers, _ = data.draw(spaces())
    one, other = data.draw(genotypes(space)), data.draw(genotypes(space))
    same = hops_of(space, one, layers) == hops_of(space, other, layers)
    assert same == (space.decode(one).hash == space.decode(other).hash)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_mutants_and_crossings_are_genotypes_of_the_space(data: Any) -> None:
    space, layers, _ = data.draw(spaces())
    assert space.variation is not None
    numbers = np.random.default_rng(data.draw(st.integers(0, 99)))
    genotype, other = space.initial, data.draw(genotypes(space))
    for _ in range(5):
        mutant = space.variation.mutate(genotype, numbers)
        again = np.random.default_rng(7), np.random.default_rng(7)
        assert space.variation.mutate(other, again[0]) == space.variation.mutate(other, again[1])
        genotype = space.variation.cross(mutant, other, numbers)
        for each in (mutant, genotype):
            assert len(each) == space.dimension
            assert all(type(x) is float for x in each)
            hops_of(space, each, layers)


def test_an_edited_genotype_holds_what_changes_the_path_and_nothing_else() -> None:
    space = make_space(scale=SCALE)
    assert space.variation is not None
    numbers = np.random.default_rng(0)
    for _ in range(300):
        genotype = space.variation.mutate(space.initial, numbers)
        edits = space._genome._decoded(genotype)  # type: ignore[union-attr]
        assert edits
        for i in range(len(edits)):
            fewer = space._genome._encoded(edits[:i] + edits[i + 1 :])  # type: ignore[union-attr]
            assert space.decode(fewer).hash != space.decode(genotype).hash


@pytest.mark.parametrize("genome", ["edits", "indicators"])
def test_the_search_starts_at_the_first_model_which_is_a_baseline(genome: str) -> None:
    config = make_config(genome=genome, pool=["b", "a"])
    sources = make_sources(config)
    space = space_for(config, 6, sources)
    baselines = baseline_recipes(config, sources)
    assert list(baselines) == ["base", "a", "b", "c"]
    assert space.decode(space.initial).hash == baselines["b"].hash
    assert undefined_baselines(config) == {"uniform": "a search over layer paths averages nothing"}
    assert config.form.tokenizer == "b"


def edited(*edits: Edit, **options: Any) -> list[tuple[str, int, float]]:
    """The path of a list of edits, by way of a genotype."""
    space = make_space(scale=SCALE, **options)
    numbers = list(space.initial)
    width = space.dimension // 6
    for slot, edit in enumerate(edits):
        kinds = ("none", "insert", "repeat", "skip", "swap")
        units = [(edit.at - 1) / 4, edit.model, edit.layer / 5, (edit.length - 1) / 2]
        scales = [np.log(scale / 0.5) / np.log(4) for scale in (edit.enter, edit.leave)]
        numbers[slot * width : (slot + 1) * width] = [float(kinds.index(edit.kind)), *units, *scales]
    return hops_of(space, tuple(map(float, numbers)))


A = [("a", layer, 1.0) for layer in range(6)]


def test_edits_do_what_they_are_called() -> None:
    assert edited() == A
    inserted = [("b", 4, 1.2), ("b", 5, 1.0), ("a", 2, 0.8)]
    insert = Edit("insert", 2, 1, 4, 2, 1.2, 0.8)
    assert edited(insert) == [*A[:2], *inserted, *A[3:]]
    assert edited(Edit("repeat", 3, length=2, enter=0.9)) == [*A[:3], ("a", 1, 0.9), *A[2:]]
    assert edited(Edit("skip", 2, length=2, enter=1.5)) == [*A[:2], ("a", 4, 1.5), A[5]]
    assert edited(Edit("swap", 2, 1, length=2, leave=1.1)) == [
        *A[:2],
        ("b", 2, 1.0),
        ("b", 3, 1.0),
        ("a", 4, 1.1),
        A[5],
    ]
    assert edited(insert, Edit("skip", 4, length=1)) == [*A[:2], *inserted, A[3], A[5]]


def test_edits_that_break_a_limit_are_left_out() -> None:
    skip, repeat = Edit("skip", 1, length=3), Edit("repeat", 3, length=3)
    assert edited(skip, min_layers=4) == A
    assert edited(repeat, max_layers=8) == A
    assert edited(repeat, repeats=1) == A
    assert edited(repeat, repeat, repeats=2) == edited(repeat) == [*A[:3], *A]
    assert edited(Edit("repeat", 4, length=2), repeat, max_layers=8) == edited(Edit("repeat", 4, length=2))


def test_indicators_lay_out_the_pool_as_evollm_does() -> None:
    space = make_space(layers=3, genome="indicators", scale=1)
    names = [c.name for c in space.coordinates]
    assert names == ["a 1", "a 2", "b 0", "b 1", "b 2", *(f"{m} {i} #2" for m in "ab" for i in range(3))]
    on = {"a 1", "b 2", "a 1 #2"}
    hops = hops_of(space, tuple(float(name in on) for name in names), 3)
    assert [hop[:2] for hop in hops] == [("a", 0), ("a", 1), ("b", 2), ("a", 1), ("a", 2)]
    everything = hops_of(space, (1.0,) * len(names), 3)
    assert len(everything) == 6
    assert [h[:2] for h in everything] == [("a", 0), ("a", 1), ("a", 2), ("b", 0), ("b", 1), ("a", 2)]


@pytest.mark.parametrize("pool", [["a", "b"], ["a", "b", "c"]])
def test_a_sparse_start_differs_from_the_first_model_in_one_or_two_layers(pool: list[str]) -> None:
    def mean_changes(**options: Any) -> float:
        space = make_space(layers=12, genome="indicators", pool=pool, repeats=3, **options)
        chances = [(c.weights[1], c.initial) for c in space.coordinates if c.kind == "choice"]
        return sum(1 - p if initial else p for p, initial in chances)

    assert mean_changes() == pytest.approx(1.5)
    others = len(pool) * 12 * 3 - 11
    assert mean_changes(start="paper") == pytest.approx(0.5 * (others - 1) + 10 * 0.023, abs=0.6)
    edits = make_space(layers=12, pool=pool)
    assert sum(1 - c.weights[0] for c in edits.coordinates if c.weights) == pytest.approx(1.5)


def test_scales_stand_at_jumps_only_and_their_product_stays_moderate() -> None:
    steps = [Step(0, 0, 2.0), Step(0, 1, 2.0), *(Step(1, 1, 2.0) for _ in range(5)), Step(1, 2, 0.5)]
    assert [step.scale for step in tidied(steps)] == [1, 1, 2, 2, 2, 1, 1, 1]


def test_a_longer_path_pays_for_each_layer() -> None:
    space = make_space(length_penalty=0.01)
    assert space.penalty(space.decode(space.initial)) == 0
    numbers = list(space.initial)
    numbers[:5] = [2.0, 0.5, 0.0, 0.0, 0.5]
    recipe = space.decode(tuple(numbers))
    assert space.penalty(recipe) == pytest.approx(0.01 * (len(recipe.path or ()) - 6))
    assert space.penalty(recipe) > 0


def test_a_path_is_shown_as_runs_of_layers() -> None:
    hops = [Hop(model="a", layer=i) for i in range(3)]
    hops += [Hop(model="b", layer=2, scale=1.15), Hop(model="b", layer=3)]
    hops += [Hop(model="a", layer=3), Hop(merge="m", layer=4, layers={"c": 1}), Hop(model="a", layer=5)]
    assert describe_path(hops) == "a 0–2, b 2–3 ×1.15, a 3, m 4 (c 1), a 5"


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"pool": ["a", "x"]}, "space.pool: no model is called 'x'"),
        ({"pool": ["a", "a"]}, "space.pool: 'a' is listed twice"),
        ({"pool": []}, "space.pool: is empty; give at least 1 entry"),
        ({"repeat": 2}, "space: unknown key 'repeat' (did you mean 'repeats'?)"),
        ({"repeats": 0}, "space.repeats: 0 is not accepted: give a number greater than 0"),
        ({"scale": 1.5}, "space.scale: 1.5 is not accepted: give 1, or {range: [low, high]}"),
        ({"scale": {"range": [1.1, 2]}}, "space.scale.range: [1.1, 2] is not accepted"),
        ({"scale": {"range": 2}}, "space.scale.range: 2 is not accepted: give two numbers"),
        ({"scale": {"range": [0.9, 2], "step": 3}}, "space.scale.step: 3 leaves no scale but 1 in [0.9, 2]"),
        ({"min_layers": 5, "max_layers": 4}, "space.min_layers: 5 is more than max_layers, 4"),
        ({"genome": "bits"}, "space.genome: 'bits' is not accepted: give edits or indicators"),
        ({"start": "paper"}, "space.start: paper is how indicators start"),
        (
            {"type": "layer"},
            "space.type: 'layer' is not accepted: give coefficients or layers or coefficients+layers",
        ),
    ],
)
def test_mistakes_are_told_with_their_key(space: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        make_config(**space)
    assert f"config.yaml: {message}" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("optimizer", "genome", "message"),
    [
        ("tpe", "edits", "optimizer.type: tpe is not accepted"),
        ("cma", "edits", "optimizer.type: cma searches paths as indicators"),
    ],
)
def test_optimizers_that_cannot_search_paths_are_refused(optimizer: str, genome: str, message: str) -> None:
    data = make_config(genome=genome).model_dump(by_alias=True, exclude_none=True)
    with pytest.raises(UserError, match=message):
        parse_config(data, Path("config.yaml"), [f"optimizer.type={optimizer}"])


def test_the_optimizer_follows_the_genome_and_a_chosen_one_stands() -> None:
    assert make_config().optimizer.type == "edits"
    assert make_config(genome="indicators").optimizer.type == "catcma"
    data = make_config(genome="indicators").model_dump(by_alias=True, exclude_none=True)
    data["optimizer"] = {"population": 8}
    assert parse_config(data, Path("c.yaml")).optimizer.model_dump() == {
        "type": "catcma",
        "sigma": 0.2,
        "population": 8,
        "layers": None,
    }


COEFFICIENTS = {"method": "linear", "parameters": {"weight": {"range": [0, 1]}}}


def two_spaces(*, changes: dict[str, Any] | None = None, **layers: Any) -> Config:
    data = {
        "version": 1,
        "models": {"base": "/zoo/base", "experts": {name: f"/zoo/{name}" for name in "abc"}},
        "space": {"type": "coefficients+layers", "coefficients": COEFFICIENTS, "layers": layers},
        "budget": {"candidates": 100},
        "suite": {"tasks": ["add"]},
        **(changes or {}),
    }
    return parse_config(data, Path("config.yaml"))


def test_the_winner_of_the_coefficients_comes_first_in_a_pool_that_does_not_name_it() -> None:
    config = two_spaces(pool=["b"])
    assert config.layers is not None
    assert config.layers.pool == ("merged", "b")
    assert (config.optimizer.type, config.optimizer.layers and config.optimizer.layers.type) == (
        "cma",
        "edits",
    )
    assert config.form.tokenizer == "base"
    assert parse_config(config.model_dump(by_alias=True, exclude_none=True), Path("c.yaml")) == config
    named = two_spaces(pool=["b", "merged"], genome="indicators")
    assert named.layers is not None
    assert named.layers.pool == ("b", "merged")
    assert named.optimizer.layers is not None
    assert named.optimizer.layers.type == "catcma"
    assert named.form.tokenizer == "b"


def test_a_path_through_a_merge_names_it_and_the_whole_merge_is_itself() -> None:
    config = two_spaces(pool=["merged", "b"])
    sources = make_sources(config)
    coefficients = space_for(config, 6, sources)
    merged = coefficients.decode((0.25,) * coefficients.dimension)
    space = PathSpace(config, num_layers=6, sources=sources).with_merged(merged)
    assert space.decode(space.initial) == merged
    path = space.probe(scale=2.0).path or ()
    assert [(hop.merge, hop.model) for hop in path] == [("merged", None)] * 6 + [(None, "b")] * 6 + [
        ("merged", None)
    ]
    assert [hop.scale for hop in path] == [1.0, 2.0] + [1.0] * 11
    assert space.probe().merges == merged.merges


@pytest.mark.parametrize(
    ("changes", "layers", "message"),
    [
        ({}, {"pool": ["x"]}, "space.layers.pool: no model is called 'x'"),
        ({}, {"pool": ["a"], "genom": 1}, "space.layers: unknown key 'genom' (did you mean 'genome'?)"),
        (
            {"optimizer": {"layers": {"type": "tpe"}}},
            {"pool": ["a"]},
            "optimizer.layers.type: tpe is not accepted",
        ),
        (
            {"optimizer": {"layers": {"type": "cma"}}},
            {"pool": ["a"]},
            "optimizer.layers.type: cma searches paths",
        ),
        ({"optimizer": {"type": "edits"}}, {"pool": ["a"]}, "optimizer.type: edits changes layer paths"),
        (
            {"budget": {"candidates": 9, "layers": 1}},
            {"pool": ["a"]},
            "budget.layers: 1 is not accepted: give",
        ),
    ],
)
def test_mistakes_in_two_spaces_are_told_with_their_key(
    changes: dict[str, Any], layers: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as caught:
        two_spaces(changes=changes, **layers)
    assert f"config.yaml: {message}" in str(caught.value)


@pytest.mark.parametrize("key", ["budget.layers=0.3", "optimizer.layers={type: edits}"])
def test_what_belongs_to_two_phases_is_refused_in_one(key: str) -> None:
    data = make_config().model_dump(by_alias=True, exclude_none=True)
    with pytest.raises(UserError, match=r"layers: needs space\.type coefficients\+layers"):
        parse_config(data, Path("config.yaml"), [key])


@pytest.mark.parametrize(
    ("layers", "options", "message"),
    [
        (6, {"max_layers": 5}, "space.max_layers: 5 is less than the 6 layers of 'a'"),
        (6, {"min_layers": 7}, "space.min_layers: 7 is more than the 6 layers of 'a'"),
        (2, {}, "space.pool: the models have 2 layers"),
    ],
)
def test_limits_that_exclude_the_first_model_are_refused(
    layers: int, options: dict[str, Any], message: str
) -> None:
    config = make_config(**options)
    with pytest.raises(UserError) as caught:
        PathSpace(config, num_layers=layers, sources=make_sources(config), file="c.yaml")
    assert str(caught.value).startswith(f"c.yaml: {message}")


def test_numbers_outside_the_space_are_refused() -> None:
    space = make_space()
    with pytest.raises(ValueError, match="numbers, not 2"):
        space.decode((0.0, 0.0))
    with pytest.raises(ValueError, match="outside"):
        space.decode((0.0, 1.5, *space.initial[2:]))


def test_a_space_with_one_path_only_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"space\.min_layers: 6 leaves no path but 'a' as it is; give less, repeats: 2"
    ):
        make_space(pool=["a"], repeats=1, min_layers=6)
    assert make_space(pool=["a"], repeats=1, min_layers=5).dimension
    assert make_config(scale={"range": [0.9, 2], "step": 1}).layers is not None
