from __future__ import annotations

import numpy as np
import pytest
from scipy import integrate

from evomerge.evaluation.items import ItemScore
from evomerge.searching.futility import e_value, hopeless


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (0, 7), (3, 20), (12, 4), (40, 90)])
def test_the_e_value_is_the_averaged_likelihood_ratio(wins: int, losses: int) -> None:
    def ratio(p: float) -> float:
        return 2 * (2 * p) ** wins * (2 * (1 - p)) ** losses

    expected, _ = integrate.quad(ratio, 0, 0.5)
    assert e_value(wins, losses) == pytest.approx(expected, rel=1e-6)


def test_a_fair_candidate_is_seldom_stopped_however_often_one_looks() -> None:
    numbers = np.random.default_rng(0)
    stopped = 0
    for _ in range(1000):
        wins = np.cumsum(numbers.random(60) < 0.5)
        stopped += any(e_value(int(w), n + 1 - int(w)) >= 20 for n, w in enumerate(wins))
    assert stopped / 1000 <= 0.05


def table(values: list[float]) -> dict[str, dict[str, ItemScore]]:
    return {"t": {str(i): ItemScore(str(i), "t", value, value) for i, value in enumerate(values)}}


def test_only_what_is_clearly_and_credibly_worse_is_hopeless() -> None:
    anchor = table([1.0] * 24 + [0.0] * 8)
    assert hopeless(table([0.0] * 32), anchor, {"t": 2.0})
    assert hopeless(table([1.0] * 12 + [0.0] * 20), anchor, {"t": 2.0})
    assert not hopeless(anchor, anchor, {"t": 2.0})
    # As many wins as losses, or a loss within the margin.
    assert not hopeless(table([0.0] * 8 + [1.0] * 24), anchor, {"t": 2.0})
    assert not hopeless(table([0.0] * 4 + [1.0] * 20 + [0.0] * 8), anchor, {"t": 2.0})
    assert not hopeless(table([0.9] * 24 + [0.0] * 8), anchor, {"t": 2.0})
    # Too few items to tell.
    assert not hopeless(table([0.0] * 4), table([1.0] * 4), {"t": 1.0})
