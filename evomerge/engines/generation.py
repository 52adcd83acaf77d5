"""Greedy generation: prompts are read in batches of tokens, and all texts grow together.

Dimensions: B texts that grow, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from evomerge.engines.attention import Slots
from evomerge.engines.decoding import GrowingText, append_all, penalise
from evomerge.engines.live import LiveModel
from evomerge.engines.packing import PromptBatch
from evomerge.engines.prefixes import Prefixes
from evomerge.errors import CandidateFailed

ROWS = {"cpu": 64, "cuda": 256}
"""The most texts that grow at once."""
SLOT_BYTES = {"cpu": 2**30, "cuda": 2**32}
"""The most memory of their keys and values."""


def rows_at_once(live: LiveModel, longest: int) -> int:
    """Return how many texts of up to `longest` tokens grow at once."""
    kind = live.device.type
    room = SLOT_BYTES.get(kind, 2**30) // max(1, longest * live.token_bytes)
    return max(1, min(ROWS.get(kind, 64), room))


class Decoder:
    """Continues prompts greedily; a text that is done makes room for the next prompts.

    Args:
        live, prefixes: the model, and what of it is kept.
        rows: the most texts at once.
        penalty: the model's repetition penalty; 1 for none.
    """

    def __init__(self, live: LiveModel, prefixes: Prefixes, *, rows: int, penalty: float = 1.0) -> None:
        self._live = live
        self._prefixes = prefixes
        self._penalty = penalty
        self._slots = Slots(rows)
        self._seen_BV: Tensor | None = None
        self._texts: list[GrowingText] = []
        self._lengths: list[int] = []
        self._tokens_B = torch.zeros(0, dtype=torch.long, device=live.device)
        self._columns_B = torch.zeros(0, dtype=torch.long, device=live.device)

    def run(
        self, batches: Sequence[PromptBatch], prompts: Sequence[Sequence[int]], texts: Sequence[GrowingText],
        tokenizer: Any,
    ) -> None:  # fmt: skip
        """Grow every text until it is done.

        Args:
            batches: of all prompts; none has more than `rows`.
            prompts: the prompts' tokens, by number.
            texts: what follows them, by number.
            tokenizer: decodes where a stop string may be.

        Raises:
            CandidateFailed: a logit is not finite.
        """
        waiting = deque(batches)
        while waiting or self._texts:
            while waiting and self._slots.count + len(waiting[0].requests) <= self._slots.rows:
                batch = waiting.popleft()
                new = [texts[number] for number in batch.requests]
                logits_BV = self.admit(batch)
                self._see(batch, prompts, logits_BV)
                chosen_B = self._choose(logits_BV, new, tokenizer, begin=len(self._texts))
                self._texts += new
                self._tokens_B = torch.cat([self._tokens_B, chosen_B])
                self._retire()
            if self._texts:
                self._tokens_B = self._choose(self.step(), self._texts, tokenizer, begin=0)
                self._retire()

    def admit(self, batch: PromptBatch) -> Tensor:
        """Read prompts into free rows; return the logits (N, V) of what follows each."""
        prefix = self._prefixes.of(batch.inputs.prefix)
        hidden, added = self._live.hidden_and_added(batch.inputs, prefix)
        self._slots.admit(prefix, added, batch.flat_M, batch.owner_M, batch.column_M)
        lengths = torch.tensor(batch.lengths, device=self._live.device)
        self._columns_B = torch.cat([self._columns_B, lengths])
        self._lengths += batch.lengths
        return self._live.head(hidden.flatten(0, 1)[batch.last_N])

    def step(self) -> Tensor:
        """Return the logits (B, V) of what follows the last token of each text."""
        hidden = self._live.next_hidden(self._slots, self._tokens_B, self._columns_B, max(self._lengths))
        self._columns_B = self._columns_B + 1
        self._lengths = [length + 1 for length in self._lengths]
        return self._live.head(hidden)

    def force(self, tokens_B: Tensor) -> None:
        """Let these be the texts' last tokens."""
        self._tokens_B = tokens_B

    def _choose(
        self, logits_BV: Tensor, texts: Sequence[GrowingText], tokenizer: Any, *, begin: int
    ) -> Tensor:
        """Append the most probable token to each of the texts whose rows begin at `begin`; return the tokens."""
        finite_B = logits_BV.sum(-1, dtype=torch.float32).isfinite()
        if self._seen_BV is not None:
            seen_BV = self._seen_BV[begin : begin + len(texts)]
            logits_BV = penalise(logits_BV.float(), seen_BV, self._penalty)
        chosen_B = logits_BV.argmax(-1)
        chosen, finite = torch.stack([chosen_B, finite_B.long()]).tolist()
        if not all(finite):
            raise CandidateFailed("a logit is not finite")
        if self._seen_BV is not None:
            seen_BV.scatter_(1, chosen_B[:, None], True)
        append_all(texts, chosen, tokenizer)
        return chosen_B

    def _retire(self) -> None:
        """Take out the texts that are done."""
        keep = [row for row, text in enumerate(self._texts) if not text.done]
        if len(keep) == len(self._texts):
            return
        # The last rows move to where rows became free; the rest stays in place.
        count = len(keep)
        self._live.listener(len(self._texts) - count)
        targets = [row for row in range(count) if self._texts[row].done]
        origins = keep[count - len(targets) :]
        self._slots.move(origins, targets)
        self._slots.count = count
        if self._seen_BV is not None and origins:
            self._seen_BV[targets] = self._seen_BV[origins]
        order = list(range(count))
        for origin, target in zip(origins, targets, strict=True):
            order[target] = origin
        picked = torch.tensor(order, dtype=torch.long, device=self._live.device)
        self._tokens_B, self._columns_B = self._tokens_B[picked], self._columns_B[picked]
        self._texts = [self._texts[row] for row in order]
        self._lengths = [self._lengths[row] for row in order]

    def _see(self, batch: PromptBatch, prompts: Sequence[Sequence[int]], logits_BV: Tensor) -> None:
        """Remember the tokens of the prompts that were admitted last, for the repetition penalty."""
        if self._penalty == 1.0:
            return
        if self._seen_BV is None:
            shape = (self._slots.rows, logits_BV.shape[1])
            self._seen_BV = torch.zeros(shape, dtype=torch.bool, device=self._live.device)
        begin = self._slots.count - len(batch.requests)
        for row, number in enumerate(batch.requests, start=begin):
            self._seen_BV[row] = False
            self._seen_BV[row, torch.tensor(list(prompts[number]), device=self._live.device)] = True


