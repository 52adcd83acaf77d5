"""Layer paths: which layers may follow one another, and residual scales folded into stock weights.

A path is a list of hops (model or merge, layer, scale); scale w_t multiplies the residual stream that
enters hop t: h_t = w_t h_{t-1} + A_t(n(w_t h_{t-1})) + M_t(n(·)). With P_t = w_1 … w_t and g_t = h_t / P_t a
pre-norm block becomes g_t = g_{t-1} + A_t / P_t + M_t / P_t, because RMSNorm and LayerNorm ignore the size of
their input and keep its sign. So the scales vanish into the last matrices of attention and MLP (`o_proj`,
`down_proj`; of a mixture those of all experts) and into the sign of the norms' weights: exact up to the norms'
epsilon, and the result is a stock checkpoint.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from evomerge.checkpoints import Checkpoint
from evomerge.checkpoints.compatibility import rope_settings
from evomerge.checkpoints.completeness import layer_kind
from evomerge.checkpoints.model_config import text_config
from evomerge.checkpoints.names import Position, parse
from evomerge.errors import CheckpointError, UserError
from evomerge.recipe import Hop

SAFE_PRODUCT = 8.0

# Pre-norm blocks whose norms multiply by their weight (not by 1 + weight) and whose residual stream is plain.
FOLDABLE_TYPES = frozenset(
    {
        *(
            "arcee",
            "glm",
            "gpt2",
            "gpt_neox",
            "granite",
            "helium",
            "llama",
            "ministral",
            "mistral",
            "mixtral",
        ),
        *("olmoe", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3", "stablelm"),
    }
)
# What adds to the residual stream, what reads it, and what lies between the two.
_OUTPUT = re.compile(
    r"(self_attn\.o_proj|attention\.dense|attn\.c_proj"
    r"|mlp\.(down_proj|dense_4h_to_h|c_proj|shared_expert\.down_proj|experts\.\d+\.down_proj)"
    r"|block_sparse_moe\.experts\.\d+\.w2)\.(weight|bias)"
)
_NORM = re.compile(r"(input_layernorm|post_attention_layernorm|ln_[12])\.(weight|bias)")
_BETWEEN = re.compile(
    r"(self_attn\.(q_proj|k_proj|v_proj|qkv_proj|q_norm|k_norm)|attention\.query_key_value|attn\.c_attn"
    r"|mlp\.(gate_proj|up_proj|gate_up_proj|dense_h_to_4h|c_fc|gate|shared_expert_gate"
    r"|shared_expert\.(gate|up)_proj|experts\.\d+\.(gate|up)_proj)"
    r"|block_sparse_moe\.(gate|experts\.\d+\.w[13]))\.(weight|bias)"
)

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


def check_hops(path: Sequence[Hop], donors: Sequence[Checkpoint]) -> None:
    """Refuse hops beyond a model's layers, and models whose configs cannot become one.

    Args:
        path: the hops.
        donors: for each hop the checkpoint with its tensor set and config.
    """
    for index, (hop, donor) in enumerate(zip(path, donors, strict=True)):
        if hop.layer >= donor.num_layers:
            raise UserError(
                f"'{hop.model or hop.merge}' has the layers 0 to {donor.num_layers - 1}, not {hop.layer}",
                key=f"path.{index}.layer",
            )
    ours = _arithmetic(donors[0])
    for donor in donors:
        theirs = _arithmetic(donor)
        for key in ours:
            if key in theirs and ours[key] != theirs[key]:
                raise CheckpointError(
                    f"{donor.path}: config key '{key}' is {theirs[key]!r}, the path's first model has "
                    f"{ours[key]!r}; layers of the two cannot share one config"
                )


def check_layers(path: Sequence[Hop], donors: Sequence[Checkpoint], config: Mapping[str, Any]) -> None:
    """Refuse layers whose tensors are not those of the other layers of their kind.

    Args:
        path: the hops.
        donors: for each hop the checkpoint with its tensor set.
        config: the output's, which says each layer's kind.
    """
    wanted: dict[tuple[Any, ...], tuple[int, dict[str, tuple[int, ...]]]] = {}
    for index, (hop, donor) in enumerate(zip(path, donors, strict=True)):
        shapes = _layer_shapes(donor, hop.layer)
        kind = layer_kind(text_config(config), index, len(path))
        first, expected = wanted.setdefault(kind, (index, shapes))
        for stem in sorted(expected.keys() | shapes.keys()):
            if expected.get(stem) != shapes.get(stem):
                raise CheckpointError(
                    f"{donor.path}: layer {hop.layer} cannot join the path: its '{stem}' is "
                    f"{shapes.get(stem, 'missing')}, that of hop {first} is {expected.get(stem, 'missing')}"
                )


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
            raise UserError(f"the product of all scales up to here is {product}", key=f"path.{index}.scale")
        if product == 1.0:
            layers.append({})
            continue
        outputs, norms = _foldable_parts(donor, hop, index)
        factors = dict.fromkeys(outputs, 1.0 / product)
        if product < 0:
            factors |= dict.fromkeys(norms, -1.0)
        layers.append(factors)
        if not 1 / SAFE_PRODUCT <= abs(product) <= SAFE_PRODUCT and not warnings:
            warnings.append(
                f"path.{index}.scale: the product of all scales up to here is {product:.4g}, outside "
                f"[1/{SAFE_PRODUCT:g}, {SAFE_PRODUCT:g}]: the exported model may differ from the scaled "
                "path, because the norms' epsilon no longer is negligible"
            )
    return Folding(tuple(layers), math.copysign(1.0, products[-1])), tuple(warnings)


@lru_cache(maxsize=64)
def tensors_at(donor: Checkpoint) -> Mapping[Position, Sequence[str]]:
    """Return a checkpoint's tensors by position, in its order."""
    found: dict[Position, list[str]] = {}
    for name in donor.tensors:
        found.setdefault(parse(name).position, []).append(name)
    return found


