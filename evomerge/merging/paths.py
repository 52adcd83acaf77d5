"""Layer paths: the output's config, and residual scales folded into stock weights.

A path is a list of hops (model or merge, layer, scale); scale w_t multiplies the residual stream that
enters hop t: h_t = w_t h_{t-1} + A_t(n(w_t h_{t-1})) + M_t(n(·)). With P_t = w_1 … w_t and g_t = h_t / P_t a
pre-norm block becomes g_t = g_{t-1} + A_t / P_t + M_t / P_t, because RMSNorm ignores the size of its input
and keeps its sign. So the scales vanish into `o_proj` and `down_proj` and into the sign of the norms: exact
up to the norms' epsilon, and the result is a stock checkpoint.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from evomerge.checkpoints import Checkpoint
from evomerge.checkpoints.compatibility import rope_settings
from evomerge.checkpoints.names import parse
from evomerge.errors import CheckpointError, UserError
from evomerge.recipe import Hop

SAFE_PRODUCT = 8.0

# Pre-norm blocks whose norms multiply by their weight (not by 1 + weight) and whose residual stream is plain.
FOLDABLE_TYPES = frozenset(
    {
        "arcee",
        "glm",
        "granite",
        "helium",
        "llama",
        "ministral",
        "mistral",
        "phi3",
        "qwen2",
        "qwen3",
        "seed_oss",
        "smollm3",
    }
)
_OUTPUTS = ("self_attn.o_proj.weight", "self_attn.o_proj.bias", "mlp.down_proj.weight", "mlp.down_proj.bias")
_NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")
_REQUIRED = ("self_attn.o_proj.weight", "mlp.down_proj.weight", *_NORMS)
_INDIFFERENT = tuple(
    f"{module}.{leaf}"
    for module in (
        *(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "qkv_proj", "q_norm", "k_norm")),
        *(f"mlp.{name}" for name in ("gate_proj", "up_proj", "gate_up_proj")),
    )
    for leaf in ("weight", "bias")
)

_DEPTH_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")

# Config lists with one entry a layer, and lists of layer indices.
_PER_LAYER = (
    "layer_types",
    "mlp_layer_types",
    "layers_block_type",
    "no_rope_layers",
    "num_attention_heads_per_layer",
    "num_key_value_heads_per_layer",
    "attention_layers",
)
_INDICES = ("mlp_only_layers", "attn_layer_indices", "moe_layers", "full_attn_idxs")

# Keys from which transformers derives a layer's kind by its index: the values for which all layers are alike,
# and the per-layer list that takes precedence.
_BY_INDEX: dict[str, tuple[tuple[int | None, ...], str]] = {
    "sliding_window_pattern": ((None, 1), "layer_types"),
    "full_attention_interval": ((None, 1), "layer_types"),
    "global_attn_every_n_layers": ((None, 1), "layer_types"),
    "num_kv_shared_layers": ((None, 0), ""),
    "no_rope_layer_interval": ((None,), "no_rope_layers"),
    "attn_layer_period": ((None, 1), "layers_block_type"),
    "expert_layer_period": ((None, 1), ""),
    "interleave_moe_layer_step": ((None, 1), "moe_layers"),
    "decoder_sparse_step": ((None, 1), "mlp_layer_types"),
    "first_k_dense_replace": ((None, 0), "mlp_layer_types"),
}
_SAME_WINDOW_TYPES = ("mistral", "mixtral", "phi3")

# Config keys that change what a layer computes without showing in any shape.
_ARITHMETIC = (
    "model_type",
    "hidden_act",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "layer_norm_eps",
    "sliding_window",
    "attention_multiplier",
    "residual_multiplier",
)


@dataclass(frozen=True)
class Folding:
    """Factors that make scales vanish: per hop by tensor stem, and that of the final norm."""

    layers: tuple[dict[str, float], ...]
    final_norm: float = 1.0


def check_path(path: Sequence[Hop], donors: Sequence[Checkpoint]) -> None:
    """Refuse hops beyond a model's layers, and hops whose layers cannot follow one another.

    Args:
        path: the hops.
        donors: for each hop the checkpoint with its tensor set and config.
    """
    for index, (hop, donor) in enumerate(zip(path, donors, strict=True)):
        if hop.layer >= donor.num_layers:
            raise UserError(
                f"path.{index}.layer: '{hop.model or hop.merge}' has the layers 0 to {donor.num_layers - 1}, "
                f"not {hop.layer}"
            )
    first = donors[0]
    wanted = _layer_shapes(first, path[0].layer)
    for hop, donor in zip(path, donors, strict=True):
        shapes = _layer_shapes(donor, hop.layer)
        for stem in sorted(wanted.keys() | shapes.keys()):
            if wanted.get(stem) != shapes.get(stem):
                raise CheckpointError(
                    f"{donor.path}: layer {hop.layer} cannot join the path: its '{stem}' is "
                    f"{shapes.get(stem, 'missing')}, that of the first hop is {wanted.get(stem, 'missing')}"
                )
        ours, theirs = _arithmetic(first), _arithmetic(donor)
        for key in ours:
            if key in theirs and ours[key] != theirs[key]:
                raise CheckpointError(
                    f"{donor.path}: config key '{key}' is {theirs[key]!r}, the path's first model has "
                    f"{ours[key]!r}; layers of the two cannot share one config"
                )


def path_config(path: Sequence[Hop], donors: Sequence[Checkpoint]) -> dict[str, Any]:
    """Return the first hop's config with the path's depth; per-layer lists follow their layers."""
    configs = [_explicit_layer_types(donor) for donor in donors]
    config = copy.deepcopy(configs[0])
    depth = next((key for key in _DEPTH_KEYS if isinstance(config.get(key), int)), None)
    if depth is None:
        raise CheckpointError(
            f"{donors[0].path}: config.json has no num_hidden_layers; a layer path needs it"
        )
    moved = any(hop.layer != index for index, hop in enumerate(path)) or len(path) != donors[0].num_layers
    if moved:
        for donor, donor_config in zip(donors, configs, strict=True):
            _refuse_derived_kinds(donor, donor_config)
    for key, value in configs[0].items():
        if key in _INDICES and isinstance(value, list):
            config[key] = [i for i, hop in enumerate(path) if hop.layer in (configs[i].get(key) or [])]
        elif _is_per_layer(key, value, donors[0].num_layers):
            config[key] = [_entry(donors[i], configs[i], key, hop.layer) for i, hop in enumerate(path)]
    config[depth] = len(path)
    return config


def fold_scales(path: Sequence[Hop], donors: Sequence[Checkpoint]) -> tuple[Folding, tuple[str, ...]]:
    """Return the factors of each hop's tensors, and warnings.

    Raises UserError where the blocks are not of the kind for which folding is exact.
    """
    products: list[float] = []
    for hop in path:
        products.append((products[-1] if products else 1.0) * hop.scale)
    layers: list[dict[str, float]] = []
    warnings: list[str] = []
    for index, (hop, donor, product) in enumerate(zip(path, donors, products, strict=True)):
        if not math.isfinite(product) or product == 0:
            raise UserError(f"path.{index}.scale: the product of all scales up to here is {product}")
        if product == 1.0:
            layers.append({})
            continue
        prefix = _check_foldable(donor, hop, index)
        factors = {prefix + name: 1.0 / product for name in _OUTPUTS}
        if product < 0:
            factors |= {prefix + name: -1.0 for name in _NORMS}
        layers.append(factors)
        if not 1 / SAFE_PRODUCT <= abs(product) <= SAFE_PRODUCT and not warnings:
            warnings.append(
                f"path.{index}.scale: the product of all scales up to here is {product:.4g}, outside "
                f"[1/{SAFE_PRODUCT:g}, {SAFE_PRODUCT:g}]: the exported model may differ from the scaled "
                "path, because the norms' epsilon no longer is negligible"
            )
    return Folding(tuple(layers), math.copysign(1.0, products[-1])), tuple(warnings)


def _layer_shapes(donor: Checkpoint, layer: int) -> dict[str, tuple[int, ...]]:
    shapes = {
        parse(name).stem: tuple(info.shape)
        for name, info in donor.tensors.items()
        if parse(name).position == layer
    }
    stacks = {stem.split("{}")[0] for stem in shapes}
    if len(stacks) != 1:
        found = ", ".join(sorted(stacks)) or "none"
        raise CheckpointError(
            f"{donor.path}: a layer path needs one stack of layers, this model has: {found}"
        )
    return shapes


def _arithmetic(donor: Checkpoint) -> dict[str, Any]:
    """Return the config values that decide what a layer computes, where the config gives them."""
    values = {key: donor.config.get(key) for key in _ARITHMETIC} | rope_settings(donor.config)
    return {key: value for key, value in values.items() if value is not None}


def _check_foldable(donor: Checkpoint, hop: Hop, index: int) -> str:
    """Return the prefix of the hop's stems, or refuse its architecture."""
    stems = _layer_shapes(donor, hop.layer)
    prefix = next(iter(stems)).split("{}")[0] + "{}."
    names = {stem.removeprefix(prefix) for stem in stems}
    odd = sorted(names - {*_OUTPUTS, *_NORMS, *_INDIFFERENT}) or sorted(set(_REQUIRED) - names)
    kind = donor.config.get("model_type")
    if odd or kind not in FOLDABLE_TYPES:
        why = f"its layers differ in '{odd[0]}'" if odd else f"model type '{kind}' is not known to be one"
        raise UserError(
            f"path.{index}.scale: a scale other than 1 folds exactly only into pre-norm blocks of the Llama "
            f"family; {why}; use scale 1"
        )
    return prefix


