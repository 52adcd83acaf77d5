"""A checkpoint is refused whose config is wrong or whose set of tensors is not a whole model's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from evomerge.checkpoints import open_checkpoint
from evomerge.errors import CheckpointError
from tests.checkpoints.helpers import EMBEDDING, Q


class TestConfig:
    def test_missing(self, model: Path) -> None:
        (model / "config.json").unlink()
        with pytest.raises(CheckpointError, match=r"model/config.json: is missing"):
            open_checkpoint(str(model))

    @pytest.mark.parametrize("text", ["{", "[]", "", "\x00", "[" * 100_000])
    def test_broken(self, model: Path, text: str) -> None:
        (model / "config.json").write_text(text)
        with pytest.raises(
            CheckpointError, match=r"model/config.json: (not valid JSON|should hold a JSON object)"
        ):
            open_checkpoint(str(model))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"quantization_config": {"quant_method": "gptq"}}, r"quantization_config: .*quantised \(gptq\)"),
            ({"num_hidden_layers": "four"}, "num_hidden_layers: 'four' is not a positive whole number"),
            ({"num_hidden_layers": 0}, "num_hidden_layers: 0 is not a positive"),
            ({"tie_word_embeddings": "no"}, "tie_word_embeddings: 'no' is neither true nor false"),
        ],
    )
    def test_wrong_values(
        self, model: Path, change: dict[str, Any], message: str, edit_json: Callable[..., None]
    ) -> None:
        edit_json(model / "config.json", lambda config: config.update(change))
        with pytest.raises(CheckpointError, match="config.json: " + message):
            open_checkpoint(str(model))

    def test_without_a_number_of_layers(self, model: Path, edit_json: Callable[..., None]) -> None:
        edit_json(model / "config.json", lambda config: config.pop("num_hidden_layers"))
        with pytest.raises(CheckpointError, match=r"config.json: num_hidden_layers: this key is missing"):
            open_checkpoint(str(model))
        edit_json(model / "config.json", lambda config: config.update(text_config={"num_hidden_layers": 0}))
        with pytest.raises(CheckpointError, match=r"text_config.num_hidden_layers: 0 is not a positive"):
            open_checkpoint(str(model))


class TestTensors:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda w: w.pop(Q), f"tensor '{Q}' is missing; 3 of 4 layers"),
            (lambda w: w.pop(EMBEDDING), "the token embedding is missing"),
            (lambda w: w.pop("lm_head.weight"), "'lm_head.weight' is missing, and config.json says tie_word"),
            (
                lambda w: w.update({"model.layers.2.mlp.extra.weight": torch.ones(3)}),
                "tensor 'model.layers.2.mlp.extra.weight' is unknown; only 1 of 4 layers",
            ),
            (
                lambda w: w.update({Q.replace(".1.", ".4."): w[Q].clone()}),
                r"'model.layers.4.self_attn.q_proj.weight' belongs to layer 4, but .* declares 4 layers",
            ),
            (
                lambda w: [w.pop(name) for name in list(w) if ".layers.3." in name],
                "layer 3 of 4 has no tensors at all",
            ),
            (lambda w: w.update({Q: w[Q].to(torch.int32)}), f"'{Q}' has dtype I32, which cannot be merged"),
            (lambda w: w.update({Q: w[Q].to(torch.float8_e4m3fn)}), f"'{Q}' has dtype F8_E4M3"),
        ],
    )
    def test_the_set_must_be_complete_and_mergeable(
        self,
        model: Path,
        change: Callable[[dict[str, torch.Tensor]], Any],
        message: str,
        edit_weights: Callable[..., None],
    ) -> None:
        edit_weights(model, change)
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(str(model))

    def test_layers_may_differ_where_the_config_gives_them_types(
        self, model: Path, edit_weights: Callable[..., None], edit_json: Callable[..., None]
    ) -> None:
        def replace_attention(weights: dict[str, torch.Tensor]) -> None:
            for layer in (0, 2):
                for name in [name for name in weights if f".layers.{layer}.self_attn." in name]:
                    weights[name.replace("self_attn", "linear_attn")] = weights.pop(name)

        edit_weights(model, replace_attention)
        with pytest.raises(CheckpointError, match="linear_attn"):
            open_checkpoint(str(model))
        types = ["linear_attention", "full_attention"] * 2
        edit_json(model / "config.json", lambda config: config.update(layer_types=types))
        assert "model.layers.2.linear_attn.q_proj.weight" in open_checkpoint(str(model)).tensors

        edit_weights(model, lambda w: w.pop("model.layers.2.linear_attn.q_proj.weight"))
        with pytest.raises(
            CheckpointError, match=r"'model.layers.2.linear_attn.q_proj.weight' is missing; 1 of 2"
        ):
            open_checkpoint(str(model))

    def test_kinds_of_attention_mask_do_not_excuse_a_missing_tensor(
        self, model: Path, edit_weights: Callable[..., None], edit_json: Callable[..., None]
    ) -> None:
        types = ["full_attention", "sliding_attention", "full_attention", "full_attention"]
        edit_json(model / "config.json", lambda config: config.update(layer_types=types))
        edit_weights(model, lambda w: w.pop(Q))
        with pytest.raises(CheckpointError, match=f"tensor '{Q}' is missing"):
            open_checkpoint(str(model))

    def test_leading_dense_layers_of_a_mixture_of_experts_are_accepted(
        self, model: Path, edit_weights: Callable[..., None], edit_json: Callable[..., None]
    ) -> None:
        def expand(weights: dict[str, torch.Tensor]) -> None:
            for name in [name for name in weights if ".mlp." in name and ".layers.0." not in name]:
                weights[name.replace(".mlp.", ".mlp.experts.0.")] = weights.pop(name)

        edit_weights(model, expand)
        with pytest.raises(CheckpointError, match=r"missing|unknown"):
            open_checkpoint(str(model))
        edit_json(model / "config.json", lambda config: config.update(first_k_dense_replace=1))
        open_checkpoint(str(model))
