"""Fitness and ranks of candidates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from evomerge.evaluation.items import ItemScore
from evomerge.evaluation.statistics import suite_mean

ScoreTable = dict[str, dict[str, ItemScore]]


def values_of(
    table: Mapping[str, Mapping[str, ItemScore]], *, raw: bool = False
) -> dict[str, dict[str, float]]:
    """Return task → item id → value (mapped to [0, 1], or raw)."""
    return {
        task: {item: score.raw if raw else score.value for item, score in scores.items()}
        for task, scores in table.items()
    }


def fitness_of(table: Mapping[str, Mapping[str, ItemScore]], weights: Mapping[str, float]) -> float:
    """Return the weighted mean over tasks of the per-task means of mapped scores."""
    return suite_mean(values_of(table), weights)


def less(scores: Sequence[float | None], costs: Sequence[float]) -> list[float | None]:
    """Return what candidates are ranked by: their scores, less what their recipes cost."""
    return [None if score is None else score - cost for score, cost in zip(scores, costs, strict=True)]


def rank(fitness: Sequence[float | None], screened: Sequence[float | None] | None = None) -> list[float]:
    """Return ranks, 0 for the largest fitness; equals share the mean rank, failures come last.

    Args:
        fitness: None of candidates without.
        screened: of those that did not come through the screen their score on it: they come before failures.
    """
    keys = [
        (0, -own) if own is not None else (1, -score) if score is not None else (2, 0.0)
        for own, score in zip(fitness, screened or [None] * len(fitness), strict=True)
    ]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    ranks = [0.0] * len(keys)
    start = 0
    while start < len(order):
        end = start
        while end < len(order) and keys[order[end]] == keys[order[start]]:
            end += 1
        for i in order[start:end]:
            ranks[i] = (start + end - 1) / 2
        start = end
    return ranks
