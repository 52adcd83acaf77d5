from __future__ import annotations

import fnmatch
import re

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from evomerge.checkpoints.names import ROLES, parse
from evomerge.errors import UserError
from evomerge.methods import get_method
from evomerge.recipe import Recipe
from evomerge.schema import parse_yaml
from evomerge.spaces import CoefficientSpace, space_for
from tests.spaces.conftest import make_config, make_sources, make_space

LAYERS = 4
unit = st.floats(0, 1)


def value_of(recipe: Recipe, tensor: str, parameter: str, expert: str):
    """What a recipe gives one input for one tensor."""
    value = recipe.main.resolve(parse(tensor))[1][parameter]
    return value[expert] if isinstance(value, dict) else value


class Oracle:
    """The meaning of a config, tensor by tensor, read off the coordinates' names and plain interpolation."""

    def __init__(self, space, genotype, parameters):
        self.parameters = parameters
        self.numbers = {
            c.name: c.low + u * (c.high - c.low) for c, u in zip(space.coordinates, genotype, strict=True)
        }

    def value(self, tensor: str, parameter: str, expert: str, default):
        name = parse(tensor)
        for spec in self.parameters[parameter]:
            if not isinstance(spec, dict):
                return spec
            if spec.get("per", "expert") not in ("expert", "shared", expert):
                continue
            if not fnmatch.fnmatchcase(tensor, spec.get("tensors", "*")):
                continue
            roles = spec.get("roles", "all")
            if roles != "all" and name.role not in roles and "other" not in roles:
                continue
            label = parameter if spec.get("per") == "shared" else f"{parameter}[{expert}]"
            if roles != "all":
                label += "." + (name.role if name.role in roles else "other")
            if "tensors" in spec:
                label += " " + spec["tensors"]
            controls = {
                k.partition("@")[2]: v for k, v in self.numbers.items() if k.partition("@")[0] == label
            }
            return self.at(name.position, controls)
        return default

    def at(self, position, controls):
        layer = {"pre": 0, "post": LAYERS - 1}.get(position, position)
        if list(controls) == [""]:
            return controls[""]
        if "1/2" in controls or "1/3" in controls:
            return float(np.interp(layer, np.linspace(0, LAYERS - 1, len(controls)), list(controls.values())))
        for place, value in controls.items():
            first, _, last = re.sub("layers? ", "", place).partition("-")
            if int(first) <= layer <= int(last or first):
                return value
        raise AssertionError(controls)


depths = st.sampled_from(["global", "layers", {"groups": 2}, {"groups": 3}, {"smooth": 2}, {"smooth": 3}])
role_lists = st.one_of(
    st.just("all"),
    st.lists(st.sampled_from(ROLES), min_size=1, unique=True).map(lambda r: [*dict.fromkeys(r)]),
)


@st.composite
def entries(draw, scope: str):
    """Entries of one parameter, from special to general; the last may leave roles to the default."""
    pers = [None, "expert", "shared", "a", "c"] if scope == "expert" else [None]
    special = [{"tensors": "*.q_proj.weight"}, {"tensors": "*.down_proj.weight"}, {"per": "b"}]
    chosen = draw(
        st.lists(st.sampled_from(special if scope == "expert" else special[:2]), max_size=2, unique_by=str)
    )
    result = []
    for extra in [*chosen, {}]:
        spec = {"range": [-0.5, 2.0], "depth": draw(depths), "roles": draw(role_lists), **extra}
        per = draw(st.sampled_from(pers))
        if per and "per" not in spec and "tensors" not in spec:
            spec["per"] = per
        result.append(spec)
    return result


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_every_tensor_gets_the_value_the_config_means(tensor_names, data):
    parameters = {
        "weight": data.draw(entries("expert")),
        "lambda": data.draw(entries("shared")),
        "density": [0.3],
    }
    try:
        space = make_space(parameters)
    except UserError as error:
        assert "is never used" in str(error)  # noqa: PT017
        return
    genotype = tuple(data.draw(st.lists(unit, min_size=space.dimension, max_size=space.dimension)))
    recipe = space.decode(genotype)
    oracle = Oracle(space, genotype, parameters)
    defaults = get_method("ties").defaults()
    for tensor in tensor_names:
        for expert in "abc":
            for parameter in ("weight", "density"):
                expected = oracle.value(tensor, parameter, expert, defaults[parameter])
                assert value_of(recipe, tensor, parameter, expert) == pytest.approx(expected, abs=1e-12)
        # A shared parameter's coordinates carry no expert's name.
        oracle.numbers = {name.replace("lambda", "lambda[a]", 1): v for name, v in oracle.numbers.items()}
        assert recipe.main.resolve(parse(tensor))[1]["lambda"] == pytest.approx(
            oracle.value(tensor, "lambda", "a", 1.0), abs=1e-12
        )
        oracle.numbers = {name.replace("lambda[a]", "lambda", 1): v for name, v in oracle.numbers.items()}


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_decoding_is_total_deterministic_and_survives_yaml(data):
    parameters = {
        "weight": {"range": [-0.2, 1.2], "depth": data.draw(depths), "roles": data.draw(role_lists)},
        "density": {"range": [0.01, 1.0], "log": True, "per": "shared", "depth": data.draw(depths)},
        "lambda": {"choices": [0.5, 1.0, 2.0]},
    }
    space = make_space(parameters)
    genotype = tuple(
        float(data.draw(st.integers(0, 2))) if c.kind == "choice" else data.draw(unit)
        for c in space.coordinates
    )
    recipe = space.decode(genotype)
    assert make_space(parameters).decode(genotype) == recipe
    again = Recipe.from_dict(parse_yaml(recipe.to_yaml(), None))
    assert again == recipe
    assert again.hash == recipe.hash
    assert space.describe(genotype)
    assert space.describe(recipe)


