"""Which candidates are so clearly below a model that is known to work that the rest of their items are saved."""

from __future__ import annotations

import math
from collections.abc import Mapping

from evomerge.searching.ranking import ScoreTable, fitness_of

MARGIN = 0.15
"""How much lower than the anchor a candidate's mean must be, too."""

LEVEL = 0.05
"""The chance that a candidate which is no worse than the anchor is stopped, at most."""


def hopeless(candidate: ScoreTable, anchor: ScoreTable, weights: Mapping[str, float]) -> bool:
    """Return whether a candidate need not be asked further.

    Both have answered the same items. The candidate's mean is lower by more than `MARGIN`, and an e-value against
    "of the items on which they differ it wins half or more" reaches 1 / `LEVEL`.

    Args:
        candidate, anchor: task → item → score.
        weights: of the tasks.
    """
    present = {task: weights[task] for task in anchor}
    if fitness_of(candidate, present) >= fitness_of(anchor, present) - MARGIN:
        return False
    pairs = [
        (score.value, anchor[task][item].value)
        for task, scores in candidate.items()
        for item, score in scores.items()
    ]
    return (
        e_value(sum(own > other for own, other in pairs), sum(own < other for own, other in pairs))
        >= 1 / LEVEL
    )


def e_value(wins: int, losses: int) -> float:
    """Return the evidence that a win is rarer than a loss: 2ⁿ⁺¹ B(1/2; w + 1, l + 1), n = w + l.

    The likelihood ratio against p = 1/2, averaged over a win's chance p from 0 to 1/2 (B is the incomplete beta
    function). Its mean is at most 1 where p ≥ 1/2, so it exceeds 1/δ with a chance of at most δ, however often it
    is looked at (Ville).
    """
    n = wins + losses
    tail = sum(math.comb(n + 1, k) for k in range(wins + 1, n + 2))
    return tail / ((n + 1) * math.comb(n, wins))