def _is_per_layer(key: str, value: Any, num_layers: int) -> bool:
    if not isinstance(value, list) or len(value) != num_layers:
        return False
    return key in _PER_LAYER or ("layer" in key and all(isinstance(v, str | int | float) for v in value))


def _entry(donor: Checkpoint, config: dict[str, Any], key: str, layer: int) -> Any:
    value = config.get(key)
    if not isinstance(value, list) or layer >= len(value):
        raise CheckpointError(
            f"{donor.path}: config key '{key}' has no entry for layer {layer}, as the path's first model has"
        )
    return value[layer]


def _explicit_layer_types(donor: Checkpoint) -> dict[str, Any]:
    """Write out the `layer_types` that Qwen configs leave to `max_window_layers`, a rule by layer index."""
    config = donor.config
    window = config.get("use_sliding_window") and config.get("sliding_window")
    if config.get("layer_types") is not None or not window or "max_window_layers" not in config:
        return config
    types = [
        "sliding_attention" if layer >= config["max_window_layers"] else "full_attention"
        for layer in range(donor.num_layers)
    ]
    return {**config, "layer_types": types}


def _refuse_derived_kinds(donor: Checkpoint, config: dict[str, Any]) -> None:
    """Refuse configs that say by a layer's index what kind it is: moved layers would change their kind."""
    reason = next(
        (
            key
            for key, (plain, precedence) in _BY_INDEX.items()
            if config.get(key) not in plain and not isinstance(config.get(precedence), list)
        ),
        None,
    )
    if (
        reason is None
        and not isinstance(config.get("layer_types"), list)
        and config.get("sliding_window")
        and config.get("use_sliding_window", True)
        and config.get("model_type") not in _SAME_WINDOW_TYPES
    ):
        reason = "sliding_window"
    if reason is not None:
        raise CheckpointError(
            f"{donor.path}: config key '{reason}' gives layers their kind by index, so moved layers "
            "would change; save the model with a current transformers, which writes the kinds down, or keep "
            "all layers in order"
        )
