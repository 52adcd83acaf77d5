"""Layer paths: which layers may follow one another, and residual scales folded into stock weights.

A path is a list of hops (model or merge, layer, scale); scale w_t multiplies the residual stream that
enters hop t: h_t = w_t h_{t-1} + A_t(w_t h_{t-1}) + M_t(·). With P_t = w_1 … w_t and g_t = h_t / P_t a block
becomes g_t = g_{t-1} + A_t(P_t g_{t-1}) / P_t + M_t(P_t ·) / P_t, and the powers of P_t go into the weights:

- what writes to the stream is divided by P_t: the last matrices of attention and MLP (`o_proj`, `down_proj`; of
  a mixture those of all experts), or the norms behind them where there are such;
- what reads the stream takes P_t: RMSNorm and LayerNorm ignore the size of their input and keep its sign, so
  that only the sign goes into their weights; where matrices read it without a norm, they are multiplied by P_t.

The result is a stock checkpoint, exact up to the epsilon of the norms that read the stream.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from evomerge.checkpoints import Checkpoint
from evomerge.checkpoints.compatibility import rope_settings
from evomerge.checkpoints.completeness import layer_kind
from evomerge.checkpoints.model_config import text_config
from evomerge.checkpoints.names import Position, parse
from evomerge.errors import CheckpointError, UserError
from evomerge.recipe import Hop

if TYPE_CHECKING:
    from evomerge.merging.plan import ModelPlan

SAFE_PRODUCT = 8.0


@dataclass(frozen=True)
class _Form:
    """What the tensors of a block do with the residual stream, as patterns on their names within the layer.

    Attributes:
        writers: weights and biases of what adds to the stream last.
        norms: norms that read the stream.
        readers: matrices that read it without a norm.
        between: what lies between.
        unit: norms multiply by 1 + their weight.
    """

    writers: re.Pattern[str]
    norms: re.Pattern[str]
    between: re.Pattern[str]
    readers: re.Pattern[str] = re.compile(r"(?!)")
    unit: bool = False

    def knows(self, name: str) -> bool:
        """Whether it says what a tensor does."""
        return any(p.fullmatch(name) for p in (self.writers, self.norms, self.readers, self.between))


_OUT = (
    r"self_attn\.(o_proj|dense)|attention\.dense|attn\.c_proj"
    r"|mlp\.(down_proj|fc2|dense_4h_to_h|c_proj|shared_expert\.down_proj|experts\.\d+\.down_proj)"
    r"|block_sparse_moe\.experts\.\d+\.w2"
)
_IN = (
    r"self_attn\.(q_proj|k_proj|v_proj|qkv_proj)|attention\.query_key_value|attn\.c_attn"
    r"|mlp\.(gate_proj|up_proj|gate_up_proj|fc1|dense_h_to_4h|c_fc|gate|shared_expert_gate"
    r"|shared_expert\.(gate|up)_proj|experts\.\d+\.(gate|up)_proj)"
    r"|block_sparse_moe\.(gate|experts\.\d+\.w[13])"
)
_OF_HEADS = r"self_attn\.(q_norm|k_norm|q_layernorm|k_layernorm)"


def _parameters(*names: str) -> re.Pattern[str]:
    return re.compile(rf"({'|'.join(names)})\.(weight|bias)")


_PRE = _Form(
    writers=_parameters(_OUT),
    norms=_parameters(r"input_layernorm|post_attention_layernorm|ln_[12]"),
    between=_parameters(_IN, _OF_HEADS),
)
_SANDWICH = _Form(
    writers=_parameters("post_attention_layernorm|post_feedforward_layernorm"),
    norms=_parameters("input_layernorm|pre_feedforward_layernorm"),
    between=_parameters(_IN, _OUT, _OF_HEADS),
)
_POST = _Form(
    writers=_parameters("post_attention_layernorm|post_feedforward_layernorm"),
    norms=re.compile(r"(?!)"),
    # Their bias is added after P_t went into the weight, as it was after the scaled stream.
    readers=re.compile(rf"({_IN})\.weight"),
    between=_parameters(_IN, _OUT, _OF_HEADS),
)
_GLM4 = _Form(
    writers=_parameters("post_self_attn_layernorm|post_mlp_layernorm"),
    norms=_parameters("input_layernorm|post_attention_layernorm"),
    between=_parameters(_IN, _OUT),
)

_FORMS: dict[str, _Form] = {
    **dict.fromkeys(("arcee", "glm", "granite", "helium", "llama", "seed_oss", "smollm3"), _PRE),
    **dict.fromkeys(("ministral", "mistral", "mixtral", "olmoe"), _PRE),
    **dict.fromkeys(("phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe"), _PRE),
    **dict.fromkeys(("cohere", "cohere2", "gpt2", "gpt_neox", "phi", "stablelm", "starcoder2"), _PRE),
    "gemma": replace(_PRE, unit=True),
    **dict.fromkeys(("gemma2", "gemma3_text"), replace(_SANDWICH, unit=True)),
    "glm4": _GLM4,
    **dict.fromkeys(("olmo2", "olmo3", "exaone4"), _POST),
}
"""Model types for whose blocks folding is exact."""

FOLDABLE_TYPES = frozenset(_FORMS)

# Config keys that change what a layer computes without showing in any shape.
_ARITHMETIC = (
    "model_type",
    "hidden_act",
    "hidden_activation",
    "activation_function",
    "num_attention_heads",
    "n_head",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "norm_eps",
    "norm_epsilon",
    "attention_multiplier",
    "residual_multiplier",
    "query_pre_attn_scalar",
    "scale_attn_weights",
    "use_parallel_residual",
    "rotary_pct",
    "rotary_emb_base",
    "attention_chunk_size",
    "num_experts_per_tok",
    "norm_topk_prob",
    "n_group",
    "topk_group",
    "routed_scaling_factor",
    "scoring_func",
)
# Those of them that null turns off.
_SWITCHED = ("attn_logit_softcapping", "clip_qkv")


@dataclass(frozen=True)
class Fold:
    """What makes a tensor w take up a scale: factor · w + shift."""

    factor: float = 1.0
    shift: float = 0.0


UNFOLDED = Fold()


@dataclass(frozen=True)
class Folding:
    """What makes scales vanish: per hop by tensor stem, and for the weight of the final norm."""

    layers: tuple[dict[str, Fold], ...]
    final_norm: Fold = UNFOLDED


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
                    f"{donor.path}: config key '{key}' is {_said(theirs[key])}, the path's first model has "
                    f"{_said(ours[key])}; layers of the two cannot share one config"
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
    """Return what each hop's tensors take up, and warnings.

    Raises UserError where the blocks are not of a kind for which folding is exact.
    """
    products: list[float] = []
    for hop in path:
        products.append((products[-1] if products else 1.0) * hop.scale)
    layers: list[dict[str, Fold]] = []
    warnings: list[str] = []
    for index, (hop, donor, product) in enumerate(zip(path, donors, products, strict=True)):
        if not math.isfinite(product) or product == 0:
            raise UserError(f"the product of all scales up to here is {product}", key=f"path.{index}.scale")
        if product == 1.0:
            layers.append({})
            continue
        layers.append(_folds(donor, hop, index, product))
        if not 1 / SAFE_PRODUCT <= abs(product) <= SAFE_PRODUCT and not warnings:
            warnings.append(
                f"path.{index}.scale: the product of all scales up to here is {product:.4g}, outside "
                f"[1/{SAFE_PRODUCT:g}, {SAFE_PRODUCT:g}]: the exported model may differ from the scaled "
                "path, because the norms' epsilon no longer is negligible"
            )
    last = _FORMS.get(str(donors[-1].text_config.get("model_type")))
    sign = math.copysign(1.0, products[-1])
    return Folding(tuple(layers), _of_norm(sign, last is not None and last.unit)), tuple(warnings)


def path_room(plan: ModelPlan, layers: int, *, hops: int | None = None) -> int:
    """Return the bytes that layer paths may keep: all layers of their sources, each once, and what is folded.

    Scales make other tensors with each path; those of a path's length are then kept besides, to be used again.

    Args:
        plan: of a path.
        layers: how many its sources have together.
        hops: reckon as for a path so long; by default the plan's.
    """
    inside = [job for job in plan.jobs if isinstance(parse(job.name).position, int)]
    here = max(1, len({parse(job.name).position for job in inside}))
    hops = hops or here
    whole = sum(job.nbytes for job in inside)
    folded = sum(job.nbytes for job in inside if job.factor != 1.0)
    besides = hops * (whole + folded) // here if folded else 0
    return plan.nbytes - whole + layers * whole // here + besides


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
    values = {key: text[key] for key in _ARITHMETIC if text.get(key) is not None} | rope_settings(text)
    values |= {key: text[key] for key in _SWITCHED if key in text}
    if "sliding_window" in text:
        values["sliding_window"] = _window(text)
    return values


def _window(text: Mapping[str, Any]) -> int | None:
    """Return how far windowed layers look back; None where no layer has a window, or one as long as its texts."""
    window = text["sliding_window"]
    kinds = text.get("layer_types")
    used = window and text.get("use_sliding_window", True)
    if not used or (isinstance(kinds, list) and "sliding_attention" not in kinds):
        return None
    return None if window >= (text.get("max_position_embeddings") or math.inf) else int(window)


def _said(value: Any) -> str:
    return "not set" if value is None else repr(value)


def _folds(donor: Checkpoint, hop: Hop, index: int, product: float) -> dict[str, Fold]:
    """Return what the tensors of a hop take up of the product of all scales up to it, or refuse the block."""
    names = {stem: stem.partition("{}.")[2] for stem in _layer_shapes(donor, hop.layer)}
    kind = donor.text_config.get("model_type")
    form = _FORMS.get(str(kind))
    odd = [name for name in names.values() if form is not None and not form.knows(name)]
    if form is None or odd:
        why = f"its layers have '{min(odd)}'" if odd else f"those of model type '{kind}' are not known"
        raise UserError(
            "a scale other than 1 folds only into blocks of which it is known what reads the residual stream "
            f"and what writes to it; {why}; use scale 1",
            key=f"path.{index}.scale",
        )
    folds: dict[str, Fold] = {}
    for stem, name in names.items():
        if form.writers.fullmatch(name):
            normed = name.rpartition(".")[0].endswith("norm")
            folds[stem] = _of_norm(1 / product, form.unit) if normed else Fold(1 / product)
        elif form.readers.fullmatch(name):
            folds[stem] = Fold(product)
        # A norm's bias is added after the sign: turning the weight turns what the sign turned back.
        elif product < 0 and form.norms.fullmatch(name) and name.endswith("weight"):
            folds[stem] = _of_norm(-1.0, form.unit)
    return folds


def _of_norm(factor: float, unit: bool) -> Fold:
    """Return what multiplies the output of a norm, whose weight w may stand for 1 + w."""
    return Fold(factor, factor - 1.0 if unit else 0.0)
