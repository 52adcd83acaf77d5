"""Whether checkpoints can be merged with each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evomerge.checkpoints.canonical import outside_parts
from evomerge.checkpoints.completeness import output_head, vocabulary_tensors
from evomerge.checkpoints.model_config import DEPTH_KEYS
from evomerge.checkpoints.names import is_outside, parse
from evomerge.checkpoints.reader import Checkpoint
from evomerge.errors import CheckpointError

_SHOWN = 3
_TYPE = ("model_type",)

# Keys that must agree, with the names that families give them. They decide shapes or how shapes are read.
_DECISIVE: tuple[tuple[str, ...], ...] = (
    _TYPE,
    ("hidden_size", "n_embd", "d_model"),
    DEPTH_KEYS,
    ("intermediate_size", "n_inner", "ffn_dim"),
    ("num_attention_heads", "n_head", "n_heads"),
    ("num_key_value_heads",),
    ("head_dim",),
    ("hidden_act", "hidden_activation", "activation_function"),
    ("num_local_experts", "num_experts", "n_routed_experts"),
)

# Keys that change what a layer computes from the same tensors. Fine-tunes do change them (longer contexts).
_FORWARD: tuple[tuple[str, ...], ...] = (
    ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"),
    ("max_position_embeddings", "n_positions"),
    ("sliding_window",),
    ("use_sliding_window",),
    ("layer_types",),
    ("num_experts_per_tok",),
    ("attn_logit_softcapping",),
    ("final_logit_softcapping",),
    ("query_pre_attn_scalar",),
)


def check_compatible(
    base: Checkpoint, others: Mapping[str, Checkpoint], *, any_depth: bool = False
) -> list[str]:
    """Refuse checkpoints that cannot be merged: other architecture, sizes, tensors or shapes.

    The number of tokens may differ, and whether the head is tied to the embedding.

    Args:
        base: what the others are compared with.
        others: by name.
        any_depth: models may have different numbers of layers; the layers that both have are compared.

    Returns:
        Warnings, one sentence each: config keys that leave the tensors mergeable but change what is computed
        from them (rotary embedding, epsilon of the norms, context length, …). The output takes the base's.

    Raises:
        CheckpointError: names the expert, and the config key or the tensors that differ.
    """
    warnings: list[str] = []
    for name, other in others.items():
        _check_config(base, name, other, any_depth)
        _check_tensors(base, name, other, any_depth)
        warnings += _outside_differences(base, name, other) + _forward_differences(base, name, other)
    return warnings


def rope_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rotary embedding's settings, whichever transformers version wrote the config.

    Version 5 keeps them in ``rope_parameters``, version 4 in ``rope_theta`` and ``rope_scaling``.
    """
    settings = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    for key in ("rope_theta", "partial_rotary_factor"):
        if config.get(key) is not None:
            settings.setdefault(key, config[key])
    nested = any(isinstance(value, dict) for value in settings.values())
    if settings and not nested:
        settings["rope_type"] = settings.pop("type", None) or settings.get("rope_type") or "default"
        settings.setdefault("partial_rotary_factor", 1.0)
    return settings


def _called(base: Checkpoint) -> str:
    return "the base" if base.name in ("", "base") else f"'{base.name}'"


def _value(checkpoint: Checkpoint, keys: tuple[str, ...]) -> Any:
    """Return the value of the first of the keys that has one, else the one that follows from other keys.

    A multimodal config may leave out of its nested one what equals the family's default.
    """
    config = checkpoint.text_config
    value = next((config[key] for key in keys if config.get(key) is not None), None)
    heads, width = config.get("num_attention_heads"), config.get("hidden_size")
    if value is not None or _multimodal(checkpoint):
        return value
    if keys == ("num_key_value_heads",):
        return heads
    if keys == ("head_dim",) and isinstance(heads, int) and isinstance(width, int) and heads:
        return width // heads
    return None


def _key(checkpoint: Checkpoint, keys: tuple[str, ...]) -> str:
    return next((key for key in keys if key in checkpoint.text_config), keys[0])


def _multimodal(checkpoint: Checkpoint) -> bool:
    return checkpoint.text_config is not checkpoint.config or any(map(is_outside, checkpoint.tensors))


def _check_config(base: Checkpoint, name: str, other: Checkpoint, any_depth: bool) -> None:
    for keys in _DECISIVE:
        if any_depth and keys == DEPTH_KEYS:
            continue
        if keys == _TYPE and _multimodal(base) != _multimodal(other):
            continue
        ours, theirs = _value(base, keys), _value(other, keys)
        if ours is not None and theirs is not None and ours != theirs:
            raise CheckpointError(
                f"{other.path}: expert '{name}' has {_key(base, keys)} {theirs}, "
                f"{_called(base)} {ours}; only fine-tunes of one architecture can be merged"
            )


