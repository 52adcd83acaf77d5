"""A recipe written for mergekit says the same: read back it gives the same bytes, and mergekit the same tensors."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.checkpoints.names import parse
from evomerge.errors import UserError
from evomerge.mergekit import from_mergekit, to_mergekit
from evomerge.mergekit.compact import compact
from evomerge.mergekit.translation import translated
from evomerge.merging import TensorJob, merge, open_parents, plan_merge
from evomerge.methods import get_method
from evomerge.methods.registry import all_methods
from evomerge.recipe import Recipe
from evomerge.settings import depth_of, evaluate, read_setting
from tests.mergekit.conftest import Families, Peer, agree
from tests.mergekit.test_golden import GOLDEN, document
from tests.merging.helpers import digests, make_recipe, read
from tests.models import make_family

CURVE = [0.11, 0.43, 0.29, 0.87]


def by_depth(
    values: list[float], roles: list[str] | None = None, name: str = "weight"
) -> list[dict[str, Any]]:
    places: list[Any] = [["pre", 0], [1], [2], [3, "post"]]
    where = {"roles": roles} if roles else {}
    return [
        {"layers": place, **where, "parameters": {name: {"a": value, "b": 1 - value}}}
        for place, value in zip(places, values, strict=True)
    ]


EXACT: dict[str, dict[str, Any]] = {
    "linear": {
        "merge": {"method": "linear", "inputs": ["a", "b"], "parameters": {"weight": {"a": 0.3, "b": 2}}}
    },
    "linear over depth and roles": {
        "merge": {
            "method": "linear",
            "base": "b",
            "inputs": ["a", "b", "c"],
            "parameters": {"weight": 0.25, "normalize": False},
            "rules": [
                {"tensors": "*.k_proj.weight", "parameters": {"weight": {"a": 3, "b": -1, "c": 0.5}}},
                *by_depth(CURVE, ["mlp", "embedding", "head"]),
                {"layers": [2], "parameters": {"normalize": True}},
            ],
        }
    },
    "slerp": {
        "merge": {
            "method": "slerp",
            "inputs": ["b", "a"],
            "parameters": {"t": [{"filter": "attn", "value": [0, 1, 0.3]}, {"value": 0.4}]},
        }
    },
    "task arithmetic": {
        "merge": {
            "method": "task_arithmetic",
            "base": "base",
            "inputs": ["a", "b"],
            "parameters": {"weight": 0.5, "lambda": [0.2, 0.9, 1.1]},
            "rules": by_depth(CURVE),
        }
    },
    "ties in mergekit's dialect": {
        "merge": {
            "method": "ties",
            "dialect": "mergekit",
            "base": "base",
            "inputs": ["a", "b"],
            "parameters": {"density": {"a": 0.4, "b": [0.5, 1]}, "normalize": [False, True]},
            "rules": by_depth(CURVE, ["attention", "mlp"]),
        }
    },
    "layers of models": {
        "path": [
            {"model": "a", "layer": 0},
            {"model": "a", "layer": 1},
            {"model": "b", "layer": 1, "scale": 0.5},
            {"model": "b", "layer": 2},
            {"model": "c", "layer": 3, "scale": -2},
        ]
    },
    "layers of a merge": {
        "merges": {
            "m": {
                "method": "task_arithmetic",
                "base": "base",
                "inputs": ["a", "b"],
                "parameters": {
                    "weight": {"a": [0.1, 0.5, 0.7], "b": [{"filter": "mlp", "value": 0.2}, {"value": 1}]}
                },
            }
        },
        "path": [
            {"merge": "m", "layer": 0},
            {"merge": "m", "layer": 1},
            {"merge": "m", "layer": 1, "layers": {"b": 3}},
            {"merge": "m", "layer": 2, "layers": {"b": 2, "a": 0}},
            {"merge": "m", "layer": 3, "layers": {"a": 1}},
        ],
    },
    "layers of slerps in either direction": {
        "merges": {
            "m": {"method": "slerp", "inputs": ["a", "b"], "parameters": {"t": 0.2}},
            "n": {"method": "slerp", "inputs": ["b", "a"], "parameters": {"t": 0.3}},
        },
        "path": [{"merge": name, "layer": layer} for layer, name in enumerate("mnnm")],
    },
    "layers of a model between those of an average": {
        "merges": {
            "m": {"method": "linear", "inputs": ["a", "b"], "parameters": {"weight": {"a": 1, "b": 2}}}
        },
        "path": [
            {"merge": "m", "layer": 0},
            {"model": "c", "layer": 1},
            {"merge": "m", "layer": 2},
            {"merge": "m", "layer": 3},
        ],
    },
}


def recipe_of(parts: dict[str, Any], families: Families, kind: str = "llama") -> Recipe:
    return make_recipe(families(kind), **{**copy.deepcopy(parts), "output": {"dtype": "bfloat16"}})


@pytest.mark.parametrize("name", EXACT)
def test_read_back_it_gives_the_same_bytes_and_mergekit_the_same_tensors(
    name: str, families: Families, peer: Peer, tmp_path: Path
) -> None:
    recipe = recipe_of(EXACT[name], families)
    written = to_mergekit(recipe, open_parents(recipe))
    names = [note for note in written.notes if not note.startswith("entries as large as")]
    assert names == []
    data = yaml.safe_load(written.to_yaml())
    assert data["dtype"] == "float32"
    ours = read(merge(recipe, tmp_path / "ours", threads=1))
    back = read(merge(from_mergekit(data).recipe, tmp_path / "back", threads=1))
    assert digests(back) == digests(ours)
    agree(ours, peer(data, tmp_path / "peer"))


NAMES = [
    "model.embed_tokens.weight",
    *(
        f"model.layers.{layer}.{part}.weight"
        for layer in range(12)
        for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.gate", "input_layernorm")
    ),
    "model.norm.weight",
    "lm_head.weight",
]


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_any_value_per_tensor_can_be_written_exactly(data: st.DataObject) -> None:
    count = 12
    layers = {name: place for name in NAMES if isinstance(place := parse(name).position, int)}
    pool: Any = data.draw(
        st.sampled_from(
            [st.booleans(), st.sampled_from(["sum", "max"]), st.floats(-2, 2), st.sampled_from([0.5, 1.0])]
        )
    )
    roles = data.draw(st.booleans())
    curves = {
        key: data.draw(st.lists(pool, min_size=count, max_size=count))
        for key in {parse(name).role if roles else "" for name in NAMES}
    }
    values = {name: curves[parse(name).role if roles else ""][layers.get(name, 3)] for name in NAMES}
    for name in data.draw(st.lists(st.sampled_from(NAMES), max_size=3)):
        values[name] = data.draw(pool)
    setting = read_setting(compact(values, layers, count))
    for name, value in values.items():
        found = evaluate(setting, name, depth_of(layers[name], count) if name in layers else 0.0)
        assert found == value
        assert isinstance(found, bool) == isinstance(value, bool)


def test_values_are_written_briefly() -> None:
    layers = {name: place for name in NAMES if isinstance(place := parse(name).position, int)}
    assert compact(dict.fromkeys(NAMES, 0.5), layers, 12) == 0.5
    curve = [i / 11 for i in range(12)]
    values = {name: curve[layers[name]] if "self_attn" in name else 0.25 for name in NAMES}
    assert compact(values, layers, 12) == [{"filter": "self_attn", "value": curve}, {"value": 0.25}]
    truth = {name: ".7." in name for name in NAMES}
    assert compact(truth, layers, 12) == [{"filter": "layers.7.", "value": True}, {"value": False}]


TIES: dict[str, Any] = {
    "method": "ties",
    "base": "base",
    "inputs": ["a", "b"],
    "parameters": {"density": 0.5},
}


class TestPaper:
    """Recipes in the dialect of the papers: exact where mergekit can say it, else with the difference named."""

    def written(self, families: Families, merge: dict[str, Any]) -> tuple[dict[str, Any], str]:
        recipe = recipe_of({"merge": merge}, families)
        written = to_mergekit(recipe, open_parents(recipe))
        return written.document, " | ".join(written.notes)

    def test_ties_with_equal_weights_is_a_matter_of_lambda(
        self, families: Families, peer: Peer, tmp_path: Path
    ) -> None:
        merge_ = {**TIES, "parameters": {"density": 0.5, "weight": 0.6, "lambda": 1.5}}
        document, notes = self.written(families, merge_)
        assert document["parameters"]["lambda"] == pytest.approx(0.9)
        assert [m.get("parameters", {}).get("weight") for m in document["models"]] == [None, 1.0, 1.0]
        assert "mergekit takes +, not the tensor's majority" in notes
        ours = read(merge(recipe_of({"merge": merge_}, families), tmp_path / "ours", threads=1))
        agree(ours, peer(document, tmp_path / "peer"))

    def test_ties_with_unequal_weights_differs_in_the_divisor(self, families: Families) -> None:
        _, notes = self.written(families, {**TIES, "parameters": {"weight": {"a": 1, "b": 0.5}}})
        assert "divides by their weights, not their number" in notes

    def test_dare_takes_its_scale_into_the_weights(self, families: Families) -> None:
        merge_ = {
            **TIES,
            "method": "dare_linear",
            "parameters": {"weight": 0.5, "density": {"a": 0.25, "b": 0}},
        }
        document, notes = self.written(families, merge_)
        assert [m.get("parameters") for m in document["models"]] == [
            None,
            {"weight": 2.0, "density": 0.25},
            {"weight": 0.0, "density": 0.0},
        ]
        assert document["parameters"] == {"lambda": 1.0, "rescale": False, "normalize": False}
        assert "same distribution as mergekit's but are other masks" in notes

    @pytest.mark.parametrize(
        ("merge", "message"),
        [
            ({**TIES, "parameters": {"trim": "global"}}, "ties: mergekit trims each tensor by itself"),
            (
                {**TIES, "parameters": {"elect": "count"}},
                "ties: mergekit elects signs by sum only, not by count",
            ),
            ({**TIES, "parameters": {"merge": "max"}}, "ties: mergekit has no disjoint merge by max"),
            (
                {**TIES, "rules": [{"roles": ["norm"], "method": "linear", "parameters": {"weight": 1}}]},
                "mergekit has one method for the whole model, the recipe has ",
            ),
            (
                {"method": "karcher", "inputs": ["a", "b"], "parameters": {"weight": {"a": 1, "b": 2}}},
                "karcher: mergekit weighs all models equally",
            ),
            (
                {"method": "fisher", "inputs": ["a", "b"], "data": {"texts": __file__}},
                "mergekit has no method 'fisher'",
            ),
        ],
    )
    def test_what_mergekit_cannot_do_is_refused(
        self, families: Families, merge: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(UserError) as caught:
            self.written(families, merge)
        assert str(caught.value).startswith(message)


@pytest.mark.parametrize("dialect", ["paper", "mergekit"])
def test_every_method_is_written_with_parameters_that_mergekit_has(dialect: str) -> None:
    registry = pytest.importorskip("mergekit.merge_methods.registry")
    for name, method in all_methods().items():
        if "mergekit" not in method.dialects:
            continue
        values = {}
        for parameter in method.parameters_in(dialect):
            default = parameter.default_in(dialect)
            value = 0.5 if default is None else default
            values[parameter.name] = value if parameter.scope == "shared" else (value, value)
        peer = translated(name, dialect, values)
        spec = registry.get(peer.method).spec
        assert set(peer.shared) <= {p.name for p in spec.shared_parameters}, name
        assert set(peer.own) <= {p.name for p in spec.input_parameters}, name


def test_slerp_goes_from_its_first_input_whatever_the_base(
    families: Families, peer: Peer, tmp_path: Path
) -> None:
    merge_ = {"method": "slerp", "base": "b", "inputs": ["a", "b"], "parameters": {"t": 0.2}}
    recipe = recipe_of({"merge": merge_}, families)
    written = to_mergekit(recipe, open_parents(recipe))
    assert written.notes == ("config and tokenizer: mergekit takes those of 'a', the recipe 'b's",)
    agree(read(merge(recipe, tmp_path / "ours", threads=1)), peer(written.document, tmp_path / "peer"))


@pytest.mark.parametrize("axis", ["none", "in", "out"])
def test_nuslerp_of_layers_that_are_kept_transposed(
    axis: str, families: Families, peer: Peer, tmp_path: Path
) -> None:
    parameters = {"weight": {"a": 0.3, "b": 0.7}, "axis": axis}
    merge_ = {"method": "nuslerp", "base": "base", "inputs": ["a", "b"], "parameters": parameters}
    recipe = recipe_of({"merge": merge_}, families, "gpt2")
    written = to_mergekit(recipe, open_parents(recipe))
    agree(read(merge(recipe, tmp_path / "ours", threads=1)), peer(written.document, tmp_path / "peer"))


def test_filters_of_layers_that_are_kept_transposed_are_others_in_mergekit(families: Families) -> None:
    parameters = {"filter_wise": True, "clamp": False}
    merge_ = {"method": "model_stock", "base": "base", "inputs": ["a", "b", "c"], "parameters": parameters}
    for kind, note in (("gpt2", "where a layer is kept as (in, out), mergekit's filters"), ("llama", "")):
        recipe = recipe_of({"merge": merge_}, families, kind)
        notes = to_mergekit(recipe, open_parents(recipe)).notes
        assert [note in said for said in notes] == ([True] if note else [])


def test_scales_that_shift_the_norms_are_refused(families: Families) -> None:
    path = [{"model": "a", "layer": i, "scale": 0.5} for i in range(2)]
    recipe = recipe_of({"path": path}, families, "gemma2")
    with pytest.raises(
        UserError, match=r"'model\.layers\.0\.post_attention_layernorm\.weight': a scale of this"
    ):
        to_mergekit(recipe, open_parents(recipe))


def test_scales_of_merged_layers_are_refused(families: Families) -> None:
    path = [{"merge": "m", "layer": i, "scale": 0.5} for i in range(4)]
    merges = {"m": {"method": "linear", "inputs": ["a", "b"], "parameters": {"weight": 1}}}
    recipe = recipe_of({"merges": merges, "path": path}, families)
    with pytest.raises(UserError, match="scales of merged layers have no counterpart in mergekit"):
        to_mergekit(recipe, open_parents(recipe))


def test_references_with_odd_names_are_written_as_mappings(families: Families, tmp_path: Path) -> None:
    odd = tmp_path / "a+b@c"
    odd.symlink_to(families("llama")["a"])
    recipe = make_recipe(
        {"x": odd, "y": families("llama")["b"]},
        merge=EXACT["linear"]["merge"] | {"inputs": ["x", "y"], "parameters": {"weight": 1}},
    )
    document = to_mergekit(recipe, open_parents(recipe)).document
    assert document["models"][0]["model"] == {"model": {"path": str(odd)}}
    assert {source.source for source in from_mergekit(document).recipe.models.values()} == {
        str(odd.resolve()),
        str(families("llama")["b"].resolve()),
    }


def test_tokenizer_and_template_go_along(tmp_path: Path) -> None:
    family = make_family(tmp_path, hidden=16, layers=1)
    output = {
        "tokenizer": {
            "source": "union",
            "pad_to_multiple_of": 64,
            "tokens": {
                "a": {"source": {"kind": "zero"}, "force": True},
                "b": {"source": {"model": "b", "token": "c"}},
                "d": {"source": {"model": "a"}},
            },
        },
        "chat_template": "chatml",
    }
    recipe = make_recipe(family, merge=EXACT["linear"]["merge"], output=output)
    written = to_mergekit(recipe, open_parents(recipe))
    assert written.document["tokenizer"]["source"] == "union"
    assert written.document["tokenizer"]["tokens"]["a"] == {"source": {"kind": "zero"}, "force": True}
    assert "im_start" in written.document["chat_template"]
    out = [
        merge(recipe, tmp_path / "ours", threads=1),
        merge(from_mergekit(yaml.safe_load(written.to_yaml())).recipe, tmp_path / "back", threads=1),
    ]
    assert digests(read(out[0])) == digests(read(out[1]))
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (out[0] / name).read_bytes() == (out[1] / name).read_bytes()


def test_notes_are_comments_of_the_file(families: Families) -> None:
    recipe = recipe_of({"merge": TIES}, families)
    text = to_mergekit(recipe, open_parents(recipe)).to_yaml()
    head, *_ = text.partition("models:")
    assert head.startswith("# What mergekit makes of this differs from the recipe:\n# - ")
    assert all(line.startswith("#") and len(line) <= 108 for line in head.splitlines())
    assert yaml.safe_load(text)["merge_method"] == "ties"


@pytest.mark.parametrize("name", GOLDEN)
def test_a_mergekit_yaml_read_and_written_plans_the_same_tensors(name: str, families: Families) -> None:
    family = families("llama")
    recipe = from_mergekit(document(GOLDEN[name], family)).recipe
    written = to_mergekit(recipe, open_parents(recipe))
    again = from_mergekit(yaml.safe_load(written.to_yaml())).recipe

    def role_of(job: TensorJob) -> str:
        return get_method(job.method).base_in(job.dialect) if job.method else ""

    def merged(job: TensorJob) -> list[str]:
        """Without a base karcher's first model may as well be called one."""
        return [*([job.base] if job.base and role_of(job) == "optional input" else []), *job.inputs]

    def plan(one: Recipe) -> list[Any]:
        places = {model: source.source for model, source in one.models.items()}
        return [
            (
                job.name,
                job.dtype,
                role_of(job) != "optional input" and job.base and places[job.base],
                [(places[model], job.source_in(model)) for model in merged(job)],
                # A layer taken as it is, and one scaled by 1, are the same.
                None if job.method == "passthrough" and set(job.values["scale"]) == {1.0} else job.values,
            )
            for job in plan_merge(one, open_parents(one)).jobs
        ]

    assert plan(again) == plan(recipe)