def _layer_shapes(donor: Checkpoint, layer: int) -> dict[str, tuple[int, ...]]:
    names = tensors_at(donor)[layer]
    shapes = {parse(name).stem: tuple(donor.tensors[name].shape) for name in names}
    stacks = {stem.split("{}")[0] for stem in shapes}
    if len(stacks) != 1:
        found = ", ".join(sorted(stacks)) or "none"
        raise CheckpointError(
            f"{donor.path}: a layer path needs one stack of layers, this model has: {found}"
        )
    return shapes


def _arithmetic(donor: Checkpoint) -> dict[str, Any]:
    """Return the config values that decide what a layer computes, where the config gives them."""
    text = donor.text_config
    values = {key: text.get(key) for key in _ARITHMETIC} | rope_settings(text)
    return {key: value for key, value in values.items() if value is not None}


def _foldable_parts(donor: Checkpoint, hop: Hop, index: int) -> tuple[list[str], list[str]]:
    """Return the stems of what adds to the residual stream and of its norms' weights, or refuse the block."""
    stems = list(_layer_shapes(donor, hop.layer))
    names = {stem: stem.partition("{}.")[2] for stem in stems}
    odd = [name for name in names.values() if not any(p.fullmatch(name) for p in (_OUTPUT, _NORM, _BETWEEN))]
    kind = donor.text_config.get("model_type")
    if odd or kind not in FOLDABLE_TYPES:
        why = f"its layers have '{min(odd)}'" if odd else f"model type '{kind}' is not known to have them"
        raise UserError(
            "a scale other than 1 folds exactly only into plain pre-norm blocks, like those of Llama; "
            f"{why}; use scale 1",
            key=f"path.{index}.scale",
        )
    outputs = [stem for stem, name in names.items() if _OUTPUT.fullmatch(name)]
    # A norm's bias is added after the sign: turning the weight turns what the sign turned back.
    norms = [stem for stem, name in names.items() if _NORM.fullmatch(name) and name.endswith("weight")]
    return outputs, norms