def _check_tensors(base: Checkpoint, name: str, other: Checkpoint, any_depth: bool) -> None:
    shared = min(base.num_layers, other.num_layers) if any_depth else None

    def compared(checkpoint: Checkpoint) -> list[str]:
        places = ((tensor, parse(tensor).position) for tensor in checkpoint.tensors)
        return [
            t
            for t, place in places
            if not is_outside(t) and (shared is None or isinstance(place, str) or place < shared)
        ]

    heads = {output_head(base.tensors), output_head(other.tensors)} if base.tied != other.tied else set()
    theirs, ours = {*other.tensors, *heads}, {*base.tensors, *heads}
    missing = [tensor for tensor in compared(base) if tensor not in theirs]
    unknown = [tensor for tensor in compared(other) if tensor not in ours]
    if missing and unknown and _fused(missing) != _fused(unknown):
        forms = {True: "one tensor of all experts", False: "a tensor of each expert"}
        raise CheckpointError(
            f"{other.path}: expert '{name}' has {forms[_fused(unknown)]} of a layer, {_called(base)} "
            f"{forms[_fused(missing)]} ('{missing[0]}'); save both with the same version of transformers"
        )
    if missing:
        raise CheckpointError(
            f"{other.path}: expert '{name}' lacks {_list(missing)}, which {_called(base)} has; "
            "only fine-tunes of one architecture can be merged"
        )
    if unknown:
        raise CheckpointError(
            f"{other.path}: expert '{name}' has {_list(unknown)}, unknown to {_called(base)}; "
            "only fine-tunes of one architecture can be merged"
        )
    by_token = vocabulary_tensors(base.tensors)
    differing = [
        tensor
        for tensor in compared(base)
        if tensor in other.tensors
        and base.tensors[tensor].shape[tensor in by_token :]
        != other.tensors[tensor].shape[tensor in by_token :]
    ]
    if differing:
        first, rest = differing[0], len(differing) - 1
        more = f"; {rest} further tensors differ in shape too" if rest else ""
        raise CheckpointError(
            f"{other.path}: '{first}' has shape {list(other.tensors[first].shape)} in expert '{name}', "
            f"{list(base.tensors[first].shape)} in {_called(base)}{more}"
        )


def _fused(tensors: list[str]) -> bool:
    return any(tensor.endswith((".experts.gate_up_proj", ".experts.down_proj")) for tensor in tensors)


def _outside_differences(base: Checkpoint, name: str, other: Checkpoint) -> list[str]:
    """Say what is not merged where one of two models, or both, are multimodal."""
    left_out = [tensor for tensor in other.tensors if is_outside(tensor)]
    warnings = []
    if left_out:
        parts = ", ".join(outside_parts(left_out))
        warnings.append(
            f"only the language model of expert '{name}' is merged; its {len(left_out)} other tensors "
            f"({parts}) are left out"
        )
    ours, theirs = base.text_config.get("model_type"), other.text_config.get("model_type")
    if None not in (ours, theirs) and ours != theirs:
        warnings.append(
            f"expert '{name}' has model_type {theirs}, {_called(base)} {ours}; their tensors have the same "
            "names and shapes"
        )
    return warnings


def _list(tensors: list[str]) -> str:
    """Name at most three tensors, and count them."""
    shown = ", ".join(f"'{tensor}'" for tensor in tensors[:_SHOWN])
    more = f", … ({len(tensors)} tensors)" if len(tensors) > _SHOWN else ""
    return ("tensor " if len(tensors) == 1 else "tensors ") + shown + more


def _forward_differences(base: Checkpoint, name: str, other: Checkpoint) -> list[str]:
    differences = []
    for keys in _FORWARD:
        ours, theirs = _value(base, keys), _value(other, keys)
        if ours is not None and theirs is not None and ours != theirs:
            differences.append((_key(base, keys), theirs, ours))
    one, two = rope_settings(base.text_config), rope_settings(other.text_config)
    for key in sorted({*one, *two} if one and two else ()):
        unknown_default = key == "rope_theta" and (key not in one or key not in two)
        if not unknown_default and one.get(key) != two.get(key):
            differences.append((key, two.get(key), one.get(key)))
    return [
        f"expert '{name}' has {key} {theirs}, {_called(base)} {ours}; the merged model has one setting"
        for key, theirs, ours in differences
    ]
