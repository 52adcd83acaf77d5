"""Who of a generation answers the full suite."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Screened:
    """A candidate that did not come through the screen.

    Attributes:
        score: what it had there, in [0, 1]; larger is better.
    """

    score: float


def places(keep: float, *, population: int, parents: int) -> int:
    """Return how many candidates of a generation come through the screen.

    Args:
        keep: share of the population, rounded up.
        population: candidates of a generation.
        parents: how many of the best the optimiser learns from: never fewer.
    """
    # 0.1 * 30 is 3.0000000000000004
    return min(population, max(math.ceil(keep * population - 1e-9), parents))


def come_through(scores: Sequence[float | None], recipes: Sequence[str], count: int) -> list[bool]:
    """Return whether each candidate answers the full suite: the best on the screen, the earlier one of equals.

    Args:
        scores: on the screen; None of candidates that failed there, which never come through.
        recipes: hashes; equal recipes share their fate, which costs nothing.
        count: how many come through.
    """
    order = sorted(
        (i for i, score in enumerate(scores) if score is not None), key=lambda i: (-(scores[i] or 0.0), i)
    )
    chosen = {recipes[i] for i in order[:count]}
    return [score is not None and recipe in chosen for score, recipe in zip(scores, recipes, strict=True)]
