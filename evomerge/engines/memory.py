"""About how much memory an engine works in, besides the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from evomerge.checkpoints.model_config import DEPTH_KEYS
from evomerge.config import Engine as EngineConfig

if TYPE_CHECKING:
    import torch

_LOGIT_COPIES = 3
"""Logits in the model's number format, in float32, and what their sum makes of them."""
_WIDE_ACTIVATIONS, _NARROW_ACTIVATIONS = 3, 8
"""Activations of a layer that live at once: of the size of the feed-forward layer, and of the hidden size."""

_BRANCHES = 10
"""Places where waiting layer paths leave one of them; of 24 candidates it has been up to 9."""


@dataclass(frozen=True)
class WorkingMemory:
    """Bytes beside the live model, about.

    Attributes:
        keys_and_values: of growing texts, of prompts on their way there and of kept prefixes; None where the engine
            takes a share of the device that it is told by its own options.
        logits: of the positions that are scored at once.
        activations: of one forward pass.
        one_text: the part of `keys_and_values` without which there is no answer: those of the longest text.
        beginnings: of what layer paths that begin alike share.
        reordered: of weights that are held once more, in another order.
    """

    keys_and_values: int | None
    logits: int
    activations: int
    one_text: int = 0
    beginnings: int = 0
    reordered: int = 0

    @property
    def total(self) -> int:
        """All together, as far as it is known."""
        held = self.beginnings + self.reordered
        return (self.keys_and_values or 0) + self.logits + self.activations + held


def working_memory(
    settings: EngineConfig,
    config: Mapping[str, Any],
    dtype: torch.dtype,
    *,
    growing_tokens: int,
    prefix_tokens: int,
    layers: int | None = None,
    shared_tokens: int = 0,
) -> WorkingMemory:
    """Return about what an engine works in.

    Args:
        settings: decided.
        config: the language model's Hugging Face config.
        dtype: of the weights.
        growing_tokens: length of the longest text with what is generated; 0 where nothing is.
        prefix_tokens: of the longest prefix that may be kept.
        layers: how many the live model has; by default as many as the config says.
        shared_tokens: what each candidate of a generation reads; 0 where candidates are no layer paths.
    """
    width = dtype.itemsize
    shape = _Shape.of(config, layers)
    hidden, wide, vocabulary = shape.hidden, shape.wide, shape.vocabulary
    tokens = int(settings.batch_tokens)
    activations = tokens * width * (_WIDE_ACTIVATIONS * wide + _NARROW_ACTIVATIONS * hidden)
    if settings.type == "vllm":
        from evomerge.engines import vllm_options

        cache = vllm_options.cache_bytes(str(settings.device), settings.options)
        return WorkingMemory(cache, tokens * vocabulary * 4 * _LOGIT_COPIES, activations)
    # Imported here: they need torch, and other engines do without.
    from evomerge.engines.generation import ROWS, SLOT_BYTES
    from evomerge.engines.hops import budget
    from evomerge.engines.live import LOGITS_AT_ONCE
    from evomerge.engines.prefixes import KEPT_BYTES
    from evomerge.engines.reordering import reordered_bytes

    device = str(settings.device)
    per_token = width * shape.states
    one_text = max(growing_tokens, prefix_tokens) * per_token
    growing = 0
    if growing_tokens:
        rows = min(SLOT_BYTES.get(device, 2**30), ROWS.get(device, 64) * growing_tokens * per_token)
        growing = max(one_text, rows) + max(tokens, prefix_tokens) * per_token
    kept = min(KEPT_BYTES, prefix_tokens * per_token)
    scored = min(tokens, max(1, LOGITS_AT_ONCE.get(device, 2**22) // max(1, vocabulary)))
    # All that is kept belongs to the beginnings of one path.
    states = min(layers or 0, _BRANCHES) * hidden * width + (per_token if growing_tokens else 0)
    beginnings = min(budget(settings), shared_tokens * states)
    logits = scored * vocabulary * 4 * _LOGIT_COPIES
    reordered = reordered_bytes(device, dtype, width * shape.linear_weights)
    return WorkingMemory(growing + kept, logits, activations, one_text, beginnings, reordered)


@dataclass(frozen=True)
class _Shape:
    """What a Hugging Face config says of a model's size.

    Attributes:
        layers, hidden, wide, vocabulary: numbers of layers, of the hidden and the feed-forward size, of tokens.
        queries, keys: sizes of all heads' queries, and of all heads' keys, together.
    """

    layers: int
    hidden: int
    wide: int
    vocabulary: int
    queries: int
    keys: int

    @classmethod
    def of(cls, config: Mapping[str, Any], layers: int | None) -> _Shape:
        """Read a config; `layers`, where given, counts instead of the config's own number."""
        hidden = int(config.get("hidden_size") or config.get("n_embd") or 0)
        heads = int(config.get("num_attention_heads") or config.get("n_head") or 1)
        size = int(config.get("head_dim") or hidden // heads)
        return cls(
            layers=layers or int(next((config[key] for key in DEPTH_KEYS if config.get(key)), 0)),
            hidden=hidden,
            wide=int(config.get("intermediate_size") or config.get("n_inner") or 4 * hidden),
            vocabulary=int(config.get("vocab_size") or 0),
            queries=heads * size,
            keys=int(config.get("num_key_value_heads") or heads) * size,
        )

    @property
    def states(self) -> int:
        """Numbers in one token's keys and values, in all layers."""
        return 2 * self.layers * self.keys

    @property
    def linear_weights(self) -> int:
        """About how many weights all linear layers have, the head among them."""
        layer = self.hidden * (2 * (self.queries + self.keys) + 3 * self.wide)
        return self.layers * layer + self.hidden * self.vocabulary
