"""What scores on a finite number of items can tell: intervals, paired comparisons, shrinkage, choice.

A table holds one model's values, task → item → value. The suite's score is the weighted mean over tasks of
each task's mean over items. Items are the sampling unit: every interval speaks about new items of the same
tasks. Comparisons are paired, item by item. Bootstraps resample items within each task.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from evomerge.randomness import generator

Table = Mapping[str, Mapping[str, float]]
"""Task → item id → value."""

Interval = tuple[float, float]
Array = NDArray[np.float64]

RESAMPLES = 10_000
LEVEL = 0.95
FEWEST_DIFFERENCES = 6
"""With fewer items on which two models differ, no sign-flip test reaches p < 0.05: 2 · 2^-5 > 0.05 > 2 · 2^-6."""

_DRAWS_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class TaskScore:
    """One task's mean with its 95 % interval over n items."""

    mean: float
    ci95: Interval
    n: int


@dataclass(frozen=True)
class Score:
    """The suite's weighted mean with its 95 % interval over n items, and each task's."""

    mean: float
    ci95: Interval
    n: int
    tasks: dict[str, TaskScore]


@dataclass(frozen=True)
class Comparison:
    """A model against a baseline on the same items.

    Attributes:
        delta: suite mean of the model minus that of the baseline.
        ci95: interval of this difference on its own.
        ci95_simultaneous: interval that holds for all baselines of `compare_all` together, or None.
        n: items.
        resolved: whether the difference is told from 0: the widest of the intervals excludes 0, and the models
            differ on at least `FEWEST_DIFFERENCES` items.
        p_disagree: weighted share of the items on which the values differ.
        p_mcnemar: exact two-sided McNemar p over all items; None unless all values are 0 or 1.
        needed_items: unless resolved, about how many items in all would resolve a true difference of this size
            with 80 % power, at the seen spread; None if there is no difference.
    """

    delta: float
    ci95: Interval
    n: int
    resolved: bool
    p_disagree: float
    p_mcnemar: float | None
    needed_items: int | None
    ci95_simultaneous: Interval | None = None


def suite_mean(table: Table, weights: Mapping[str, float]) -> float:
    """Return the weighted mean over tasks of the means over items.

    Raises:
        ValueError: a task without weight or without items, or a weight without task.
    """
    shares = _shares(table, weights)
    return math.fsum(shares[task] * math.fsum(items.values()) / len(items) for task, items in table.items())


def score(table: Table, weights: Mapping[str, float], *, seed: int) -> Score:
    """Return the suite's and each task's mean with 95 % intervals.

    A task of zeros and ones gets Wilson's interval, any other the percentile bootstrap's. The suite's is the
    bootstrap's of the weighted sum. A task whose values are all alike leaves nothing to resample: its own
    interval is added in quadrature (Zou & Donner 2008). The suite of one task is that task.

    Raises:
        ValueError: as `suite_mean`.
    """
    shares = _shares(table, weights)
    tasks: dict[str, TaskScore] = {}
    total = np.zeros(RESAMPLES)
    constant = []
    for task, values in _arrays(table).items():
        draws = _resampled_means(values[:, None], seed, "score", task)[:, 0]
        total += shares[task] * draws
        binary = _is_binary(values)
        interval = wilson(int(values.sum()), len(values)) if binary else _percentiles(draws)
        tasks[task] = TaskScore(math.fsum(values) / len(values), interval, len(values))
        if np.ptp(values) == 0:
            constant.append(task)
    mean, n = suite_mean(table, weights), sum(part.n for part in tasks.values())
    if len(tasks) == 1:
        return Score(mean, next(iter(tasks.values())).ci95, n, tasks)
    low, high = _percentiles(total)
    below = [mean - low, *(shares[t] * (tasks[t].mean - tasks[t].ci95[0]) for t in constant)]
    above = [high - mean, *(shares[t] * (tasks[t].ci95[1] - tasks[t].mean) for t in constant)]
    return Score(mean, (mean - math.hypot(*below), mean + math.hypot(*above)), n, tasks)


def compare(a: Table, b: Table, weights: Mapping[str, float], *, seed: int) -> Comparison:
    """Compare model `a` with one baseline `b`, paired by item.

    Raises:
        ValueError: the tables hold different items, or as `suite_mean`.
    """
    return _conclude(_paired(a, {"": b}, weights, seed)[""], None)