def test_a_recipe_names_method_inputs_and_output_as_the_config_says():
    config = make_config({"weight": {"range": [0, 1]}}, method="linear", experts=("z", "m"))
    space = space_for(config, LAYERS, make_sources(config))
    recipe = space.decode(space.initial)
    assert recipe.main.inputs == ("z", "m")
    assert recipe.main.base is None
    assert recipe.output.tokenizer == recipe.output.chat_template == "base"
    assert recipe.seed == 7
    assert list(recipe.models) == ["base", "z", "m"]
    assert make_space({"weight": {"range": [0, 1]}}).decode((0.0, 0.0, 0.0)).main.base == "base"


def test_the_search_starts_exactly_at_initial():
    space = make_space(
        {
            "weight": {"range": [-0.2, 1.2], "initial": 0.4, "depth": {"smooth": 3}},
            "density": {
                "range": [0.01, 1.0],
                "log": True,
                "initial": 0.3,
                "depth": "layers",
                "roles": ["mlp", "other"],
            },
        }
    )
    assert space.dimension == 3 * 3 + 3 * 2 * LAYERS
    assert space.decode(space.initial).main.parameters == {"weight": 0.4, "density": 0.3}
    assert space.decode(space.initial).main.rules == ()


def test_without_initial_the_search_starts_in_the_middle():
    space = make_space(
        {
            "weight": {"range": [-1.0, 2.0]},
            "density": {"range": [0.01, 1.0], "log": True},
            "lambda": {"choices": [2.0, 1.0]},
        }
    )
    values = space.decode(space.initial).main.parameters
    assert values == pytest.approx({"weight": 0.5, "density": 0.1, "lambda": 2.0})


@given(unit)
def test_an_integer_is_the_nearest_one(number):
    space = make_space({"weight": {"range": [1, 9], "integer": True, "initial": 3}}, experts=("a",))
    value = space.decode((number,)).main.parameters["weight"]
    assert value == int(value)
    assert abs(value - (1 + 8 * number)) <= 0.5
    assert space.decode(space.initial).main.parameters["weight"] == 3


def test_layers_of_equal_value_share_a_rule():
    space = make_space({"weight": {"range": [0, 1], "per": "shared", "depth": {"groups": 2}}})
    recipe = space.decode((0.25, 0.75))
    assert [rule.layers for rule in recipe.main.rules] == [("pre", 0, 1), (2, 3, "post")]
    assert space.decode((0.25, 0.25)).main.rules == ()


def test_parameters_with_the_same_reach_share_a_rule():
    depth = {"groups": 2}
    recipe = make_space(
        {
            "weight": {"range": [0, 1], "depth": depth},
            "density": {"range": [0, 1], "depth": depth, "per": "shared"},
        }
    ).decode((0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8))
    assert [set(rule.parameters) for rule in recipe.main.rules] == [{"weight", "density"}] * 2


def test_embeddings_and_head_take_one_value_whatever_the_depth():
    space = make_space(
        {"weight": {"range": [0, 1], "depth": "layers", "roles": ["embedding", "head", "other"]}}
    )
    assert space.dimension == 3 * (1 + 1 + LAYERS)


