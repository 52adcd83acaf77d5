"""Greedy decoding: texts as they grow, and when they stop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from evomerge.engines.encoding import Encoder
from evomerge.evaluation.requests import Generated, Generation

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class Stops:
    """The stop strings of some requests, and which tokens can complete one.

    Args:
        stops: strings that end a text.
        encoder: of the model's texts; the text of EOS ends a text too.

    Attributes:
        cuts: all strings that end a text.
        window: how many tokens at the end of a text are searched for them.
    """

    def __init__(self, stops: Sequence[str], encoder: Encoder) -> None:
        self.cuts = tuple(stop for stop in (*stops, encoder.eos) if stop)
        # A stop string may be tokenised otherwise than its encoding: two tokens more, as in lm-eval.
        self.window = 2 + max((len(encoder.encode(stop, special=False)) for stop in stops), default=0)
        self._last = {stop[-1] for stop in self.cuts}
        # Decoders may drop a space at the beginning of a text, so a token alone may not show it.
        self._always = any(character.isspace() and character != "\n" for character in self._last)
        self._tokenizer = encoder.tokenizer
        self._may_complete: dict[int, bool] = {}

    def may_complete(self, token: int) -> bool:
        """Whether a stop string can end in this token: its text has the last character of one, or a part."""
        known = self._may_complete.get(token)
        if known is None:
            text = self._tokenizer.decode([token])
            known = self._always or not text or _INCOMPLETE in text or not self._last.isdisjoint(text)
            self._may_complete[token] = known
        return known


class GrowingText:
    """One text as it grows.

    Args:
        request: what is wanted.
        stops: the request's stop strings.
        ends: tokens that end a text.

    Attributes:
        tokens: generated so far.
        done: whether it ended: EOS, a stop string, or enough tokens.
    """

    def __init__(self, request: Generation, stops: Stops, ends: frozenset[int]) -> None:
        self.tokens: list[int] = []
        self.done = False
        self._ended = False
        self._ends = ends
        self._max_tokens = request.max_tokens
        self._stops = stops

    def append(self, token: int) -> bool:
        """Take the next token; return whether a stop string may be complete now, so that one must look."""
        self.tokens.append(token)
        self._ended = token in self._ends
        self.done = self._ended or len(self.tokens) >= self._max_tokens
        return not self.done and self._stops.may_complete(token)

    @property
    def tail(self) -> list[int]:
        """The tokens at the end among which a stop string is looked for."""
        return self.tokens[-self._stops.window :]

    def look(self, tail: str) -> None:
        """End if a stop string is in the decoded `tail`."""
        self.done = any(stop in tail for stop in self._stops.cuts)

    def result(self, tokenizer: Any) -> Generated:
        """Return the text up to the first stop string, without special tokens."""
        whole: str = tokenizer.decode(self.tokens, skip_special_tokens=True)
        text = whole
        for stop in self._stops.cuts:
            text = text.split(stop)[0]
        stopped = self._ended or text != whole
        return Generated(text, truncated=not stopped and len(self.tokens) >= self._max_tokens)


def append_all(texts: Sequence[GrowingText], tokens: Sequence[int], tokenizer: Any) -> None:
    """Give each text its next token, and end those in whose last tokens a stop string appears."""
    suspects = [text for text, token in zip(texts, tokens, strict=True) if text.append(token)]
    if suspects:
        for text, tail in zip(
            suspects, tokenizer.batch_decode([text.tail for text in suspects]), strict=True
        ):
            text.look(tail)


def penalise(logits_BV: Tensor, seen_BV: Tensor, penalty: float) -> Tensor:
    """Divide positive and multiply negative logits of tokens seen before (CTRL, Keskar et al. 2019)."""
    return torch.where(
        seen_BV, torch.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty), logits_BV
    )
