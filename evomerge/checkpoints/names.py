"""Tensor identity: what a tensor's canonical name says about its layer and its role.

By rule from the components of the name, so that architectures need no table each.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, get_args

Role = Literal["attention", "mlp", "router", "mixer", "norm", "embedding", "head", "other"]
ROLES: tuple[Role, ...] = get_args(Role)

Position = int | Literal["pre", "post"]
"""A layer's index, or ``pre`` (embeddings and the like) or ``post`` (final norm, head)."""

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block)\.(\d+)\.")
_NORM = re.compile(r"norm|^ln$|^ln_|_ln$|^ln\d", re.IGNORECASE)
_EMBEDDING = {
    *("embed_tokens", "wte", "wpe", "embed_in", "tok_embeddings", "word_embeddings", "embed_positions"),
    *("embeddings", "position_embeddings"),
}
_HEAD = {"lm_head", "embed_out", "output"}
_ATTENTION = {"self_attn", "attn", "attention", "self_attention"}
_MLP = {"mlp", "feed_forward", "ffn", "block_sparse_moe", "experts", "shared_expert", "shared_experts"}
_ROUTER = {"router", "shared_expert_gate"}
_MIXER = {"mixer", "mamba", "ssm", "linear_attn", "linear_attention"}

OUTSIDE = "outside:"
"""Stands before the on-disk name of a tensor outside the language model (a vision tower, a projector)."""

# Tensors that some checkpoints carry and that are recomputed from the config at load.
_BUFFERS = re.compile(
    r"(^|\.)(rotary_emb\.(\w+_)?(inv_freq|cos_cached|sin_cached)|"
    r"(attn|crossattention|attention)\.(bias|masked_bias)|position_ids|embed_tokens\.embed_scale)$"
)

# Model types whose linear layers are `Conv1D` modules of transformers, which keep weights as (in, out).
_CONV1D_TYPES = {"gpt2", "openai-gpt", "decision_transformer"}
_CONV1D = re.compile(r"(^|\.)(c_attn|q_attn|c_proj|c_fc)\.weight$")


@dataclass(frozen=True)
class TensorName:
    """One canonical tensor name, taken apart.

    Attributes:
        name: the full name, e.g. ``model.layers.3.self_attn.q_proj.weight``.
        position: the layer's index, ``"pre"`` or ``"post"``.
        role: one of `ROLES`.
        stem: the name with the layer's index replaced by ``{}``; equal for the same tensor of two layers.
    """

    name: str
    position: Position
    role: Role
    stem: str

    def at_layer(self, layer: int) -> str:
        """Return the name of the same tensor in another layer."""
        return self.stem.replace("{}", str(layer), 1)


@lru_cache(maxsize=65536)
def parse(name: str) -> TensorName:
    """Take a canonical tensor name apart; one outside the language model has no layer and the role ``other``."""
    if is_outside(name):
        return TensorName(name, "pre", "other", name)
    match = _LAYER.search(name)
    role = _role(name.split("."), in_layer=match is not None)
    if match is None:
        before = role != "head" and any("embed" in part for part in name.split("."))
        position: Position = "pre" if before or role == "embedding" else "post"
        return TensorName(name, position, role, name)
    stem = name[: match.start(1)] + "{}" + name[match.end(1) :]
    return TensorName(name, int(match.group(1)), role, stem)


def is_buffer(name: str) -> bool:
    """Whether a tensor is a known buffer that no merge touches (inverse frequencies, causal masks)."""
    return _BUFFERS.search(name) is not None


def is_outside(name: str) -> bool:
    """Whether a canonical name is that of a tensor outside the language model."""
    return name.startswith(OUTSIDE)


def is_transposed(config: Mapping[str, Any], name: str) -> bool:
    """Whether a matrix is stored as (in, out) instead of (out, in), as GPT-2's linear layers are.

    Args:
        config: the checkpoint's ``config.json``.
        name: of the tensor.
    """
    return config.get("model_type") in _CONV1D_TYPES and _CONV1D.search(name) is not None


def _role(parts: list[str], *, in_layer: bool) -> Role:
    components = set(parts)
    if any(_NORM.search(part) for part in parts):
        return "norm"
    if components & _EMBEDDING:
        return "embedding"
    if not in_layer and components & _HEAD:
        return "head"
    if components & _ROUTER or _is_moe_gate(parts):
        return "router"
    if components & _MIXER:
        return "mixer"
    if components & _ATTENTION:
        return "attention"
    if components & _MLP:
        return "mlp"
    return "other"


def _is_moe_gate(parts: list[str]) -> bool:
    return "gate" in parts and bool({"mlp", "block_sparse_moe", "feed_forward"} & set(parts))
