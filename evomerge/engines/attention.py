"""Keys and values that rows share or keep, and the masks that say who sees them.

Dimensions: B rows, L new tokens of a row, K keys (prefix and row), H key-value heads, D of a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, DynamicCache

KeyValues = Sequence[tuple[Tensor, Tensor]]
"""Keys and values of each layer, (B, H, K, D)."""

_NAME = "evomerge"
_ROUND = 64


class BehindPrefix(DynamicCache):  # type: ignore[misc]
    """Puts the keys and values of a prefix before those of every row; keeps nothing, unless asked.

    Args:
        prefix: of one row, (1, H, P, D) for each layer; None for no prefix.
        keep: collect what the rows add in `added`.
    """

    def __init__(self, prefix: KeyValues | None, *, keep: bool = False) -> None:
        super().__init__()
        self._prefix = prefix
        self.keep = keep
        self.added: list[tuple[Tensor, Tensor]] = []

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return prefix and new states of a layer."""
        if self.keep:
            if len(self.added) != layer_idx:
                raise ValueError("layers must add their keys in order, each once")
            self.added.append((key_states, value_states))
        if self._prefix is None:
            return key_states, value_states
        keys, values = self._prefix[layer_idx]
        B = len(key_states)
        return (
            torch.cat([keys.expand(B, -1, -1, -1), key_states], dim=2),
            torch.cat([values.expand(B, -1, -1, -1), value_states], dim=2),
        )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the tokens of the prefix."""
        return 0 if self._prefix is None else int(self._prefix[layer_idx][0].shape[2])


class Slots(DynamicCache):  # type: ignore[misc]
    """Keys and values of texts that grow, each in a row of its own: column = position.

    The rows in use are the first `count`. Columns are made as they are needed, up to the longest text.

    Args:
        rows: the most texts at once.
    """

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows
        self.count = 0
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._row_B: Tensor | None = None
        self._column_B: Tensor | None = None
        self._end = 0

    def admit(
        self, prefix: KeyValues | None, added: KeyValues, flat_M: Tensor, owner_M: Tensor, column_M: Tensor
    ) -> None:
        """Take prompts into the next free rows.

        Args:
            prefix: what they share.
            added: of the forward pass over the rest, (B, H, L, D).
            flat_M: where in (B · L) the prompts' tokens are; `owner_M`, `column_M`: whose, and at which position.
        """
        count = int(owner_M[-1]) + 1
        if self.count + count > self.rows:
            raise ValueError(f"{count} more texts do not fit beside {self.count} of {self.rows}")
        self.reserve(int(column_M.max()) + 1, added)
        rows = slice(self.count, self.count + count)
        for layer, pair in enumerate(added):
            for whole, new, old in zip(
                (self._keys[layer], self._values[layer]),
                pair,
                (None, None) if prefix is None else prefix[layer],
                strict=True,
            ):
                if old is not None:
                    whole[rows, :, : old.shape[2]] = old
                new_MHD = new.transpose(1, 2).flatten(0, 1)[flat_M]
                whole[owner_M + self.count, :, column_M] = new_MHD
        self.count += count

    def move(self, origins: Sequence[int], targets: Sequence[int]) -> None:
        """Copy rows over others."""
        if origins:
            for whole in (*self._keys, *self._values):
                whole[list(targets)] = whole[list(origins)]

    def reserve(self, columns: int, like: KeyValues | None = None) -> None:
        """Make room for texts of so many tokens."""
        have = self._keys[0].shape[2] if self._keys else 0
        if columns <= have:
            return
        width = -(-max(columns, have + have // 4) // _ROUND) * _ROUND
        for wholes, which in ((self._keys, 0), (self._values, 1)):
            for layer, sample in enumerate(wholes or [pair[which] for pair in like or ()]):
                grown = sample.new_zeros(self.rows, sample.shape[1], width, sample.shape[3])
                if have:
                    grown[: self.count, :, :have] = sample[: self.count]
                wholes[layer : layer + 1] = [grown]

    def place(self, column_B: Tensor, longest: int) -> None:
        """Say at which positions the next tokens are, before a forward pass over one token of each text.

        Args:
            column_B: their positions.
            longest: the greatest of them.
        """
        self.reserve(longest + 1)
        self._row_B = torch.arange(self.count, device=column_B.device)
        self._column_B = column_B
        self._end = longest + 1

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the new token of each text; return all columns of a layer."""
        keys, values = self._keys[layer_idx], self._values[layer_idx]
        keys[self._row_B, :, self._column_B] = key_states[:, :, 0]
        values[self._row_B, :, self._column_B] = value_states[:, :, 0]
        return keys[: self.count, :, : self._end], values[: self.count, :, : self._end]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the columns in use."""
        return self._end


def join(parts: Sequence[KeyValues]) -> KeyValues:
    """Put the keys and values of successive parts of a text behind each other."""
    if len(parts) == 1:
        return parts[0]
    return [
        (torch.cat([k for k, _ in layer], dim=2), torch.cat([v for _, v in layer], dim=2))
        for layer in zip(*parts, strict=True)
    ]


def masks(
    visible_BLK: Tensor,
    query_BL: Tensor,
    key_BK: Tensor,
    *,
    windows: Mapping[str, int | None],
    additive: torch.dtype | None,
) -> Tensor | dict[str, Tensor]:
    """Return the attention mask that transformers takes: one, or one for each kind of layer.

    Args:
        visible_BLK: what each token may see, whatever the distance.
        query_BL, key_BK: positions.
        windows: kind of layer → how many tokens it looks back, itself included; None for all.
        additive: the dtype of masks that are added to attention scores; None for boolean ones.
    """
    made: dict[int | None, Tensor] = {}
    for window in windows.values():
        if window not in made:
            seen = visible_BLK
            if window is not None:
                seen = seen & (query_BL[:, :, None] - key_BK[:, None, :] < window)
            mask = seen[:, None]
            if additive is not None:
                lowest = torch.finfo(additive).min
                mask = torch.zeros_like(mask, dtype=additive).masked_fill(~mask, lowest)
            made[window] = mask
    if len(windows) == 1:
        return next(iter(made.values()))
    return {kind: made[window] for kind, window in windows.items()}


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """torch's attention without a copy of keys and values for every query head, which costs more than itself.

    For one token of each row, the query heads that share keys become the rows of one small matrix.
    """
    B, Q, L, D = query.shape
    H = key.shape[1]
    if L == 1:
        out = scaled_dot_product_attention(
            query.reshape(B, H, Q // H, D), key, value, attn_mask=attention_mask, scale=scaling
        )
        return out.reshape(B, 1, Q, -1), None
    # With a mask, CUDA's fast kernels do not know grouped heads.
    if H != Q and query.device.type != "cpu":
        key, value = key.repeat_interleave(Q // H, dim=1), value.repeat_interleave(Q // H, dim=1)
    out = scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=key.shape[1] != Q
    )
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(_NAME, _attend)


@contextmanager
def own_attention(config: Any) -> Iterator[None]:
    """Let a model that uses torch's attention use `_attend`, with masks that are given to it."""
    own = config._attn_implementation
    if own != "sdpa":
        yield
        return
    config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = own