def compare_all(
    winner: Table, baselines: Mapping[str, Table], weights: Mapping[str, float], *, seed: int
) -> dict[str, Comparison]:
    """Compare a model with several baselines, with intervals that hold for all of them together.

    The simultaneous intervals are those of the max-T bootstrap: Δ_b ± c · se_b, where c is the 95 % quantile
    of max_b |Δ*_b - Δ_b| / se_b over resamples of the same items for all baselines. They are never narrower
    than `ci95`, and they decide what is resolved.

    Raises:
        ValueError: as `compare`.
    """
    pairs = _paired(winner, baselines, weights, seed)
    largest = np.zeros(RESAMPLES)
    for pair in pairs.values():
        if pair.spread > 0:
            np.maximum(largest, np.abs(pair.draws - pair.delta) / pair.spread, out=largest)
    critical = float(np.quantile(largest, LEVEL))
    return {name: _conclude(pair, critical) for name, pair in pairs.items()}


def minimum_detectable_effect(
    counts: int | Mapping[str, int],
    weights: Mapping[str, float] | None = None,
    *,
    p_disagree: float = 0.2,
    alpha: float = 0.05,
    power: float = 0.8,
) -> float:
    """Return the smallest difference of suite means that a paired test finds with the given power.

    For one task of n items of 0 or 1 it solves n = (z_{1-α/2} + z_{power})² (p - Δ²) / Δ² for Δ, where p is
    the probability that two models disagree on an item; for several tasks 1/n becomes Σ w_t² / n_t. Models
    that differ by Δ disagree on a share Δ at least, so p counts as Δ where it would be smaller.

    Args:
        counts: items, or items of each task.
        weights: of the tasks; not for a plain count.
    """
    if isinstance(counts, int):
        counts, weights = {"": counts}, {"": 1.0}
    if min(counts.values(), default=0) < 1:
        raise ValueError("every task needs at least one item")
    shares = _shares({task: {"": 0.0} for task in counts}, weights or {})
    z = NormalDist().inv_cdf(1 - alpha / 2) + NormalDist().inv_cdf(power)
    k = z * z * math.fsum(share**2 / counts[task] for task, share in shares.items())
    effect = math.sqrt(k * p_disagree / (1 + k))
    return effect if effect <= p_disagree else k / (1 + k)


def one_standard_error_choice(tables: Mapping[str, Table], weights: Mapping[str, float]) -> str:
    """Return the simplest model that is less than one standard error behind the best.

    The standard error is that of the paired difference to the best (Breiman et al. 1984, the 1-SE rule).

    Args:
        tables: name → values on the same items, the simplest first.
        weights: of the tasks.

    Raises:
        ValueError: no tables, or as `compare`.
    """
    if not tables:
        raise ValueError("there is no model to choose from")
    means = {name: suite_mean(table, weights) for name, table in tables.items()}
    best = max(means, key=lambda name: means[name])
    for name, table in tables.items():
        gap = means[best] - means[name]
        if gap == 0 or gap < _standard_error(tables[best], table, weights):
            return name
    return best


def wilson(successes: int, n: int, level: float = LEVEL) -> Interval:
    """Return Wilson's (1927) score interval of a proportion."""
    z = NormalDist().inv_cdf((1 + level) / 2)
    p, scale = successes / n, 1 + z * z / n
    centre = (p + z * z / (2 * n)) / scale
    margin = z / scale * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (0.0 if successes == 0 else centre - margin, 1.0 if successes == n else centre + margin)


def mcnemar(wins: int, losses: int) -> float:
    """Return the exact two-sided p of McNemar's test: a fair coin over the items where two models disagree."""
    n = wins + losses
    tail = sum(math.comb(n, k) for k in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / (1 << n))


@dataclass(frozen=True)
class _Pair:
    """Differences per task, their weighted mean, its resamples and their standard deviation."""

    differences: dict[str, Array]
    shares: dict[str, float]
    delta: float
    draws: Array
    spread: float
    p_mcnemar: float | None


def _paired(
    a: Table, baselines: Mapping[str, Table], weights: Mapping[str, float], seed: int
) -> dict[str, _Pair]:
    """Pair a model with each baseline, on the same resamples of the items."""
    shares = _shares(a, weights)
    differences = {name: _differences(a, b) for name, b in baselines.items()}
    draws = np.zeros((RESAMPLES, len(baselines)))
    for task in a if baselines else ():
        stacked = np.stack([by_task[task] for by_task in differences.values()], axis=1)
        draws += shares[task] * _resampled_means(stacked, seed, "compare", task)
    pairs = {}
    for column, (name, by_task) in enumerate(differences.items()):
        own = draws[:, column]
        delta = math.fsum(shares[t] * math.fsum(d) / len(d) for t, d in by_task.items())
        both = [*_arrays(a).values(), *_arrays(baselines[name]).values()]
        d = np.concatenate(list(by_task.values()))
        p = mcnemar(int(np.sum(d > 0)), int(np.sum(d < 0))) if all(map(_is_binary, both)) else None
        pairs[name] = _Pair(by_task, shares, delta, own, float(own.std()), p)
    return pairs