def generate_plain(
    live: LiveModel, prompts: Sequence[Sequence[int]], texts: Sequence[GrowingText], limits: Sequence[int],
    *, batch_tokens: int, ends: frozenset[int], tokenizer: Any,
) -> None:  # fmt: skip
    """Continue prompts by transformers' own ``generate``, those of one length together: no padding.

    For models whose state is not one key and value of each token. A batch ends with its longest text.

    Args:
        live: the model.
        prompts, texts, limits: tokens, what follows them, and how many tokens that may be, by number.
        batch_tokens: of the prompts of one batch.
        ends: tokens that end a text.
        tokenizer: decodes where a stop string may be.

    Raises:
        CandidateFailed: a logit is not finite.
    """
    from transformers import LogitsProcessorList, StoppingCriteriaList

    order = sorted(range(len(prompts)), key=lambda n: (-len(prompts[n]), limits[n], tuple(prompts[n])))
    while order:
        L = len(prompts[order[0]])
        same = [n for n in order if len(prompts[n]) == L][: max(1, batch_tokens // L)]
        order = [n for n in order if n not in set(same)]
        rows = [texts[n] for n in same]

        def grow(ids_BL: Tensor, scores: Any, rows: list[GrowingText] = rows, **kwargs: Any) -> Tensor:
            alive = [row for row, text in enumerate(rows) if not text.done]
            last = ids_BL[:, -1].tolist()
            append_all([rows[row] for row in alive], [last[row] for row in alive], tokenizer)
            return torch.tensor([text.done for text in rows], device=ids_BL.device)

        live.forget_length()
        ids_BL = torch.tensor([list(prompts[n]) for n in same], device=live.device)
        live.model.generate(
            input_ids=ids_BL,
            attention_mask=torch.ones_like(ids_BL),
            do_sample=False,
            max_new_tokens=max(limits[n] for n in same),
            logits_processor=LogitsProcessorList([_check_finite]),
            stopping_criteria=StoppingCriteriaList([grow]),
            eos_token_id=sorted(ends) or None,
            pad_token_id=min(ends, default=0),
        )
        live.listener(len(same))


def _check_finite(ids_BL: Tensor, logits_BV: Tensor) -> Tensor:
    if not torch.isfinite(logits_BV).all():
        raise CandidateFailed("a logit is not finite")
    return logits_BV
