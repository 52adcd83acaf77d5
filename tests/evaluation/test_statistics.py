from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.evaluation.statistics import (
    compare,
    compare_all,
    mcnemar,
    minimum_detectable_effect,
    one_standard_error_choice,
    score,
    suite_mean,
    wilson,
)


def table(**tasks) -> dict[str, dict[str, float]]:
    return {task: {f"{task}{i:04}": float(v) for i, v in enumerate(values)} for task, values in tasks.items()}


def coins(rng: np.random.Generator, n: int, p: float = 0.5) -> np.ndarray:
    return (rng.random(n) < p).astype(float)


ONE = {"a": 1.0}
TWO = {"a": 3.0, "b": 1.0}


def test_the_suite_mean_weighs_tasks_not_items():
    assert suite_mean(table(a=[1, 0], b=[1] * 30), TWO) == pytest.approx(0.75 * 0.5 + 0.25)


@pytest.mark.parametrize(
    ("tasks", "weights", "message"),
    [
        (table(a=[1]), TWO, "b: has no items"),
        (table(a=[1], b=[]), TWO, "b: has no items"),
        (table(a=[1], b=[1]), ONE, "b: has no weight"),
        (table(a=[1]), {"a": 0.0}, "do not add up to a positive number"),
    ],
)
def test_tables_that_do_not_fit_the_weights_are_refused(tasks, weights, message):
    for function in (suite_mean, lambda t, w: score(t, w, seed=0)):
        with pytest.raises(ValueError, match=message):
            function(tasks, weights)


