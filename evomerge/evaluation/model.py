"""The model as a user's scoring function sees it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from evomerge.evaluation.guards import check_finite
from evomerge.evaluation.requests import Engine, Generation, Loglikelihood, Rolling

MAX_TOKENS = 256
_Result = TypeVar("_Result")


class Model:
    """One merged model, for as long as a scoring function runs.

    Requests of one call are answered in batches: hand over all of them at once. Everything is greedy and
    deterministic.

    Attributes:
        tokenizer: the model's, of Hugging Face transformers, e.g. for its chat template.
        failure: the error that an engine's answer ended in, even if the scoring function caught it.
    """

    def __init__(self, engine: Engine, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.failure: Exception | None = None
        self._engine: Engine | None = engine

    def generate(
        self, prompts: Sequence[str], max_tokens: int = MAX_TOKENS, stop: str | Sequence[str] = ()
    ) -> list[str]:
        """Return the greedy continuation of each prompt.

        Args:
            prompts: as the model is to read them.
            max_tokens: where a continuation is cut at the latest.
            stop: texts that end a continuation; they are not part of it.
        """
        if isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 1:
            raise ValueError(f"max_tokens is a whole number of at least 1, not {max_tokens!r}")
        stops = tuple(_texts([stop] if isinstance(stop, str) else stop, "stop"))
        asked = [Generation(prompt, stops, max_tokens) for prompt in _texts(prompts, "prompts")]
        answers = self._ask(lambda engine: engine.generate(asked)) if asked else []
        return [answer.text for answer in answers]

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """Return log p(continuation | context), in nats, of each (context, continuation)."""
        asked = []
        for pair in pairs:
            if (
                not isinstance(pair, list | tuple)
                or len(pair) != 2
                or not all(isinstance(text, str) for text in pair)
            ):
                raise TypeError(f"each of the pairs is two texts (context, continuation), not {pair!r:.80}")
            asked.append(Loglikelihood(*pair))
        if not asked:
            return []
        logprobs = [logprob for logprob, _ in self._ask(lambda engine: engine.loglikelihood(asked))]
        self._checked(logprobs)
        return logprobs

    def bits_per_byte(self, texts: Sequence[str]) -> list[float]:
        """Return −log₂ p(text) / (UTF-8 bytes of the text) of each text; 0 of an empty one."""
        asked = [Rolling(text) for text in _texts(texts, "texts")]
        if not asked:
            return []
        logprobs = self._ask(lambda engine: engine.loglikelihood_rolling(asked))
        self._checked(logprobs)
        return [
            -logprob / math.log(2) / max(1, len(request.text.encode()))
            for logprob, request in zip(logprobs, asked, strict=True)
        ]

    def close(self) -> None:
        """Let the engine go: its weights are about to change."""
        self._engine = None

    def _ask(self, question: Callable[[Engine], _Result]) -> _Result:
        if self._engine is None:
            raise RuntimeError("the model can only be asked while the scoring function runs")
        try:
            return question(self._engine)
        except Exception as error:
            self.failure = error
            raise

    def _checked(self, logprobs: Sequence[float]) -> None:
        try:
            check_finite(logprobs, "a log-probability")
        except Exception as error:
            self.failure = error
            raise


def _texts(values: Sequence[str], name: str) -> list[str]:
    if isinstance(values, str):
        raise TypeError(f"{name} is a list of texts, not a single one")
    texts = list(values)
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"{name} is a list of texts; {text!r:.80} is not one")
    return texts
