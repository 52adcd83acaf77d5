"""The config of a layer path: every setting that a config makes per layer follows its layer."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from evomerge.checkpoints import Checkpoint
from evomerge.checkpoints.model_config import DEPTH_KEYS, FIRST_DENSE_KEYS, nested_key, text_config
from evomerge.errors import CheckpointError
from evomerge.recipe import Hop

# Config lists with one entry a layer, and lists of layer indices.
_PER_LAYER = (
    "layer_types",
    "mlp_layer_types",
    "layers_block_type",
    "no_rope_layers",
    "num_attention_heads_per_layer",
    "num_key_value_heads_per_layer",
    "attention_layers",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "activation_sparsity_pattern",
    "moe_topk",
    "indexer_types",
)
_INDICES = ("mlp_only_layers", "attn_layer_indices", "moe_layers", "full_attn_idxs")

# Keys from which transformers derives a layer's kind by its index: the values for which all layers are alike,
# and the per-layer list that takes precedence, if there is one.
_BY_INDEX: dict[str, tuple[tuple[Any, ...], str]] = {
    "sliding_window_pattern": ((None, 1), "layer_types"),
    "full_attention_interval": ((None, 1), "layer_types"),
    "global_attn_every_n_layers": ((None, 1), "layer_types"),
    "num_kv_shared_layers": ((None, 0), ""),
    "no_rope_layer_interval": ((None,), "no_rope_layers"),
    "attn_layer_period": ((None, 1), "layers_block_type"),
    "expert_layer_period": ((None, 1), ""),
    "interleave_moe_layer_step": ((None, 1), "moe_layers"),
    "decoder_sparse_step": ((None, 1), "mlp_layer_types"),
    "moe_layer_start_index": ((None, 0), ""),
    "moe_layer_end_index": ((None, -1), ""),
    "moe_layer_interval": ((None, 1), ""),
    "attention_types": ((None,), ""),
    "scale_attn_by_inverse_layer_idx": ((None, False), ""),
}
# Model types whose layers compute by their index: a constant of the attention, the decay of a linear one.
_BY_PLACE = ("diffllama", "minimax")
# By which the embeddings have a part for each layer.
_FOR_EACH_LAYER = "hidden_size_per_layer_input"
_SAME_WINDOW_TYPES = ("mistral", "mixtral", "phi3", "qwen3_moe", "starcoder2")

# Model types whose layers attend to a window from `max_window_layers` on, with that key's default.
_WINDOW_FROM = {"qwen2": 28, "qwen3": 28}
# Model types of which every n-th layer attends to everything and the others to a window.
_FULL_EVERY = {"gemma2": 2, "gemma3_text": 6, "cohere2": 4, "olmo3": 4}
# Model types with `mlp_only_layers` beside `decoder_sparse_step`.
_SPARSE_STEP = ("qwen2_moe", "qwen3_moe", "qwen3_next")


def path_config(path: Sequence[Hop], donors: Sequence[Checkpoint]) -> dict[str, Any]:
    """Return the first hop's config with the path's depth; per-layer settings follow their layers.

    Args:
        path: the hops.
        donors: for each hop the checkpoint with its tensor set and config.

    Raises:
        CheckpointError: a config says by a layer's index what kind it is, in a way that no other order can say.
    """
    config = copy.deepcopy(donors[0].config)
    texts = _alike([_explicit_kinds(donor.text_config, donor.num_layers) for donor in donors], donors)
    text: dict[str, Any] = copy.deepcopy(texts[0])
    moved = any(hop.layer != index for index, hop in enumerate(path)) or len(path) != donors[0].num_layers
    if moved:
        for donor, donor_text in zip(donors, texts, strict=True):
            _refuse_derived_kinds(donor, donor_text)
    for key, value in texts[0].items():
        if key in _INDICES and isinstance(value, list):
            text[key] = [i for i, hop in enumerate(path) if hop.layer in (texts[i].get(key) or [])]
        elif _is_per_layer(key, value, donors[0].num_layers):
            text[key] = [_entry(donors[i], texts[i], key, hop.layer) for i, hop in enumerate(path)]
    for key in FIRST_DENSE_KEYS:
        if any(donor_text.get(key) for donor_text in texts):
            text[key] = _leading_dense(key, path, donors, texts)
    depth = next((key for key in DEPTH_KEYS if isinstance(text.get(key), int)), DEPTH_KEYS[0])
    text[depth] = len(path)
    nested = nested_key(config)
    return text if nested is None else {**config, nested: text}


def with_kinds(config: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Return a config that says the same, with the kinds of its `count` layers written out where they can be."""
    text = _explicit_kinds(text_config(config), count)
    nested = nested_key(config)
    return text if nested is None else {**config, nested: text}


