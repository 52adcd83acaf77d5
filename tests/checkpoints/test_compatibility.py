from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from evomerge.checkpoints import check_compatible, open_checkpoint
from evomerge.checkpoints.compatibility import rope_settings
from evomerge.errors import CheckpointError
from tests.models import make_model

LAYERS = "model.layers."


def check(base: Path, x: Path) -> list[str]:
    return check_compatible(open_checkpoint(str(base), name="base"), {"x": open_checkpoint(str(x), name="x")})


def test_a_family_is_compatible(family: dict[str, Path]) -> None:
    base, *experts = (open_checkpoint(str(path), name=name) for name, path in family.items())
    assert check_compatible(base, {expert.name: expert for expert in experts}) == []


def test_sharding_and_dtype_may_differ(model: Path, tmp_path: Path) -> None:
    other = make_model(tmp_path / "x", base=model, dtype=torch.bfloat16, max_shard_size="50KB")
    assert check(model, other) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": 64}, "expert 'x' has hidden_size 64, the base 32"),
        ({"layers": 3}, "expert 'x' has num_hidden_layers 3, the base 4"),
        ({"kind": "mistral"}, "expert 'x' has model_type mistral, the base llama"),
        ({"hidden_act": "gelu"}, "expert 'x' has hidden_act gelu, the base silu"),
    ],
)
def test_another_architecture_is_refused_by_its_config_key(
    model: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    other = make_model(tmp_path / "x", **options)
    with pytest.raises(CheckpointError, match=f"{other}: {message}"):
        check(model, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"intermediate_size": 65}, "has intermediate_size 65, the base 64"),
        ({"num_attention_heads": 8}, "has num_attention_heads 8, the base 4"),
        ({"num_key_value_heads": None}, "has num_key_value_heads 4, the base 2"),
        ({"head_dim": 16}, "has head_dim 16, the base 8"),
    ],
)
def test_decisive_keys_are_compared_with_their_defaults(
    model: Path, tmp_path: Path, change: dict[str, Any], message: str, edit_json: Callable[..., None]
) -> None:
    other = make_model(tmp_path / "x", base=model)
    edit_json(other / "config.json", lambda config: config.update(change))
    with pytest.raises(CheckpointError, match=message):
        check(model, other)


def test_keys_that_are_left_at_their_default_are_equal(
    model: Path, tmp_path: Path, edit_json: Callable[..., None]
) -> None:
    other = make_model(tmp_path / "x", base=model)
    edit_json(other / "config.json", lambda config: config.pop("head_dim"))
    assert check(model, other) == []


def test_a_model_that_is_not_called_base_is_named(model: Path, tmp_path: Path) -> None:
    other = open_checkpoint(str(make_model(tmp_path / "x", hidden=64)))
    with pytest.raises(CheckpointError, match="has hidden_size 64, 'first' 32"):
        check_compatible(open_checkpoint(str(model), name="first"), {"x": other})


@pytest.mark.parametrize("count", [1, 3, 4])
def test_missing_and_unknown_tensors_are_named_up_to_three(
    model: Path, tmp_path: Path, count: int, edit_weights: Callable[..., None]
) -> None:
    def drop_and_add(weights: dict[str, torch.Tensor]) -> None:
        for suffix in ("mlp.up_proj", "mlp.gate_proj", "mlp.down_proj", "input_layernorm")[:count]:
            for layer in range(4):
                weights.pop(f"{LAYERS}{layer}.{suffix}.weight")

    other = make_model(tmp_path / "x", base=model)
    edit_weights(other, drop_and_add)
    with pytest.raises(CheckpointError, match=r"expert 'x' lacks tensors '.*, which the base has") as caught:
        check(model, other)
    assert str(caught.value).count("'model.layers.") == 3
    assert f"({4 * count} tensors)" in str(caught.value)
    with pytest.raises(CheckpointError, match=r"expert 'x' has tensors '.*, unknown to the base") as caught:
        check(other, model)
    assert str(caught.value).count("'model.layers.") == 3


def test_one_odd_tensor_is_named(model: Path, tmp_path: Path, edit_weights: Callable[..., None]) -> None:
    other = make_model(tmp_path / "x", base=model)
    edit_weights(other, lambda w: w.update({"model.extra.weight": torch.ones(2)}))
    with pytest.raises(
        CheckpointError, match=r"expert 'x' has tensor 'model.extra.weight', unknown to the base"
    ):
        check(model, other)


def test_other_shapes_are_refused_with_both(
    model: Path, tmp_path: Path, edit_weights: Callable[..., None]
) -> None:
    other = make_model(tmp_path / "x", base=model)
    edit_weights(other, lambda w: w.update({"model.norm.weight": torch.ones(33)}))
    message = r"'model.norm.weight' has shape \[33\] in expert 'x', \[32\] in the base$"
    with pytest.raises(CheckpointError, match=message):
        check(model, other)


def test_tokens_and_tying_may_differ_but_not_the_width_of_their_rows(
    model: Path, tmp_path: Path, edit_weights: Callable[..., None]
) -> None:
    tied = make_model(tmp_path / "tied", base=model, tied=True)
    assert check(model, tied) == check(tied, model) == []

    def resize(shape: tuple[int, int]) -> Callable[[dict[str, torch.Tensor]], None]:
        ends = ("model.embed_tokens.weight", "lm_head.weight")
        return lambda weights: weights.update({name: torch.ones(shape) for name in ends})

    other = make_model(tmp_path / "x", base=model)
    edit_weights(other, resize((261, 32)))
    assert check(model, other) == []
    edit_weights(other, resize((261, 33)))
    with pytest.raises(CheckpointError, match=r"has shape \[261, 33\] in expert 'x', \[259, 32\] in the"):
        check(model, other)


@pytest.mark.parametrize(
    ("change", "warning"),
    [
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps 1e-05, the base 1e-06"),
        ({"max_position_embeddings": 1024}, "max_position_embeddings 1024, the base 512"),
        (
            {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
            "rope_theta 1000000.0, the base 10000.0",
        ),
        (
            {"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear"}},
            "rope_type linear, the base default",
        ),
    ],
)
def test_other_settings_of_the_same_tensors_are_warned_of(
    model: Path, tmp_path: Path, change: dict[str, Any], warning: str, edit_json: Callable[..., None]
) -> None:
    other = make_model(tmp_path / "x", base=model)
    edit_json(other / "config.json", lambda config: config.update(change))
    assert check(model, other) == [f"expert 'x' has {warning}; the merged model has one setting"]


def test_rotary_settings_are_the_same_in_the_words_of_transformers_4_and_5(
    model: Path, tmp_path: Path, edit_json: Callable[..., None]
) -> None:
    def as_version_4(config: dict[str, Any]) -> None:
        del config["rope_parameters"]
        config.update(rope_theta=10000.0, rope_scaling=None)

    other = make_model(tmp_path / "x", base=model)
    edit_json(other / "config.json", as_version_4)
    assert check(model, other) == []
    old = {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    new = {"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}}
    assert rope_settings(old) == rope_settings(new)
    assert rope_settings({}) == {}
