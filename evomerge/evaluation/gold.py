"""Smooth objectives on any task with reference answers: how probable the right answer is, given its prompt.

One log-probability an item: nothing is generated and no wrong choice is asked. Accuracy on a few dozen items moves in
steps and does not notice small changes of the weights; this does.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace

from evomerge.errors import UserError
from evomerge.evaluation.entries import Entry, Reply
from evomerge.evaluation.logprobs import LogprobScorer, logprob_of
from evomerge.evaluation.metrics import Metric
from evomerge.evaluation.preview import Preview
from evomerge.evaluation.requests import Engine, Loglikelihood


def gold_entries(entries: Sequence[Entry], metric: Metric, place: str) -> list[Entry]:
    """Return the same documents with the log-probability of their reference answers as the only request.

    Args:
        entries: of one task and split.
        metric: a metric `of_gold`.
        place: where the metric was written, for messages.

    Raises:
        UserError: an item has no text as its reference.
    """
    scorer = GoldScorer(metric)
    return [_gold_entry(entry, scorer, metric, place) for entry in entries]


def _gold_entry(entry: Entry, scorer: GoldScorer, metric: Metric, place: str) -> Entry:
    if entry.reference is None or not entry.reference[1]:
        raise UserError(
            f"{place}document {entry.item.index} of task '{entry.item.task}' has no reference answer to compute "
            f"{metric.name} of; choose another metric"
        )
    identity = json.dumps(
        [metric.name, metric.higher_is_better, entry.item.id, *entry.reference], ensure_ascii=False
    )
    return Entry(
        item=replace(entry.item, id=hashlib.sha256(identity.encode()).hexdigest()),
        requests=(Loglikelihood(*entry.reference),),
        scorer=scorer,
        reference=entry.reference,
        material=len(entry.reference[1].encode()),
    )


class GoldScorer(LogprobScorer):
    """Scores with the log-probability of the answer and its length in UTF-8 bytes; see `Scorer`."""

    def preview(self, reply: Reply, engine: Engine) -> Preview:
        """See `Scorer.preview`."""
        ((raw, _),) = self.score([reply], engine)
        request = reply.entry.requests[0]
        assert isinstance(request, Loglikelihood)
        shown = f"log-probability of the reference {logprob_of(reply):.4f}"
        return Preview(reply.entry.item.task, request.context, shown, "", request.continuation, raw, True)
