"""Tasks that are nothing but texts: how many bits a byte of them costs the model."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from evomerge.evaluation.entries import Entry, Reply
from evomerge.evaluation.items import Item, Split
from evomerge.evaluation.logprobs import LogprobScorer, logprob_of
from evomerge.evaluation.metrics import Kind, Metric
from evomerge.evaluation.preview import Preview
from evomerge.evaluation.requests import Engine, Rolling
from evomerge.evaluation.rows import Row, deal, texts_in
from evomerge.evaluation.splits import normalised
from evomerge.suite_config import Splits, TextSpec

log = logging.getLogger(__name__)

_KINDS: Mapping[str, Kind] = {
    "bits_per_byte": "bits_per_byte",
    "byte_perplexity": "weighted_perplexity",
    "word_perplexity": "weighted_perplexity",
}


class TextTask:
    """A suite's `text` entry; see `evomerge.evaluation.entries.Task`.

    Documents are scored as lm-eval scores `loglikelihood_rolling` tasks.

    Args:
        spec: the entry.
        splits: whose fractions cut the files, unless the entry says how.
        place: where the entry stands in the config, for messages.

    Raises:
        UserError: a file cannot be read, or a split is empty.
    """

    output_type = "loglikelihood_rolling"

    def __init__(self, spec: TextSpec, splits: Splits, *, place: str) -> None:
        self.metric = Metric(spec.metric, "none", _KINDS[spec.metric], higher_is_better=False)
        self._name = spec.name
        self._empty = 0

        def read(path: Path) -> Iterator[tuple[str, str]]:
            for text in texts_in(path, field=spec.field, unit=spec.unit):
                if text.strip():
                    yield text, normalised(text)
                else:
                    self._empty += 1

        self._rows = deal(
            spec.text,
            read,
            fractions=spec.fractions or splits.fractions,
            limit=spec.limit,
            name=spec.name,
            place=place,
        )
        if self._empty and spec.unit != "line":
            log.warning("task '%s': %d empty texts are left out", spec.name, self._empty)

    @property
    def documents(self) -> Mapping[Split, Sequence[Row]]:
        """See `Task.documents`."""
        return self._rows

    def entries(self, split: Split) -> list[Entry]:
        """See `Task.entries`."""
        scorer = TextScorer(self.metric)
        return [
            Entry(
                item=Item(_identity(self.metric, row.content), self._name, split, row.index),
                requests=(Rolling(row.content),),
                scorer=scorer,
                reference=("", row.content),
                material=_size(row.content, self.metric.name),
            )
            for row in self._rows[split]
        ]


class TextScorer(LogprobScorer):
    """Scores with a text's log-probability and its length; see `evomerge.evaluation.entries.Scorer`."""

    def preview(self, reply: Reply, engine: Engine) -> Preview:
        """See `Scorer.preview`."""
        ((raw, _),) = self.score([reply], engine)
        request = reply.entry.requests[0]
        assert isinstance(request, Rolling)
        return Preview(
            reply.entry.item.task, "", f"log-probability {logprob_of(reply):.4f}", "", request.text, raw, True
        )


def _identity(metric: Metric, text: str) -> str:
    content = json.dumps(["text", metric.name, text], ensure_ascii=False)
    return hashlib.sha256(content.encode()).hexdigest()


def _size(text: str, metric: str) -> int:
    """Return a text's length in the units of a metric, counted as lm-eval does."""
    return len(re.split(r"\s+", text)) if metric == "word_perplexity" else len(text.encode())
