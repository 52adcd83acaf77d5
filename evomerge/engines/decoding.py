"""Greedy decoding: texts as they grow, and when they stop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from evomerge.engines.encoding import Encoder
from evomerge.evaluation.requests import Generated, Generation


class GrowingText:
    """One text as it grows.

    Attributes:
        tokens: generated so far.
        done: whether it ended: EOS, a stop string, or enough tokens.
    """

    def __init__(self, request: Generation, encoder: Encoder, ends: frozenset[int]) -> None:
        self.tokens: list[int] = []
        self.done = False
        self._ended = False
        self._ends = ends
        self._max_tokens = request.max_tokens
        self._cuts = [stop for stop in (*request.stops, encoder.eos) if stop]
        # A stop string may be tokenised otherwise than its encoding: two tokens more, as in lm-eval.
        self.window = 2 + max((len(encoder.encode(stop, special=False)) for stop in request.stops), default=0)

    def append(self, token: int) -> None:
        """Take the next token; a text that is done ignores it."""
        if not self.done:
            self.tokens.append(token)
            self._ended = token in self._ends
            self.done = self._ended or len(self.tokens) >= self._max_tokens

    def stops_in(self, tail: str) -> bool:
        """Whether a stop string is in the decoded end of the text."""
        return any(stop in tail for stop in self._cuts)

    def result(self, tokenizer: Any) -> Generated:
        """Return the text up to the first stop string, without special tokens."""
        whole: str = tokenizer.decode(self.tokens, skip_special_tokens=True)
        text = whole
        for stop in self._cuts:
            text = text.split(stop)[0]
        stopped = self._ended or text != whole
        return Generated(text, truncated=not stopped and len(self.tokens) >= self._max_tokens)


def mark_stopped(rows: Sequence[GrowingText], tokenizer: Any) -> None:
    """End the texts in whose last tokens a stop string appears."""
    live = [row for row in rows if not row.done]
    tails = tokenizer.batch_decode([row.tokens[-row.window :] for row in live]) if live else []
    for row, tail in zip(live, tails, strict=True):
        row.done = row.stops_in(tail)


def penalise(logits_BV: Tensor, seen_BL: Tensor, penalty: float) -> Tensor:
    """Divide positive and multiply negative logits of tokens seen before (CTRL, Keskar et al. 2019)."""
    scores = logits_BV.gather(1, seen_BL)
    scores = torch.where(scores < 0, scores * penalty, scores / penalty)
    return logits_BV.scatter(1, seen_BL, scores)
