"""Metrics as lm-eval reports them: its own aggregate with its standard error, and a 95 % interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from evomerge.evaluation.library import Aggregate
from evomerge.evaluation.statistics import score
from evomerge.randomness import generator

Results = Mapping[tuple[str, str], Sequence[Any]]
"""(metric, filter) → what the task's own code gave for each item."""

RESAMPLES = 1000
SLOW_RESAMPLES = 100
_SLOW = ("bleu", "chrf", "chrf++", "ter")


@dataclass(frozen=True)
class MetricValue:
    """One metric of one task or group.

    Attributes:
        metric, filter: as lm-eval calls them.
        value: lm-eval's aggregate.
        stderr: by lm-eval's formula, where it has one; what it bootstraps is bootstrapped here too.
        ci95: Wilson's for shares of zeros and ones, otherwise the percentile bootstrap's; None if neither
            can be had.
        n: items.
        higher_is_better: None if lm-eval does not say.
    """

    metric: str
    filter: str
    value: float
    stderr: float | None
    ci95: tuple[float, float] | None
    n: int
    higher_is_better: bool | None

    @property
    def name(self) -> str:
        """``metric,filter``, as lm-eval's results have it."""
        return f"{self.metric},{self.filter}"

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers as plain data."""
        return {
            "value": self.value,
            "stderr": self.stderr,
            "ci95": None if self.ci95 is None else list(self.ci95),
            "n": self.n,
            "higher_is_better": self.higher_is_better,
        }

    def __str__(self) -> str:
        filter_ = "" if self.filter == "none" else f",{self.filter}"
        spread = "" if self.stderr is None else f" ± {shown(self.stderr)}"
        interval = "" if self.ci95 is None else "  [{}, {}]".format(*map(shown, self.ci95))
        return f"{self.metric}{filter_} {shown(self.value)}{spread}{interval}"


def shown(number: float) -> str:
    """Return a number as tables have it."""
    return f"{number:.3f}" if abs(number) < 100 else f"{number:.4g}"


def report(task: Any, name: str, results: Results, *, seed: int) -> list[MetricValue]:
    """Aggregate each metric of an lm-eval task.

    Args:
        task: the lm-eval task.
        name: decides the bootstrap's random numbers with the seed.
        results: of the task's items.
        seed: of the bootstrap.
    """
    from lm_eval.api.metrics import mean

    better = task.higher_is_better()
    values = []
    for (metric, filter_), items in results.items():
        aggregate = task.aggregation().get(metric, mean)
        value = float(aggregate(items))
        if aggregate is mean and all(isinstance(item, int | float) for item in items):
            numbers = [float(item) for item in items]
            stderr = _standard_error(numbers)
            table = {name: {str(i): number for i, number in enumerate(numbers)}}
            finite = all(map(math.isfinite, numbers))
            ci95 = score(table, {name: 1.0}, seed=seed).tasks[name].ci95 if finite else None
        else:
            draws = _draws(aggregate, items, metric, seed, name, metric, filter_)
            ci95 = None if draws is None else tuple(np.percentile(draws, [2.5, 97.5]).tolist())
            stderr = None if draws is None or not _bootstrapped(aggregate) else float(np.std(draws, ddof=1))
        values.append(MetricValue(metric, filter_, value, stderr, ci95, len(items), better.get(metric)))
    return values


def report_group(
    aggregates: Sequence[Aggregate],
    tasks: Mapping[str, Sequence[MetricValue]],
    results: Mapping[str, Results],
    *,
    seed: int,
) -> list[MetricValue]:
    """Aggregate a group's metrics over its tasks, as lm-eval does.

    Args:
        aggregates: of the group.
        tasks: name → what `report` returned.
        results: name → what it was given.
        seed: of the bootstrap.
    """
    from lm_eval.api.metrics import pooled_sample_stderr, unweighted_mean_stderr

    values = []
    for aggregate in aggregates:
        filters = aggregate.filters or sorted(
            {v.filter for found in tasks.values() for v in found if v.metric == aggregate.metric}
        )
        for filter_ in filters:
            key = (aggregate.metric, filter_)
            found = {
                name: value
                for name, of in tasks.items()
                for value in of
                if (value.metric, value.filter) == key
            }
            if not found:
                continue
            sizes = [value.n for value in found.values()]
            weights = dict(zip(found, sizes if aggregate.by_size else [1] * len(found), strict=True))
            total = math.fsum(weights[name] * value.value for name, value in found.items())
            known = [value.stderr for value in found.values() if value.stderr is not None]
            stderr = None
            if len(known) == len(found):
                pooled = aggregate.by_size and sum(sizes) > len(sizes)
                stderr = float(
                    pooled_sample_stderr(known, sizes) if pooled else unweighted_mean_stderr(known)
                )
            items = {name: results[name][key] for name in found}
            numeric = all(
                isinstance(i, int | float) and math.isfinite(i) for of in items.values() for i in of
            )
            ci95 = None
            if numeric:
                table = {name: {str(i): float(x) for i, x in enumerate(of)} for name, of in items.items()}
                ci95 = score(table, weights, seed=seed).ci95
            better = next(iter(found.values())).higher_is_better
            value = total / sum(weights.values())
            values.append(MetricValue(*key, value, stderr, ci95, sum(sizes), better))
    return values


def _standard_error(numbers: Sequence[float]) -> float | None:
    if len(numbers) < 2:
        return None
    return float(np.std(np.array(numbers, dtype=np.float64), ddof=1)) / math.sqrt(len(numbers))


def _bootstrapped(aggregate: Callable[[Sequence[Any]], float]) -> bool:
    """Whether lm-eval's standard error of an aggregate is the bootstrap's."""
    from lm_eval.api import metrics

    names = (
        "median",
        "matthews_corrcoef",
        "f1_score",
        "perplexity",
        "bleu",
        "chrf",
        "chrfpp",
        "ter",
        "nanmean",
    )
    return aggregate in [getattr(metrics, name) for name in names if hasattr(metrics, name)]


def _draws(
    aggregate: Callable[[Sequence[Any]], float], items: Sequence[Any], metric: str, seed: int, *keys: str
) -> Any:
    """Return the aggregate of resampled items; None if they cannot be had."""
    if len(items) < 2:
        return None
    count = SLOW_RESAMPLES if metric in _SLOW else RESAMPLES
    places = generator(seed, "report", *keys).integers(len(items), size=(count, len(items)))
    try:
        draws = np.array([float(aggregate([items[i] for i in row])) for row in places])
    except (ArithmeticError, TypeError, ValueError):
        return None
    return draws if np.isfinite(draws).all() else None