@given(st.integers(1, 400), st.data())
def test_wilson_is_scipys(n, data):
    k = data.draw(st.integers(0, n))
    expected = scipy.stats.binomtest(k, n).proportion_ci(method="wilson")
    assert wilson(k, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


@given(st.integers(0, 300), st.integers(0, 300))
def test_mcnemar_is_the_exact_binomial_test(wins, losses):
    expected = scipy.stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    assert mcnemar(wins, losses) == pytest.approx(expected, rel=1e-9)


def test_a_task_of_zeros_and_ones_has_wilsons_interval_and_a_graded_one_the_bootstraps():
    rng = np.random.default_rng(0)
    binary, graded = coins(rng, 80), rng.random(60) ** 2
    result = score(table(a=binary, b=graded), TWO, seed=1)
    assert result.tasks["a"].ci95 == wilson(int(binary.sum()), 80)
    expected = scipy.stats.bootstrap((graded,), np.mean, method="percentile", rng=rng).confidence_interval
    assert result.tasks["b"].ci95 == pytest.approx(tuple(expected), abs=0.01)
    assert result.n == 140
    assert result.tasks["b"].mean == pytest.approx(graded.mean())


def test_the_suites_interval_is_the_stratified_bootstrap_of_the_weighted_sum():
    rng = np.random.default_rng(3)
    a, b = coins(rng, 150, 0.3), rng.random(40)

    def weighted(x, y, axis):
        return 0.75 * x.mean(axis=axis) + 0.25 * y.mean(axis=axis)

    expected = scipy.stats.bootstrap((a, b), weighted, method="percentile", rng=rng).confidence_interval
    result = score(table(a=a, b=b), TWO, seed=1)
    assert result.ci95 == pytest.approx(tuple(expected), abs=0.006)
    assert result.mean == pytest.approx(weighted(a, b, 0))


def test_one_task_is_its_own_suite():
    result = score(table(a=[1, 0, 1, 1]), ONE, seed=0)
    assert result.ci95 == result.tasks["a"].ci95 == wilson(3, 4)


def test_perfect_answers_do_not_feign_certainty():
    low, high = score(table(a=[1] * 30, b=[1] * 10), TWO, seed=0).ci95
    assert low == pytest.approx(1 - np.hypot(0.75 * (1 - wilson(30, 30)[0]), 0.25 * (1 - wilson(10, 10)[0])))
    assert high == 1


@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
def test_a_single_item_gives_a_score(value):
    result = score(table(a=[value]), ONE, seed=0)
    assert result.mean == value
    assert result.ci95[0] <= value <= result.ci95[1]


def test_results_depend_on_the_seed_and_not_on_the_order_of_items():
    rng = np.random.default_rng(0)
    a, b = table(a=rng.random(50)), table(a=rng.random(50))
    shuffled = {"a": dict(reversed(a["a"].items()))}
    assert score(a, ONE, seed=4) == score(shuffled, ONE, seed=4)
    assert compare(a, b, ONE, seed=4) == compare(shuffled, b, ONE, seed=4)
    assert compare(a, b, ONE, seed=4).ci95 != compare(a, b, ONE, seed=5).ci95


def test_a_comparison_is_paired_by_item():
    rng = np.random.default_rng(0)
    easiness = rng.random(200)
    a, b = np.clip(easiness + 0.03, 0, 1), np.clip(easiness + 0.02 * rng.standard_normal(200), 0, 1)
    paired = compare(table(a=a), table(a=b), ONE, seed=0)
    expected = scipy.stats.bootstrap((a - b,), np.mean, method="percentile", rng=rng).confidence_interval
    assert paired.ci95 == pytest.approx(tuple(expected), abs=5e-4)
    assert paired.delta == pytest.approx((a - b).mean())
    assert paired.resolved
    unpaired = compare(table(a=a), table(a=rng.permutation(b)), ONE, seed=0)
    assert unpaired.delta == pytest.approx(paired.delta)
    assert np.diff(unpaired.ci95) > 5 * np.diff(paired.ci95)
    assert not unpaired.resolved


def test_a_comparison_weighs_tasks():
    a, b = table(a=[1, 1, 0, 0], b=[1, 0]), table(a=[0, 1, 0, 0], b=[1, 1])
    result = compare(a, b, TWO, seed=0)
    assert result.delta == pytest.approx(0.75 * 0.25 - 0.25 * 0.5)
    assert result.p_disagree == pytest.approx(0.75 * 0.25 + 0.25 * 0.5)
    assert result.p_mcnemar == mcnemar(1, 1) == 1
    assert result.n == 6


def test_mcnemar_needs_zeros_and_ones():
    assert compare(table(a=[0.5, 1]), table(a=[0, 1]), ONE, seed=0).p_mcnemar is None


def test_different_items_are_refused_by_name():
    with pytest.raises(ValueError, match="a: a comparison needs the same items on both sides; a0002"):
        compare(table(a=[1, 1, 1]), table(a=[1, 1]), ONE, seed=0)
    with pytest.raises(ValueError, match=r"b: .* b0000"):
        compare(table(a=[1]), table(a=[1], b=[1]), ONE, seed=0)


@pytest.mark.parametrize("n", [1, 2, 5, 6, 20])
def test_a_handful_of_differing_items_resolves_nothing(n):
    result = compare(table(a=[1] * n), table(a=[0] * n), ONE, seed=0)
    assert result.resolved == (mcnemar(n, 0) < 0.05)
    assert (result.needed_items is None) == result.resolved
    if not result.resolved:
        assert result.needed_items == 6


def test_equal_models_are_not_told_apart():
    result = compare(table(a=[1, 0, 1]), table(a=[1, 0, 1]), ONE, seed=0)
    assert (result.delta, result.ci95, result.resolved, result.needed_items) == (0, (0, 0), False, None)
    assert result.p_mcnemar == 1


def test_the_needed_items_would_resolve_the_seen_difference():
    rng = np.random.default_rng(1)
    d = np.array([1] * 14 + [-1] * 8 + [0] * 78)
    b = np.where(d == 0, coins(rng, 100), (d < 0).astype(float))
    result = compare(table(a=b + d), table(a=b), ONE, seed=0)
    assert not result.resolved
    z = scipy.stats.norm.ppf(0.975) + scipy.stats.norm.ppf(0.8)
    assert result.needed_items == np.ceil(z**2 * (0.22 - 0.06**2) / 0.06**2)
    factor = -(-result.needed_items // 100)
    more = compare(table(a=np.tile(b + d, factor)), table(a=np.tile(b, factor)), ONE, seed=0)
    assert more.resolved
    assert more.needed_items is None


def test_the_needed_items_count_each_task_by_its_weight():
    d = {"a": np.array([1.0] * 5 + [-1] * 4 + [0] * 31), "b": np.array([1.0] * 3 + [-1] * 3 + [0] * 4)}
    zeros = {task: np.zeros(len(x)) for task, x in d.items()}
    result = compare(table(**d), table(**zeros), TWO, seed=0)
    delta = 0.75 * d["a"].mean() + 0.25 * d["b"].mean()
    variance = 0.75**2 * d["a"].var() / 40 + 0.25**2 * d["b"].var() / 10
    z = scipy.stats.norm.ppf(0.975) + scipy.stats.norm.ppf(0.8)
    assert result.needed_items == np.ceil(50 * z**2 * variance / delta**2)


def test_intervals_cover_the_true_difference():
    rng = np.random.default_rng(11)
    covered = covered_score = 0
    runs = 60
    for i in range(runs):
        n = {"a": 90, "b": 60}
        easiness = {t: rng.random(k) for t, k in n.items()}
        a, b = (
            table(
                **{
                    t: (rng.random(k) < np.clip(easiness[t] + shift, 0, 1)).astype(float)
                    for t, k in n.items()
                }
            )
            for shift in (0.1, 0.0)
        )
        true = 0.1 - 0.1**2 / 2
        low, high = compare(a, b, TWO, seed=i).ci95
        covered += low <= true <= high
        low, high = score(b, TWO, seed=i).ci95
        covered_score += low <= 0.5 <= high
    # Fewer than 52 of 60 has probability 0.005 at a true coverage of 95 %.
    assert covered >= 52
    assert covered_score >= 52


def test_simultaneous_intervals_are_the_max_t_bootstraps():
    rng = np.random.default_rng(2)
    won = coins(rng, 120, 0.6)
    others = {name: np.where(rng.random(120) < 0.3, coins(rng, 120), won) for name in "xyz"}
    results = compare_all(table(a=won), {k: table(a=v) for k, v in others.items()}, ONE, seed=0)
    d = np.stack([won - v for v in others.values()])
    resampled = d[:, rng.integers(120, size=(20_000, 120))].mean(axis=2)
    se = resampled.std(axis=1)
    critical = np.quantile(np.abs((resampled - d.mean(axis=1)[:, None]) / se[:, None]).max(axis=0), 0.95)
    assert 2.1 < critical < 2.6
    for name, mean, error in zip(others, d.mean(axis=1), se, strict=True):
        result = results[name]
        assert result.ci95_simultaneous == pytest.approx(
            (mean - critical * error, mean + critical * error), abs=6e-3
        )
        assert result.ci95 == compare(table(a=won), table(a=others[name]), ONE, seed=0).ci95


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 40), st.integers(1, 4), st.integers(0, 10**6))
def test_simultaneous_intervals_contain_the_pointwise_ones(n, baselines, seed):
    rng = np.random.default_rng(seed)
    won = table(a=coins(rng, n))
    others = {str(i): table(a=coins(rng, n)) for i in range(baselines)} | {"same": won}
    for result in compare_all(won, others, ONE, seed=0).values():
        assert result.ci95_simultaneous is not None
        assert result.ci95_simultaneous[0] <= result.ci95[0] <= result.delta + 1e-12
        assert result.ci95_simultaneous[1] >= result.ci95[1] >= result.delta - 1e-12
        if result.resolved:
            assert result.ci95_simultaneous[0] > 0 or result.ci95_simultaneous[1] < 0


