"""``config.json``: where it speaks of the language model, and the settings that a merge changes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

_TABLE = re.compile(r"(^|\.)(wpe|embed_positions|position_embeddings?)\.weight$")
_TABLE_TYPES = ("codegen", "ctrl", "gptj")
"""Model types with a table of positions that is no tensor of the checkpoint."""

DEPTH_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
"""What configs call the number of layers, the usual name first."""

FIRST_DENSE_KEYS = ("first_k_dense_replace", "num_dense_layers")
"""What configs of mixtures call the number of layers, from the first on, that are no mixtures."""

_NESTED = ("text_config", "llm_config", "language_config")


def nested_key(config: Mapping[str, Any]) -> str | None:
    """Return the key under which a multimodal config nests its language model's, or None."""
    return next((key for key in _NESTED if isinstance(config.get(key), dict)), None)


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the language model's part of a config: that of a multimodal model nests it."""
    key = nested_key(config)
    return config if key is None else config[key]


def positions(config: Mapping[str, Any]) -> int | None:
    """Return the longest text that a config is made for, in tokens; None where it does not say."""
    text = text_config(config)
    names = ("n_positions", "max_position_embeddings", "n_ctx")
    return next((int(text[name]) for name in names if text.get(name) is not None), None)


def last_position(config: Mapping[str, Any], tensors: Iterable[str]) -> int | None:
    """Return how many tokens a model can read at all, in tokens; None where positions are computed, not looked up.

    Args:
        config: of the model.
        tensors: names of its tensors: a table of learned positions is one of them.
    """
    looked_up = text_config(config).get("model_type") in _TABLE_TYPES or any(map(_TABLE.search, tensors))
    return positions(config) if looked_up else None


def set_tied(config: dict[str, Any], tied: bool) -> None:
    """Say whether the head shares the embedding's weight, in a nested config too if that says it."""
    config["tie_word_embeddings"] = tied
    text = text_config(config)
    if isinstance(text, dict) and "tie_word_embeddings" in text:
        text["tie_word_embeddings"] = tied


def set_rows(config: dict[str, Any], rows: int) -> None:
    """Say how many rows the embedding has."""
    text = text_config(config)
    for place in (config, text):
        if isinstance(place, dict) and (place is text or "vocab_size" in place):
            place["vocab_size"] = rows


def set_dtype(config: dict[str, Any], dtype: torch.dtype) -> None:
    """Say what most weights' number format is, in nested configs too if they say it."""
    name = str(dtype).removeprefix("torch.")
    nested = [value for value in config.values() if isinstance(value, dict)]
    for part in [config, *(value for value in nested if "torch_dtype" in value or "dtype" in value)]:
        part.pop("torch_dtype", None)
        part["dtype"] = name
