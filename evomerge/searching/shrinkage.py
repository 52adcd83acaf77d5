"""Scores of candidates that answered different items, made comparable: who is best is partly luck."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Values = Mapping[str, Mapping[str, float]]
"""Task → item id → value."""

_TINY = 1e-12


@dataclass(frozen=True)
class _Draw:
    """What the recipes of one generation earned on its items.

    Attributes:
        recipes: their names.
        items: of each task, in a fixed order.
        values: of each task, (recipes, items).
        scores: weighted means, one a recipe.
    """

    recipes: tuple[str, ...]
    items: dict[str, tuple[str, ...]]
    values: dict[str, Array]
    scores: Array


def shrunk(generations: Sequence[Mapping[str, Values]], weights: Mapping[str, float]) -> dict[str, float]:
    """Return each recipe's score, freed of the luck of its items and shrunk towards its generation's.

    The model is f = γ_g + η_r + d_g + ε for the weighted mean f of recipe r on the items of generation g: γ, what the
    search has reached, is a random walk; η, by which a recipe differs from it, and ε are normal. d is how easy the
    generation's items are; items of one task are exchangeable, and each task has its own spread. Since all recipes
    of a generation answer the same items, d does not touch their differences, and only γ has to be told from it:
    by how γ must have gone for generations that share few items, and by the items that they share. All variances
    are moments of the data (empirical Bayes); γ is its posterior mean, η is shrunk by var η / (var η + var ε), and a
    recipe that several generations asked is the mean of what they say.

    Args:
        generations: in order, recipe → what it earned. All recipes of a generation have answered the same items.
        weights: of the tasks.
    """
    draws = [_draw(tables, weights) for tables in generations if tables]
    if not draws:
        return {}
    total = math.fsum(weights[task] for task in draws[0].items)
    shares = {task: weights[task] / total for task in draws[0].items}
    noise, spread = _item_variances(draws)
    error = np.array(
        [sum(shares[t] ** 2 * noise[t] / len(ids) for t, ids in draw.items.items()) for draw in draws]
    )
    among = _variance_among(draws, error)
    means = np.array([draw.scores.mean() for draw in draws])
    luck = sum(shares[t] ** 2 * spread[t] * _overlap(draws, t) for t in shares)
    luck = luck + np.diag([(among + e) / len(draw.recipes) for draw, e in zip(draws, error, strict=True)])
    level = _level(means, luck)
    prior: dict[str, float] = {}
    said: dict[str, list[tuple[float, float]]] = {}
    for draw, mean, reached, e in zip(draws, means, level, error, strict=True):
        for recipe, score in zip(draw.recipes, draw.scores, strict=True):
            prior.setdefault(recipe, float(reached))
            said.setdefault(recipe, []).append((float(reached + score - mean), float(max(e, _TINY))))
    among = max(among, _TINY)
    return {
        recipe: (prior[recipe] / among + math.fsum(value / e for value, e in found))
        / (1 / among + math.fsum(1 / e for _, e in found))
        for recipe, found in said.items()
    }


def _draw(tables: Mapping[str, Values], weights: Mapping[str, float]) -> _Draw:
    recipes = tuple(tables)
    first = tables[recipes[0]]
    items = {task: tuple(sorted(first[task])) for task in sorted(first)}
    values = {
        task: np.array([[tables[recipe][task][item] for item in ids] for recipe in recipes])
        for task, ids in items.items()
    }
    total = math.fsum(weights[task] for task in items)
    scores = sum(weights[task] / total * values[task].mean(axis=1) for task in items)
    return _Draw(recipes, items, values, np.asarray(scores, dtype=np.float64))


def _item_variances(draws: Sequence[_Draw]) -> tuple[dict[str, float], dict[str, float]]:
    """Return of each task the variance of an answer, and that of how easy an item is: a two-way analysis."""
    noise: dict[str, float] = {}
    spread: dict[str, float] = {}
    for task in draws[0].items:
        tables = [draw.values[task] for draw in draws]
        residual = freedom = 0.0
        for y in tables:
            rest = y - y.mean(axis=0) - y.mean(axis=1, keepdims=True) + y.mean()
            residual += float((rest**2).sum())
            freedom += (y.shape[0] - 1) * (y.shape[1] - 1)
        noise[task] = residual / freedom if freedom else 0.0
        between = sum(float(((y.mean(axis=0) - y.mean()) ** 2).sum()) for y in tables)
        expected = sum((y.shape[1] - 1) * noise[task] / y.shape[0] for y in tables)
        items = sum(y.shape[1] - 1 for y in tables)
        spread[task] = max(0.0, (between - expected) / items) if items else 0.0
    return noise, spread


def _variance_among(draws: Sequence[_Draw], error: Array) -> float:
    """Return the variance of recipes within a generation, that of their answers taken off."""
    freedom = sum(len(draw.recipes) - 1 for draw in draws)
    if not freedom:
        return 0.0
    seen = sum(float(((draw.scores - draw.scores.mean()) ** 2).sum()) for draw in draws)
    luck = sum((len(draw.recipes) - 1) * e for draw, e in zip(draws, error, strict=True))
    return float(max(0.0, (seen - luck) / freedom))


def _overlap(draws: Sequence[_Draw], task: str) -> Array:
    """Return Σ_j 1/(n_g n_h) over the items j of a task that two generations share, (G, G)."""
    place = {item: i for i, item in enumerate(sorted({item for draw in draws for item in draw.items[task]}))}
    shares = np.zeros((len(draws), len(place)))
    for row, draw in zip(shares, draws, strict=True):
        row[[place[item] for item in draw.items[task]]] = 1 / len(draw.items[task])
    overlap: Array = shares @ shares.T
    return overlap


def _level(means: Array, luck: Array) -> Array:
    """Return the posterior mean of a random walk that was seen through errors of this covariance, (G,).

    The variance of its steps is the least-squares slope of the squared differences of generations, their errors'
    taken off, over how far they lie apart.
    """
    count = len(means)
    steps = np.arange(count)
    apart = np.abs(steps[:, None] - steps)
    chosen = (apart > 0) & (apart <= max(1, count // 2))
    own = np.diag(luck)
    excess = (means[:, None] - means) ** 2 - (own[:, None] + own - 2 * luck)
    slope = float((apart * excess)[chosen].sum() / max(1.0, float((apart**2)[chosen].sum())))
    walk = max(0.0, slope) * np.minimum.outer(steps, steps)
    covariance = walk + luck + np.eye(count) * _TINY
    solved = np.linalg.solve(covariance, np.stack([means, np.ones(count)], axis=1))
    start = solved[:, 0].sum() / solved[:, 1].sum()
    level: Array = start + walk @ (solved[:, 0] - start * solved[:, 1])
    return level