def test_comparing_with_nothing_gives_nothing():
    assert compare_all(table(a=[1]), {}, ONE, seed=0) == {}


@pytest.mark.parametrize(("effect", "n"), [(0.05, 619), (0.03, 1734), (0.02, 3912)])
def test_the_minimum_detectable_effect_of_one_task_is_the_published_one(effect, n):
    assert minimum_detectable_effect(n) == pytest.approx(effect, rel=2e-3)


def test_the_minimum_detectable_effect_has_the_promised_power():
    counts, weights = {"a": 300, "b": 100}, {"a": 1.0, "b": 1.0}
    effect = minimum_detectable_effect(counts, weights, p_disagree=0.3)
    rng = np.random.default_rng(0)
    up, down = (0.3 + effect) / 2, (0.3 - effect) / 2
    total, variance = np.zeros(20_000), np.zeros(20_000)
    for task, n in counts.items():
        wins, losses, _ = rng.multinomial(n, [up, down, 0.7], size=20_000).T
        d = (wins - losses) / n
        total += weights[task] / 2 * d
        variance += (weights[task] / 2) ** 2 * ((wins + losses) / n - d**2) / n
    assert np.mean(total / np.sqrt(variance) > scipy.stats.norm.ppf(0.975)) == pytest.approx(0.8, abs=0.02)


def test_the_minimum_detectable_effect_never_exceeds_what_models_can_differ_by():
    assert minimum_detectable_effect(3) < 1
    assert minimum_detectable_effect(3, p_disagree=0.01) > 0.01
    assert minimum_detectable_effect({"a": 50, "b": 50}, {"a": 1, "b": 1}) == pytest.approx(
        minimum_detectable_effect(100)
    )
    with pytest.raises(ValueError, match="at least one item"):
        minimum_detectable_effect({"a": 5, "b": 0}, TWO)


def test_the_simplest_within_one_standard_error_is_chosen():
    rng = np.random.default_rng(0)
    best = coins(rng, 200, 0.7)
    near, far = best.copy(), best.copy()
    near[:20] = 1 - best[:20]
    far[np.flatnonzero(best)[:60]] = 0
    tables = {"far": table(a=far), "near": table(a=near), "best": table(a=best), "worse": table(a=far)}
    d = best - near
    assert 0 < d.mean() < d.std(ddof=1) / np.sqrt(200)
    assert one_standard_error_choice(tables, ONE) == "near"
    assert one_standard_error_choice({"best": table(a=best), "near": table(a=near)}, ONE) == "best"
    del tables["near"]
    assert one_standard_error_choice(tables, ONE) == "best"


def test_the_standard_error_of_a_choice_weighs_tasks():
    a, b = np.array([1.0] * 8 + [0] * 92), np.array([1.0] * 7 + [-1] * 7 + [0] * 26)
    lead = 0.75 * a.mean()
    error = np.sqrt(0.75**2 * a.var(ddof=1) / 100 + 0.25**2 * b.var(ddof=1) / 40)
    for shift, expected in ((0.0, "best"), (lead - 0.9 * error, "simple"), (lead - 1.1 * error, "best")):
        simple = table(a=np.full(100, shift / 0.75), b=np.zeros(40))
        assert one_standard_error_choice({"simple": simple, "best": table(a=a, b=b)}, TWO) == expected


def test_a_tie_goes_to_the_simplest_and_a_clear_lead_to_the_best():
    same = table(a=[1, 0, 1], b=[1])
    assert one_standard_error_choice({"x": same, "y": same}, TWO) == "x"
    assert one_standard_error_choice({"x": table(a=[0, 0]), "y": table(a=[1, 1])}, ONE) == "y"
    with pytest.raises(ValueError, match="no model"):
        one_standard_error_choice({}, ONE)
