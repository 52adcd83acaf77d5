"""From requests to token ids within a model's length, the same for every engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from evomerge.engines.encoding import Encoder
from evomerge.errors import UserError
from evomerge.evaluation.requests import Generation, Loglikelihood, Rolling

Pair = tuple[list[int], list[int]]
"""The tokens of a context (at least one) and of what is scored behind it."""

_UNSUPPORTED = (
    "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "suppress_tokens",
    "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id", "min_length", "min_new_tokens",
    "sequence_bias", "exponential_decay_length_penalty", "guidance_scale",
)  # fmt: skip


def scored_pairs(encoder: Encoder, requests: Sequence[Loglikelihood], max_length: int) -> list[Pair]:
    """Encode contexts and continuations.

    Raises:
        UserError: a continuation is empty or longer than the model.
    """
    pairs = [encoder.pair(request.context, request.continuation) for request in requests]
    for request, (_, continuation) in zip(requests, pairs, strict=True):
        if not 0 < len(continuation) <= max_length:
            raise UserError(
                f"the answer {request.continuation!r:.60} has {len(continuation)} tokens, "
                f"it needs 1 to {max_length} (the model's length) to be scored"
            )
    return pairs


def rolling_pairs(
    encoder: Encoder, requests: Sequence[Rolling], max_length: int
) -> tuple[list[Pair], list[int]]:
    """Cut texts into disjoint windows of the model's length; return these and the request of each."""
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    pairs: list[Pair] = []
    owners: list[int] = []
    for number, request in enumerate(requests):
        tokens = encoder.encode(request.text)
        for window in get_rolling_token_windows(tokens, encoder.prefix, max_length, 1):
            pairs.append(make_disjoint_window(window))
            owners.append(number)
    return pairs, owners


def prompts(encoder: Encoder, requests: Sequence[Generation], max_length: int) -> list[list[int]]:
    """Encode prompts, cut from the left so that the tokens to be generated have room.

    Raises:
        UserError: they leave no room for a prompt.
    """
    encoded = []
    for request in requests:
        room = max_length - request.max_tokens
        if room < 1:
            raise UserError(
                f"max_gen_toks {request.max_tokens} leaves no room for a prompt: "
                f"the model's length is {max_length} tokens"
            )
        encoded.append(encoder.prompt(request.context)[-room:])
    return encoded


def repetition_penalty(generation_config: Any, engine: str) -> float:
    """Return a model's repetition penalty; refuse generation settings that would be ignored.

    Raises:
        UserError: names the setting.
    """
    for name in _UNSUPPORTED:
        if getattr(generation_config, name, None) not in (
            None,
            0,
            [],
            1 if name == "guidance_scale" else None,
        ):
            raise UserError(
                f"generation_config.json: {name}: not supported by the {engine} engine; remove it from the base model"
            )
    if (getattr(generation_config, "num_beams", None) or 1) != 1:
        raise UserError(f"generation_config.json: num_beams: the {engine} engine decodes greedily; remove it")
    return float(getattr(generation_config, "repetition_penalty", None) or 1.0)


def ends(generation_config: Any, tokenizer: Any) -> frozenset[int]:
    """Return the tokens that end a text: the tokenizer's EOS and those of the generation config."""
    own = getattr(generation_config, "eos_token_id", None)
    ids = {tokenizer.eos_token_id, *(own if isinstance(own, list | tuple) else [own])}
    return frozenset(token for token in ids if token is not None)