def layer_settings(config: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    """Return what a config says of each of its layers alone.

    Args:
        config: one that gives no layer its kind by its index; see `derived_kind`.
        count: number of its layers.
    """
    text = text_config(config)
    each: list[dict[str, Any]] = [{} for _ in range(count)]
    for key, value in text.items():
        for index, settings in enumerate(each):
            if key in _INDICES and isinstance(value, list):
                settings[key] = index in value
            elif _is_per_layer(key, value, count):
                settings[key] = value[index]
            elif key in FIRST_DENSE_KEYS:
                settings[key] = index < (value or 0)
    return each


def shared_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config without its depth and what it says of single layers."""
    text = text_config(config)
    count = next((text[key] for key in DEPTH_KEYS if isinstance(text.get(key), int)), 0)
    own = (*DEPTH_KEYS, *_INDICES, *FIRST_DENSE_KEYS)
    rest = {k: v for k, v in text.items() if k not in own and not _is_per_layer(k, v, count)}
    nested = nested_key(config)
    return rest if nested is None else {**config, nested: rest}


def depth_settings(text: Mapping[str, Any]) -> dict[str, Any]:
    """Return all of a language model's config that may speak of its depth or of single layers."""
    own = (*DEPTH_KEYS, *_INDICES, *FIRST_DENSE_KEYS)
    return {key: value for key, value in text.items() if key in own or isinstance(value, list)}


def select_layers(config: Mapping[str, Any], layers: Sequence[int]) -> dict[str, Any]:
    """Return the config of the model that has some of a config's layers only, in this order."""
    chosen = copy.deepcopy(dict(config))
    nested = nested_key(chosen)
    text: dict[str, Any] = chosen if nested is None else chosen[nested]
    depth = next((key for key in DEPTH_KEYS if isinstance(text.get(key), int)), None)
    count = max(layers) + 1 if depth is None else text[depth]
    for key, value in list(text.items()):
        if key in _INDICES and isinstance(value, list):
            text[key] = [place for place, layer in enumerate(layers) if layer in value]
        elif _is_per_layer(key, value, count):
            text[key] = [value[layer] for layer in layers]
        elif key in FIRST_DENSE_KEYS:
            text[key] = sum(layer < (value or 0) for layer in layers)
    text[depth or DEPTH_KEYS[0]] = len(layers)
    return chosen


def _is_per_layer(key: str, value: Any, num_layers: int) -> bool:
    if not isinstance(value, list) or len(value) != num_layers:
        return False
    return key in _PER_LAYER or ("layer" in key and all(isinstance(v, str | int | float) for v in value))


def _entry(donor: Checkpoint, config: Mapping[str, Any], key: str, layer: int) -> Any:
    value = config.get(key)
    if not isinstance(value, list) or layer >= len(value):
        raise CheckpointError(
            f"{donor.path}: config key '{key}' has no entry for layer {layer}, as the path's first model has"
        )
    return value[layer]


def _leading_dense(
    key: str, path: Sequence[Hop], donors: Sequence[Checkpoint], texts: Sequence[Mapping[str, Any]]
) -> int:
    dense = [hop.layer < (text.get(key) or 0) for hop, text in zip(path, texts, strict=True)]
    count = sum(dense)
    if not all(dense[:count]):
        index = next(i for i in range(len(path)) if dense[i] != (i < count))
        raise CheckpointError(
            f"{donors[index].path}: config key '{key}' makes the first layers dense, so in a path all "
            f"dense layers must come first; hop {index} is out of order"
        )
    return count


def _explicit_kinds(text: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Return a language model's config with what it derives from a layer's index written out per layer."""
    text = dict(text)
    kind = str(text.get("model_type"))
    if kind in _WINDOW_FROM and text.get("use_sliding_window") and text.get("sliding_window"):
        first = text.get("max_window_layers", _WINDOW_FROM[kind])
        kinds = ["sliding_attention" if layer >= first else "full_attention" for layer in range(count)]
        text["layer_types"] = text.get("layer_types") or kinds
    if kind in _FULL_EVERY:
        every = text.get("sliding_window_pattern") or text.get("_sliding_window_pattern") or _FULL_EVERY[kind]
        kinds = ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(count)]
        text["layer_types"] = text.get("layer_types") or kinds
    step = text.get("decoder_sparse_step") or 1
    if kind in _SPARSE_STEP and step > 1:
        dense = text.get("mlp_only_layers") or []
        text["mlp_only_layers"] = [i for i in range(count) if i in dense or (i + 1) % step]
        text["decoder_sparse_step"] = 1
    return text


def _alike(texts: Sequence[dict[str, Any]], donors: Sequence[Checkpoint]) -> list[dict[str, Any]]:
    """Return the configs, with `layer_types` in all of them if one has it: older versions wrote none."""
    if not any(isinstance(text.get("layer_types"), list) for text in texts):
        return list(texts)
    return [
        text
        if isinstance(text.get("layer_types"), list) or derived_kind(text) is not None
        else {**text, "layer_types": [_only_kind(text)] * donor.num_layers}
        for text, donor in zip(texts, donors, strict=True)
    ]


def _only_kind(text: Mapping[str, Any]) -> str:
    windowed = text.get("sliding_window") and text.get("use_sliding_window", True)
    return "sliding_attention" if windowed else "full_attention"


def _refuse_derived_kinds(donor: Checkpoint, text: Mapping[str, Any]) -> None:
    """Refuse configs by which its index decides what a layer computes: moved layers would compute otherwise."""
    reason = derived_kind(text)
    if reason is None:
        return
    what = {
        "model_type": f"is '{text.get('model_type')}', whose layers compute by their index",
        _FOR_EACH_LAYER: "gives each layer a part of the embeddings by its index",
    }.get(reason, "gives layers their kind by index")
    written = reason == "sliding_window" or _BY_INDEX.get(reason, ((), ""))[1]
    instead = (
        "save the model with a current transformers, which writes the kinds down, or " if written else ""
    )
    raise CheckpointError(
        f"{donor.path}: config key '{reason}' {what}, so moved layers would change; {instead}keep all layers in "
        "order"
    )


def derived_kind(text: Mapping[str, Any]) -> str | None:
    """Return the key, if any, by which the language model's config makes what a layer computes depend on its index."""
    if text.get("model_type") in _BY_PLACE:
        return "model_type"
    if text.get(_FOR_EACH_LAYER):
        return _FOR_EACH_LAYER
    for key, (plain, precedence) in _BY_INDEX.items():
        if text.get(key) not in plain and not isinstance(text.get(precedence), list):
            return key
    if _only_kind(text) == "sliding_attention" and not isinstance(text.get("layer_types"), list):
        return None if text.get("model_type") in _SAME_WINDOW_TYPES else "sliding_window"
    return None
