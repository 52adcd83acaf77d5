"""What many texts begin with, computed once for as long as the weights stay the same."""

from __future__ import annotations

from collections import OrderedDict

import torch

from evomerge.engines.attention import KeyValues, join
from evomerge.engines.live import LiveModel
from evomerge.engines.packing import Inputs

CHUNK = 256
KEPT_BYTES = 2**29


class Prefixes:
    """Keys and values of prefixes.

    A prefix is computed alone, in chunks that begin at multiples of `CHUNK`, whatever was computed before:
    so its bits depend on nothing but its tokens and the weights, and prefixes that begin alike share whole
    chunks. The chunks used last are kept, up to `KEPT_BYTES`.

    Args:
        live: the model.
    """

    def __init__(self, live: LiveModel) -> None:
        self._live = live
        self._chunks: OrderedDict[tuple[int, ...], KeyValues] = OrderedDict()
        self._last: tuple[tuple[int, ...], KeyValues] | None = None
        self._bytes = 0

    def clear(self) -> None:
        """Forget everything: the weights are others now."""
        self._chunks.clear()
        self._last = None
        self._bytes = 0

    def of(self, tokens: tuple[int, ...]) -> KeyValues | None:
        """Return the keys and values of a prefix, (1, H, P, D) for each layer; None for an empty one."""
        if not tokens:
            return None
        if self._last is None or self._last[0] != tokens:
            self._last = tokens, self._whole(tokens)
        return self._last[1]

    def _whole(self, tokens: tuple[int, ...]) -> KeyValues:
        whole: KeyValues | None = None
        for begin in range(0, len(tokens), CHUNK):
            key = tokens[: begin + CHUNK]
            if key not in self._chunks:
                self._chunks[key] = self._chunk(key, begin, whole)
                self._bytes += _size(self._chunks[key])
            self._chunks.move_to_end(key)
            whole = self._chunks[key] if whole is None else join([whole, self._chunks[key]])
        while self._bytes > KEPT_BYTES and self._chunks:
            _, oldest = self._chunks.popitem(last=False)
            self._bytes -= _size(oldest)
        assert whole is not None
        return whole

    def _chunk(self, tokens: tuple[int, ...], begin: int, before: KeyValues | None) -> KeyValues:
        ids_BL = torch.tensor([tokens[begin:]], device=self._live.device)
        if before is None:
            inputs = Inputs((), ids_BL)
        else:
            positions_BL = torch.arange(begin, len(tokens), device=self._live.device)[None]
            inputs = Inputs(
                tokens[:begin], ids_BL, torch.ones_like(ids_BL), torch.zeros_like(ids_BL), positions_BL
            )
        return self._live.hidden_and_added(inputs, before)[1]


def _size(states: KeyValues) -> int:
    return sum(tensor.nbytes for pair in states for tensor in pair)