def _conclude(pair: _Pair, critical: float | None) -> Comparison:
    low, high = ci95 = _percentiles(pair.draws)
    simultaneous = None
    if critical is not None:
        margin = critical * pair.spread
        simultaneous = low, high = min(low, pair.delta - margin), max(high, pair.delta + margin)
    n = sum(map(len, pair.differences.values()))
    differing = sum(int(np.sum(d != 0)) for d in pair.differences.values())
    resolved = (low > 0 or high < 0) and differing >= FEWEST_DIFFERENCES
    return Comparison(
        delta=pair.delta,
        ci95=ci95,
        n=n,
        resolved=resolved,
        p_disagree=math.fsum(
            share * float(np.mean(pair.differences[task] != 0)) for task, share in pair.shares.items()
        ),
        p_mcnemar=pair.p_mcnemar,
        needed_items=None if resolved else _needed_items(pair, n, differing),
        ci95_simultaneous=simultaneous,
    )


def _needed_items(pair: _Pair, n: int, differing: int) -> int | None:
    """Items that resolve a true difference of the seen size and spread with 80 % power, if it is not 0."""
    if abs(pair.delta) < 1e-12:
        return None
    z = NormalDist().inv_cdf((1 + LEVEL) / 2) + NormalDist().inv_cdf(0.8)
    variance = math.fsum(
        share**2 * float(np.var(pair.differences[task])) / len(pair.differences[task])
        for task, share in pair.shares.items()
    )
    return max(
        math.ceil(n * z * z * variance / pair.delta**2), math.ceil(n * FEWEST_DIFFERENCES / differing), n + 1
    )


def _standard_error(a: Table, b: Table, weights: Mapping[str, float]) -> float:
    """Standard error of the difference of two suite means, paired by item."""
    shares = _shares(a, weights)
    variances = {task: float(np.var(d)) / max(len(d) - 1, 1) for task, d in _differences(a, b).items()}
    return math.sqrt(math.fsum(shares[task] ** 2 * v for task, v in variances.items()))


def _differences(a: Table, b: Table) -> dict[str, Array]:
    for task in {*a, *b}:
        odd = sorted(set(a.get(task, {})) ^ set(b.get(task, {})))
        if odd:
            raise ValueError(
                f"{task}: a comparison needs the same items on both sides; {odd[0]} is on one only"
            )
    left, right = _arrays(a), _arrays(b)
    return {task: left[task] - right[task] for task in a}


def _shares(table: Table, weights: Mapping[str, float]) -> dict[str, float]:
    """Weights of the table's tasks, scaled to add up to 1."""
    for task in {*table, *weights}:
        if task not in weights or not table.get(task):
            raise ValueError(f"{task}: has no {'items' if task in weights else 'weight'}")
    total = math.fsum(weights.values())
    if not total > 0:
        raise ValueError("the weights of the tasks do not add up to a positive number")
    return {task: weights[task] / total for task in table}


def _arrays(table: Table) -> dict[str, Array]:
    """Values of each task in the order of the item ids, whatever order the table is in."""
    return {
        task: np.array([items[i] for i in sorted(items)], dtype=np.float64) for task, items in table.items()
    }


def _is_binary(values: Array) -> bool:
    return bool(np.all((values == 0) | (values == 1)))


def _resampled_means(values: Array, seed: int, purpose: str, task: str) -> Array:
    """Means of the columns of an (n, k) array over n rows drawn with replacement: (RESAMPLES, k)."""
    n = len(values)
    rng = generator(seed, "bootstrap", purpose, task)
    means = np.empty((RESAMPLES, values.shape[1]))
    step = max(1, _DRAWS_AT_ONCE // n)
    for start in range(0, RESAMPLES, step):
        rows = rng.integers(n, size=(min(step, RESAMPLES - start), n))
        for column in range(values.shape[1]):
            means[start : start + step, column] = values[:, column][rows].mean(axis=1)
    return means


def _percentiles(draws: Array) -> Interval:
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