def test_an_experts_own_entry_goes_before_the_general_one():
    space = make_space({"weight": [{"per": "b", "range": [0, 1]}, 0.7]})
    assert [c.name for c in space.coordinates] == ["weight[b]"]
    assert space.decode((0.25,)).main.parameters == {"weight": {"a": 0.7, "b": 0.25, "c": 0.7}}


def test_a_later_entry_takes_the_roles_that_an_earlier_one_leaves_out(tensor_names):
    space = make_space({"weight": [{"range": [0, 1], "roles": ["attention"], "per": "shared"}, 0.7]})
    recipe = space.decode((0.25,))
    for tensor in tensor_names:
        assert value_of(recipe, tensor, "weight", "a") == (0.25 if "self_attn" in tensor else 0.7)


def test_a_readable_table_shows_the_control_values():
    space = make_space(
        {"weight": {"range": [0, 1], "depth": {"smooth": 2}, "roles": ["mlp", "other"]}, "density": 0.5},
        experts=("a", "b"),
    )
    text = space.describe((0.0, 0.25, 0.5, 0.75, 1.0, 0.0, 0.0, 0.125))
    lines = [line.split() for line in text.splitlines()]
    assert lines[0] == ["parameter", "expert", "roles", "values"]
    assert ["weight", "a", "other", "1/2:", "0.5", "2/2:", "0.75"] in lines
    assert ["density", "a", "all", "0.5", "fixed"] in lines
    recipe_lines = space.describe(space.decode((0.25,) * 8)).splitlines()
    assert recipe_lines[0] == "merged: ties on base of a, b"
    assert [line.split() for line in recipe_lines[1:]] == [
        ["parameter", "a", "b"],
        ["weight", "0.25", "0.25"],
        ["density", "0.5", "0.5"],
    ]


REFUSED = [
    ("linear", {"weight": {"range": [0, 1], "roles": ["mlp"]}}, "roles attention, router.* add 'other'"),
    ("linear", {"weight": {"range": [0, 1], "per": "a"}}, "no entry gives a value to b, c"),
    ("linear", {"weight": {"range": [0, 1], "tensors": "*q_proj*"}}, "add an entry without 'tensors'"),
    (
        "ties",
        {"weight": {"range": [0, 1], "depth": {"groups": 9}}},
        "groups: 9.* more than the model's 4 layers",
    ),
    (
        "ties",
        {"weight": {"range": [0, 1], "depth": {"smooth": 9}}},
        "smooth: 9.* more than the model's 4 layers",
    ),
    ("ties", {"weight": [{"range": [0, 1]}, 0.5]}, "entry 2 is never used"),
    (
        "ties",
        {"weight": [{"range": [0, 1], "tensors": "*x"}, {"range": [0, 1], "tensors": "*x"}]},
        "entry 2 is never",
    ),
    ("ties", {"weight": {"choices": [0.0, 1.0], "depth": {"smooth": 2}}}, "choices cannot be interpolated"),
    ("ties", {"weight": {"range": [0.5, 3], "integer": True}}, "integer: 0.5 is not a whole number"),
    (
        "ties",
        {
            "weight": [
                {"per": "a", "tensors": "*x*", "range": [0, 1]},
                {"per": "b", "tensors": "*y*", "range": [0, 1]},
            ]
        },
        "patterns '\\*x\\*' and '\\*y\\*' may match the same tensor",
    ),
]


@pytest.mark.parametrize(("method", "parameters", "message"), REFUSED)
def test_entries_that_do_not_fit_are_refused_by_key(method, parameters, message):
    with pytest.raises(UserError, match=f"^space.parameters.weight: .*{message}"):
        make_space(parameters, method=method)


def test_exclusive_patterns_of_different_experts_are_accepted(tensor_names):
    recipe = make_space(
        {
            "weight": [
                {"per": "a", "tensors": "*.q_proj.weight", "range": [0, 1]},
                {"per": "b", "tensors": "*.k_proj.weight", "range": [0, 1]},
            ]
        }
    ).decode((0.25, 0.5))
    for tensor in tensor_names:
        assert value_of(recipe, tensor, "weight", "a") == (0.25 if ".q_proj." in tensor else 1.0)
        assert value_of(recipe, tensor, "weight", "b") == (0.5 if ".k_proj." in tensor else 1.0)


