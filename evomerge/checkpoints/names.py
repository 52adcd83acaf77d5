"""Tensor identity: what a tensor's on-disk name says about its layer and its role.

By rule from the components of the name, so that architectures need no table each.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

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

# Tensors that some checkpoints carry and that are recomputed from the config at load.
_BUFFERS = re.compile(
    r"(^|\.)(rotary_emb\.(inv_freq|cos_cached|sin_cached)|(attn|attention)\.(bias|masked_bias)|position_ids)$"
)


@dataclass(frozen=True)
class TensorName:
    """One canonical on-disk tensor name, taken apart.

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
    """Take a tensor name apart."""
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
