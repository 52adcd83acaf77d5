"""The live model's forward pass, by the parts that scoring and generation need.

Dimensions: B rows, L tokens of a row, K keys (prefix and row), D hidden size, N chosen positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from evomerge.engines.attention import BehindPrefix, KeyValues, Slots, masks, own_attention
from evomerge.engines.hops import SharedHops
from evomerge.engines.packing import Inputs
from evomerge.evaluation.requests import Listener, unheard

LOGITS_AT_ONCE = {"cpu": 2**22, "cuda": 2**27}
FULL, SLIDING = "full_attention", "sliding_attention"

# What some models do to logits after the output embedding: the config's key, and the operation.
_AFTER_HEAD: Mapping[str, Callable[[Tensor, float], Tensor]] = {
    "final_logit_softcapping": lambda logits, cap: torch.tanh(logits / cap) * cap,
    "logit_scale": lambda logits, scale: logits * scale,
    "logits_scaling": lambda logits, scale: logits / scale,
}


class LiveModel:
    """A transformers causal LM and what is known of its parts.

    Args:
        model: on `device`; put into eval mode.
        device: where it is.
        max_length: longest text, in tokens; a longer window is none.
        hops: what paths share of their hops; nothing by default.

    Attributes:
        hops: as given.
        splits_head: logits may be computed at chosen positions only.
        forks: explicit masks, prefixes and rows of their own for growing texts may be used; see `trials`.
        layer_bytes: of the keys and values of one token in one layer; found by the trial.
        length_matters: positions are encoded by the length of the longest text of a batch, since texts may be
            longer than the model was trained for (dynamic and longrope RoPE): texts of one length only may share
            a batch, and nothing of one text serves another.
        windows: kind of layer → how many tokens its attention looks back, None for all; None if there
            are layers of another kind.
        listener: is told how many more requests are answered.
    """

    def __init__(
        self, model: Any, device: torch.device, max_length: int, hops: SharedHops | None = None
    ) -> None:
        self.model = model.eval()
        self.hops = hops or SharedHops()
        self.device = device
        self.max_length = max_length
        self.splits_head = False
        self.forks = False
        self.layer_bytes = 0
        self.listener: Listener = unheard
        self.config = self.model.config.get_text_config()
        self.length_matters = self._length_matters()
        self.windows = None if self.length_matters else self._windows()
        self._after = [
            (operation, float(getattr(self.config, key)))
            for key, operation in _AFTER_HEAD.items()
            if isinstance(getattr(self.config, key, None), int | float)
        ]

    @property
    def depth(self) -> int:
        """Number of layers, which may change together with the weights."""
        return int(getattr(self.config, "num_hidden_layers", None) or 1)

    @property
    def token_bytes(self) -> int:
        """Bytes of the keys and values of one token."""
        return self.layer_bytes * self.depth

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' number format."""
        dtype: torch.dtype = next(iter(self.model.parameters())).dtype
        return dtype

    def logits(self, ids_BL: Tensor) -> Tensor:
        """Return all logits (B, L, V) of texts, by the model's own forward pass."""
        self.forget_length()
        logits: Tensor = self.model(input_ids=ids_BL, use_cache=False).logits
        return logits

    def hidden(self, inputs: Inputs, prefix: KeyValues | None = None) -> Tensor:
        """Return the last hidden states (B, L, D) of a batch.

        Args:
            inputs: the tokens.
            prefix: keys and values of its prefix.
        """
        return self._hidden(inputs, None if prefix is None else BehindPrefix(prefix))

    def hidden_and_added(self, inputs: Inputs, prefix: KeyValues | None) -> tuple[Tensor, KeyValues]:
        """Return the last hidden states, and the keys and values of the rows themselves."""
        cache = BehindPrefix(prefix, keep=True)
        return self._hidden(inputs, cache), cache.added

    def next_hidden(self, slots: Slots, tokens_B: Tensor, column_B: Tensor, longest: int) -> Tensor:
        """Return the hidden states (B, D) of one more token of each text in `slots`.

        Args:
            slots: the texts' keys and values; they take the tokens'.
            tokens_B, column_B: the tokens and their positions.
            longest: the greatest position.
        """
        slots.place(column_B, longest)
        columns_K = torch.arange(longest + 1, device=self.device)
        query_BL = column_B[:, None]
        visible_BLK = columns_K <= query_BL[:, :, None]
        mask = self._masks(visible_BLK, query_BL, columns_K[None])
        return self._body(tokens_B[:, None], slots, 0, attention_mask=mask, position_ids=query_BL)[:, 0]

    def head(self, hidden_ND: Tensor) -> Tensor:
        """Return logits (N, V)."""
        logits: Tensor = self.model.get_output_embeddings()(hidden_ND)
        for operation, value in self._after:
            logits = operation(logits, value)
        return logits

    def head_in_parts(self, hidden_ND: Tensor) -> list[Tensor]:
        """Return where to cut N so that the logits of each part stay small."""
        size = self.model.get_output_embeddings().weight.shape[0]
        rows = max(1, LOGITS_AT_ONCE.get(self.device.type, 2**22) // size)
        return list(torch.split(hidden_ND, rows))

    def forget_length(self) -> None:
        """Let a model whose positions depend on the longest text so far begin anew."""
        if self.length_matters:
            self.model.base_model(
                input_ids=torch.zeros(1, 1, dtype=torch.long, device=self.device), use_cache=False
            )

    def _hidden(self, inputs: Inputs, cache: Any) -> Tensor:
        if inputs.tree_BL is None or inputs.positions_BL is None:
            self.forget_length()
            masked = {}
        else:
            mask = self._masks(inputs.visible_BLK(), inputs.positions_BL, inputs.key_positions_BK())
            masked = {"attention_mask": mask, "position_ids": inputs.positions_BL}
        with self.hops.left_out(inputs, cache) as known:
            return self._body(inputs.ids_BL, cache, known, **masked)

    def _masks(self, visible_BLK: Tensor, query_BL: Tensor, key_BK: Tensor) -> Any:
        assert self.windows is not None
        eager = self.config._attn_implementation == "eager"
        return masks(
            visible_BLK, query_BL, key_BK, windows=self.windows, additive=self.dtype if eager else None
        )

    def _body(self, ids_BL: Tensor, cache: Any, known: int, **inputs: Any) -> Tensor:
        """Run all layers but the first `known`, which `hops` has made stand aside."""
        self.hops.computed += ids_BL.numel() * (self.depth - known)
        self.hops.saved += ids_BL.numel() * known
        kept = {} if cache is None else {"past_key_values": cache}
        with own_attention(self.config) if inputs else nullcontext():
            out = self.model.base_model(input_ids=ids_BL, use_cache=cache is not None, **kept, **inputs)
        hidden: Tensor = out[0]
        return hidden

    def _windows(self) -> dict[str, int | None] | None:
        """Read the kinds of layers from the config."""
        window = getattr(self.config, "sliding_window", None)
        if (
            window is None
            or window >= self.max_length
            or not getattr(self.config, "use_sliding_window", True)
        ):
            window = None
        kinds = getattr(self.config, "layer_types", None)
        if kinds is None:
            return {FULL if window is None else SLIDING: window}
        if not set(kinds) <= {FULL, SLIDING}:
            return None
        return {kind: window if kind == SLIDING else None for kind in sorted(set(kinds))}

    def _length_matters(self) -> bool:
        """Read from the config whether positions are encoded by the length of a text."""
        given = getattr(self.config, "rope_parameters", None) or {}
        for rope in [given, *(value for value in given.values() if isinstance(value, Mapping))]:
            kind = str(rope.get("rope_type", ""))
            trained = (
                rope.get("original_max_position_embeddings")
                or getattr(self.config, "original_max_position_embeddings", None)
                or getattr(self.config, "max_position_embeddings", None)
                or 0
            )
            if ("dynamic" in kind or kind == "longrope") and self.max_length > trained:
                return True
        return False
