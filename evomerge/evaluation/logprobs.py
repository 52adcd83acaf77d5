"""Scoring with the log-probability of one text."""

from __future__ import annotations

from collections.abc import Sequence

from evomerge.evaluation.entries import Reply
from evomerge.evaluation.guards import Answers
from evomerge.evaluation.metrics import Metric
from evomerge.evaluation.requests import Engine, Generated


class LogprobScorer:
    """Scores with the one log-probability that an entry asks and its `material`, the text's length; see `Scorer`.

    What shows an item is left to the scorers that build on it.
    """

    def __init__(self, metric: Metric) -> None:
        self._metric = metric

    def score(self, replies: Sequence[Reply], engine: Engine) -> list[tuple[float, float]]:
        """See `Scorer.score`."""
        return [
            self._metric.item((logprob_of(reply), reply.entry.material), reply.entry.item.task)
            for reply in replies
        ]

    def given(self, replies: Sequence[Reply]) -> Answers | None:
        """Return None: nothing is chosen or generated."""
        return None


def logprob_of(reply: Reply) -> float:
    """Return the log-probability that answers an entry's only request."""
    (answer,) = reply.answers
    assert not isinstance(answer, Generated)
    return answer[0] if isinstance(answer, tuple) else answer