@pytest.mark.parametrize("genotype", [(), (0.5, 0.5), (1.5,), (-0.1,), (float("nan"),)])
def test_a_genotype_outside_the_space_is_refused(genotype):
    space = make_space({"weight": {"range": [0, 1], "per": "shared"}})
    with pytest.raises(ValueError):
        space.decode(genotype)


def test_a_choice_is_named_by_its_index():
    space = make_space({"lambda": {"choices": [0.5, 2.0], "initial": 2.0}})
    assert space.initial == (1.0,)
    assert space.decode((0.0,)).main.parameters == {"lambda": 0.5}
    for bad in (0.5, 2.0, -1.0):
        with pytest.raises(ValueError, match="not the index of a choice"):
            space.decode((bad,))


def test_a_refusal_names_the_config_file():
    config = make_config({"weight": {"range": [0, 1], "depth": {"smooth": 9}}})
    with pytest.raises(UserError, match=r"^my\.yaml: space\.parameters\.weight: \{smooth: 9\} is more than"):
        space_for(config, 4, make_sources(config), file="my.yaml")


def test_a_base_that_is_optional_can_be_left_out() -> None:
    parameters = {"weight": {"range": [0, 1]}}
    space = make_space(parameters, method="multislerp")
    assert space.decode(space.initial).main.base == "base"
    config = make_config(parameters, method="multislerp")
    config = config.model_copy(update={"space": config.space.model_copy(update={"base": False})})
    space = CoefficientSpace(config, num_layers=4, sources=make_sources(config))
    assert space.decode(space.initial).main.base is None


def test_each_control_value_may_start_at_a_place_of_its_own(tensor_names):
    starts = [0.1, 0.7, 0.2]
    space = make_space(
        {
            "weight": {
                "range": [-1, 1],
                "initial": starts,
                "depth": {"smooth": 3},
                "per": "shared",
                "roles": ["mlp", "embedding", "head", "other"],
            }
        }
    )
    recipe = space.decode(space.initial)
    for layer, expected in zip((0, 3), (0.1, 0.2), strict=True):
        tensor = f"model.layers.{layer}.mlp.up_proj.weight"
        assert value_of(recipe, tensor, "weight", "a") == expected
    assert value_of(recipe, "model.embed_tokens.weight", "weight", "b") == 0.1
    assert value_of(recipe, "lm_head.weight", "weight", "b") == 0.2
    assert value_of(recipe, "model.norm.weight", "weight", "b") == 0.2


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"initial": [0.1, 2]}, r"initial: 2 lies outside the range \[0, 1\]"),
        ({"initial": [0.1, 0.2], "depth": "global"}, "initial: a list needs a depth with one control value"),
        ({"initial": [0.1], "depth": {"smooth": 2}}, "initial: has 1 numbers, depth asks for 2"),
        ({"initial": [0.1, 0.2, 0.3], "depth": {"groups": 2}}, "initial: has 3 numbers, depth asks for 2"),
        (
            {"initial": [0.1, 0.2, 0.3], "depth": "layers"},
            "initial: has 3 numbers, the model's depth asks for 4",
        ),
    ],
)
def test_starts_that_do_not_fit_the_depth_are_refused(entry, message):
    with pytest.raises(UserError, match=message):
        make_space({"weight": {"range": [0, 1], "depth": "layers", **entry}})


def test_searched_numbers_that_no_tensor_takes_are_named(tensor_names):
    weight = {"range": [0, 1], "initial": 0.4}
    tensors = [parse(name) for name in tensor_names]
    everywhere = {"weight": [{**weight, "per": "expert", "depth": {"smooth": 2}}], "density": 0.5}
    assert make_space(everywhere).idle(tensors) == []
    slip = [{**weight, "tensors": "*mpl*", "per": "shared", "depth": "layers"}, weight]
    assert make_space({"weight": slip, "density": 0.5}).idle(tensors) == ["weight *mpl*"]
    # All attention goes to the first entry, and the second's share of it to nobody.
    both = [{**weight, "tensors": "*self_attn*"}, {**weight, "roles": ["attention", "mlp", "other"]}]
    assert make_space({"weight": both, "density": 0.5}).idle(tensors) == [
        f"weight[{name}].attention" for name in "abc"
    ]
    headless = [tensor for tensor in tensors if tensor.role != "head"]
    roles = {"weight": {**weight, "per": "shared", "roles": ["head", "other"]}, "density": 0.5}
    assert make_space(roles).idle(tensors) == []
    assert make_space(roles).idle(headless) == ["weight.head"]
