"""What suites ask of a model, and what an engine is that answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Loglikelihood:
    """Wanted: log p(continuation | context), and whether greedy decoding would produce it."""

    context: str
    continuation: str


@dataclass(frozen=True)
class Rolling:
    """Wanted: log p(text), in windows of the model's length where the text is longer."""

    text: str


@dataclass(frozen=True)
class Generation:
    """Wanted: the greedy continuation of `context`, cut at the first of `stops`, `max_tokens` at most."""

    context: str
    stops: tuple[str, ...]
    max_tokens: int


@dataclass(frozen=True)
class Generated:
    """The answer to a `Generation`.

    Attributes:
        text: up to the first stop string, without special tokens.
        truncated: whether it ended for want of tokens rather than by itself.
    """

    text: str
    truncated: bool = False


Request = Loglikelihood | Rolling | Generation

Answer = tuple[float, bool] | float | Generated
"""What an engine answers to a `Loglikelihood` (log-probability, greedy), a `Rolling`, a `Generation`."""


Listener = Callable[[int], None]
"""Is told how many more requests are answered."""


def unheard(count: int) -> None:
    """Listen to nothing."""


class Engine(Protocol):
    """A model that answers requests.

    Answers come in the order of the requests. Log-probabilities are natural, in float32 or better. The
    same requests in the same order give the same bits as long as the weights do not change.

    An engine may also have a method ``listen(listener)``; it then tells the `Listener`, while it answers, how far
    it is (see `listen`).

    Attributes:
        packing: name and version of the batching with its token budget, e.g. ``hf-v2:2048``.
        fingerprint: everything besides weights and requests on which the numbers depend.
    """

    @property
    def packing(self) -> str: ...

    @property
    def fingerprint(self) -> str: ...

    def loglikelihood(self, requests: Sequence[Loglikelihood]) -> list[tuple[float, bool]]:
        """Return (log-probability, continuation is greedy) for each request; may be non-finite."""
        ...

    def loglikelihood_rolling(self, requests: Sequence[Rolling]) -> list[float]:
        """Return the log-probability of each text; may be non-finite."""
        ...

    def generate(self, requests: Sequence[Generation]) -> list[Generated]:
        """Return the generated texts.

        Raises:
            CandidateFailed: a logit is not finite.
        """
        ...


@contextmanager
def listen(engine: Engine, listener: Listener) -> Iterator[None]:
    """Hear how far an engine is while it answers, if it tells."""
    listen_to = getattr(engine, "listen", None)
    if listen_to is None:
        yield
        return
    listen_to(listener)
    try:
        yield
    finally:
        listen_to(unheard)
