"""Which of a task's metrics can be fitness, and how its items map to [0, 1]."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from evomerge.errors import CandidateFailed, UserError, at, nearest

Kind = Literal["share", "brier", "perplexity", "weighted_perplexity", "bits_per_byte",
               "gold_nll", "gold_bits_per_byte"]  # fmt: skip
_KIND_OF_AGGREGATION: dict[str, Kind] = {
    "mean": "share",
    "brier_score": "brier",
    "perplexity": "perplexity",
    "weighted_perplexity": "weighted_perplexity",
    "bits_per_byte": "bits_per_byte",
}
_LARGEST_EXPONENT = 700.0


@dataclass(frozen=True)
class Metric:
    """One metric of one task, behind one of the task's filters.

    Attributes:
        name, filter: as the task calls them.
        kind: how lm-eval's per-item result is read:
            share – a number in [0, 1]; brier – (gold index, probabilities);
            perplexity – a log-likelihood ℓ; weighted_perplexity, bits_per_byte and the gold ones – (ℓ, words or
            bytes).
        higher_is_better: of the raw value.
    """

    name: str
    filter: str
    kind: Kind
    higher_is_better: bool

    @property
    def of_gold(self) -> bool:
        """Whether it is the probability of the reference answer, which evomerge computes itself."""
        return self.kind in GOLD

    def item(self, result: Any, task: str) -> tuple[float, float]:
        """Map an item's result to (raw, value).

        raw is in the metric's units; value lies in [0, 1], larger is better: the raw share; 1 − raw / 2
        (brier); 1 / raw (perplexities); 2^−raw (bits per byte); exp(−raw / bytes) (gold_nll); or 1 minus that,
        where the other direction is the better one.

        Raises:
            CandidateFailed: the result is not finite.
            UserError: the result is not of the metric's kind, e.g. a percentage.
        """
        try:
            raw, value = self._map(result)
        except (TypeError, ValueError, IndexError):
            raise UserError(
                f"task '{task}': metric '{self.name}' gave {result!r} for an item; "
                f"fitness needs a number between 0 and 1: choose another metric"
            ) from None
        if not (math.isfinite(raw) and math.isfinite(value)):
            raise CandidateFailed(f"task '{task}': metric '{self.name}' is not finite")
        if not -1e-9 <= value <= 1 + 1e-9:
            raise UserError(
                f"task '{task}': metric '{self.name}' gave {raw:g} for an item; "
                f"fitness needs a number between 0 and 1: choose another metric"
            )
        return raw, min(max(value, 0.0), 1.0)

    def _map(self, result: Any) -> tuple[float, float]:
        raw, value = self._natural(result)
        return raw, value if self.higher_is_better == (self.kind == "share") else 1 - value

    def _natural(self, result: Any) -> tuple[float, float]:
        if self.kind == "share":
            raw = float(result)
            return raw, raw
        if self.kind == "brier":
            gold, probabilities = result
            raw = math.fsum((float(p) - (i == gold)) ** 2 for i, p in enumerate(probabilities))
            return raw, 1 - raw / 2
        loglikelihood, weight = (result, 1) if self.kind == "perplexity" else result
        rate = -float(loglikelihood) / float(weight) if weight else 0.0
        if self.kind in ("bits_per_byte", "gold_bits_per_byte"):
            return rate / math.log(2), math.exp(-rate)
        if self.kind == "gold_nll":
            return -float(loglikelihood), math.exp(-rate)
        return math.exp(min(rate, _LARGEST_EXPONENT)), math.exp(-rate)


GOLD: Mapping[str, Kind] = {"gold_nll": "gold_nll", "gold_bits_per_byte": "gold_bits_per_byte"}
"""Metrics of every task with reference answers: −log p(answer | prompt) in nats, and in bits per UTF-8 byte.

Both map to the same value, the geometric mean over the answer's bytes of their probability: the probability of a
whole answer of a hundred tokens is 0 for every model, and a mean over tokens would change with the tokenizer.
"""


def choose_metric(
    task: Any,
    wanted: str,
    name: str,
    file: Path | str | None,
    key: str,
    *,
    direction: Literal["maximize", "minimize"] | None = None,
) -> Metric:
    """Find the fitness metric of an lm-eval task.

    Args:
        task: the lm-eval task.
        wanted: ``auto`` (the task's first metric), a metric, ``metric,filter``, or one of `GOLD`.
        name: the task's name in messages; `file` and `key` say where `wanted` was written.
        direction: which way is better, whatever lm-eval says.

    Raises:
        UserError: unknown, ambiguous, without direction, or not a mean over items; names the usable ones.
    """
    known = list(task.aggregation())
    filters = [entry["name"] for entry in task.config.filter_list] if task.config.filter_list else ["none"]
    kinds = _kinds(task)
    usable = [metric for metric in known if metric in kinds]
    place = at(file, key)
    whole = task.OUTPUT_TYPE == "loglikelihood_rolling"
    gold = [] if whole else [metric for metric in GOLD if metric not in known]
    choices = ", ".join(
        [f"'{m},{f}'" if len(filters) > 1 else f"'{m}'" for m in usable for f in filters]
        + [f"'{metric}'" for metric in gold]
    )

    metric, _, chosen = (part.strip() for part in wanted.partition(","))
    if metric in gold and not chosen:
        return Metric(metric, "none", GOLD[metric], direction == "maximize")
    if metric in GOLD and whole and metric not in known:
        raise UserError(
            f"{place}task '{name}' scores whole texts, which have no prompt and answer; use bits_per_byte"
        )
    if metric in gold:
        raise UserError(f"{place}metric '{metric}' filters nothing; write '{metric}' alone")
    if metric == "auto" and not known:
        raise UserError(f"{place}task '{name}' has no metric of its own; usable: {choices or 'none'}")
    if metric == "auto":
        metric = known[0]
    if metric not in known:
        raise UserError(
            f"{place}task '{name}' has no metric '{metric}'{nearest(metric, [*known, *gold])}; usable: {choices}"
        )
    if metric not in kinds:
        raise UserError(
            f"{place}metric '{metric}' of task '{name}' is not a mean over items, so it cannot be fitness; "
            + (f"usable: {choices}" if choices else "the task has no other metric: leave the task out")
        )
    if chosen and chosen not in filters:
        raise UserError(
            f"{place}task '{name}' has no filter '{chosen}'{nearest(chosen, filters)}; usable: {choices}"
        )
    if not chosen and len(filters) > 1:
        raise UserError(f"{place}task '{name}' has several filters; write one of {choices}")
    kind = kinds[metric]
    if direction is not None:
        higher = direction == "maximize"
    elif kind != "share":
        higher = False
    else:
        higher = task.higher_is_better().get(metric)
        if higher is None:
            raise UserError(
                f"{place}task '{name}' does not say whether a larger '{metric}' is better; "
                "write direction: maximize or direction: minimize beside it"
            )
    return Metric(metric, chosen or filters[0], kind, higher)


def _kinds(task: Any) -> Mapping[str, Kind]:
    """Return the metrics that are means over items."""
    from lm_eval.api.registry import get_aggregation

    kind_of = {get_aggregation(name): kind for name, kind in _KIND_OF_AGGREGATION.items()}
    own = task.config.process_results is None
    kinds: dict[str, Kind] = {}
    for metric, aggregation in task.aggregation().items():
        # lm-eval registers these two with a mean, but what it returns per item is no number.
        if own and metric in ("likelihood", "bypass"):
            continue
        kind = kind_of.get(aggregation) if callable(aggregation) else None
        if kind is not None:
            kinds[metric] = kind
    return kinds
