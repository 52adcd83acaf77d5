"""Which metrics can be fitness, and how a result becomes a number between 0 and 1."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from evomerge.errors import CandidateFailed, UserError
from evomerge.evaluation.metrics import Kind, Metric
from tests.evaluation.tiny import MEAN, FakeEngine, build, whole, write_task

FILTERS = [
    {"name": name, "filter": [{"function": "regex", "regex_pattern": pattern}, {"function": "take_first"}]}
    for name, pattern in (("strict", "^([0-9]+)$"), ("flexible", "([0-9]+)"))
]


def refusal(folder: Path, *tasks: Any) -> str:
    with pytest.raises(UserError) as caught:
        build(folder, *tasks)
    return str(caught.value)


@pytest.mark.parametrize(
    ("kind", "higher", "result", "raw", "value"),
    [
        ("share", True, 0.25, 0.25, 0.25),
        ("share", True, True, 1.0, 1.0),
        ("share", False, 0.25, 0.25, 0.75),
        ("brier", False, (1, [0.5, 0.5]), 0.5, 0.75),
        ("brier", False, (0, [0.0, 1.0]), 2.0, 0.0),
        ("perplexity", False, math.log(0.25), 4.0, 0.25),
        ("weighted_perplexity", False, (2 * math.log(0.25), 2), 4.0, 0.25),
        ("bits_per_byte", False, (-24 * math.log(2), 8), 3.0, 0.125),
        ("bits_per_byte", False, (0.0, 0), 0.0, 1.0),
    ],
)
def test_results_map_to_the_unit_interval(
    kind: Kind, higher: bool, result: Any, raw: float, value: float
) -> None:
    assert Metric("m", "none", kind, higher).item(result, "t") == pytest.approx((raw, value))


def test_a_hopeless_text_still_has_a_finite_perplexity() -> None:
    raw, value = Metric("m", "none", "perplexity", False).item(-1e5, "t")
    assert math.isfinite(raw)
    assert value == 0


@pytest.mark.parametrize("result", [37.5, -0.2, "text", (1, 2), None])
def test_results_that_are_no_share_are_refused(result: Any) -> None:
    with pytest.raises(UserError, match=r"task 't': metric 'm' gave .* between 0 and 1"):
        Metric("m", "none", "share", True).item(result, "t")


def test_a_metric_that_is_not_finite_fails_the_candidate() -> None:
    with pytest.raises(CandidateFailed, match="'m' is not finite"):
        Metric("m", "none", "share", True).item(math.nan, "t")


def test_auto_takes_the_first_metric(tmp_path: Path) -> None:
    write_task(tmp_path)
    task = build(tmp_path).tasks[0]
    assert (task.name, task.metric, task.filter, task.output_type, task.higher_is_better, task.weight) == (
        "tiny", "acc", "none", "multiple_choice", True, 1.0)  # fmt: skip
    assert build(tmp_path, {"task": "tiny", "metric": "acc_norm"}).tasks[0].metric == "acc_norm"


def test_unknown_metrics_and_filters_name_the_known_ones(tmp_path: Path) -> None:
    write_task(tmp_path)
    message = refusal(tmp_path, {"task": "tiny", "metric": "accnorm"})
    assert message.startswith("search.yaml: suite.tasks.0.metric: task 'tiny' has no metric 'accnorm'")
    assert "(did you mean 'acc_norm'?); usable: 'acc', 'acc_norm'" in message
    assert "no filter 'x'" in refusal(tmp_path, {"task": "tiny", "metric": "acc,x"})


def test_several_filters_need_a_choice(tmp_path: Path) -> None:
    write_task(tmp_path, kind="generate", filter_list=FILTERS, doc_to_target="{{gold}}")
    assert "write one of 'exact_match,strict', 'exact_match,flexible'" in refusal(tmp_path)
    engine = FakeEngine(text=lambda r: f"the answer is {int(r.context.split()[3]) * 5 % 4}")
    shares = []
    for name in ("strict", "flexible"):
        suite = build(tmp_path, {"task": "tiny", "metric": f"exact_match,{name}"})
        assert suite.tasks[0].filter == name
        shares.append([score.value for score in suite.score(engine, whole(suite))])
    assert set(shares[0]) == {0.0}
    assert set(shares[1]) == {1.0}


def test_metrics_that_are_no_mean_over_items_are_refused(tmp_path: Path) -> None:
    mcc = {"metric": "mcc", "aggregation": "matthews_corrcoef", "higher_is_better": True}
    likelihood = {"metric": "likelihood", **MEAN}
    write_task(tmp_path, metric_list=[mcc, likelihood, {"metric": "acc", **MEAN}])
    for metric in ("auto", "mcc", "likelihood"):
        message = refusal(tmp_path, {"task": "tiny", "metric": metric})
        assert "is not a mean over items" in message
        assert message.endswith("usable: 'acc', 'gold_nll', 'gold_bits_per_byte'")
    bleu = {"metric": "bleu", "aggregation": "bleu", "higher_is_better": True}
    write_task(tmp_path, kind="generate", metric_list=[bleu])
    assert refusal(tmp_path).endswith("usable: 'gold_nll', 'gold_bits_per_byte'")
    write_task(tmp_path, kind="rolling", metric_list=[bleu])
    assert "no other metric" in refusal(tmp_path)


def test_bits_per_byte_of_the_right_answer_by_the_tasks_own_code(tmp_path: Path) -> None:
    bits = {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}
    path = write_task(tmp_path, kind="likelihood", metric_list=[bits])
    (tmp_path / "code.py").write_text(
        "def bits(doc, results):\n    return {'bits_per_byte': (results[0][0], len(doc['answer'].encode()))}\n"
    )
    path.write_text(path.read_text() + "process_results: !function code.bits\n")
    suite = build(tmp_path, trust_task_code=True)
    for score in suite.score(FakeEngine(lambda r: -3.0 * len(r.continuation.strip())), whole(suite)):
        assert score.raw == pytest.approx(3 / math.log(2))
        assert score.value == pytest.approx(2**-score.raw)
        assert not suite.tasks[0].higher_is_better


def test_broken_task_code_is_told_as_such(tmp_path: Path) -> None:
    path = write_task(tmp_path)
    (tmp_path / "code.py").write_text("def bad(doc, results):\n    return {'acc': doc['nothing']}\n")
    path.write_text(path.read_text() + "process_results: !function code.bad\n")
    suite = build(tmp_path, trust_task_code=True)
    with pytest.raises(
        UserError, match=r"task 'tiny': its metrics cannot be computed for document .*KeyError"
    ):
        suite.score(FakeEngine(), whole(suite), check_degenerate=False)
    (tmp_path / "other").mkdir()
    path = write_task(tmp_path / "other")
    (tmp_path / "other" / "code.py").write_text("def bad(doc, results):\n    return {'accuracy': 1.0}\n")
    path.write_text(path.read_text() + "process_results: !function code.bad\n")
    suite = build(tmp_path / "other", trust_task_code=True)
    with pytest.raises(UserError, match="no 'acc' among its results; choose one of accuracy"):
        suite.score(FakeEngine(), whole(suite), check_degenerate=False)


@pytest.mark.parametrize(
    ("kind", "higher", "result", "raw", "value"),
    [
        ("perplexity", True, math.log(0.25), 4.0, 0.75),
        ("bits_per_byte", True, (-24 * math.log(2), 8), 3.0, 0.875),
        ("brier", True, (1, [0.5, 0.5]), 0.5, 0.25),
    ],
)
def test_a_metric_in_the_other_direction(
    kind: Kind, higher: bool, result: Any, raw: float, value: float
) -> None:
    assert Metric("m", "none", kind, higher).item(result, "t") == pytest.approx((raw, value))


def test_direction_overrides_what_the_task_says(tmp_path: Path) -> None:
    write_task(tmp_path)
    scores = {}
    for direction in ("maximize", "minimize"):
        suite = build(tmp_path, {"task": "tiny", "direction": direction})
        assert suite.tasks[0].higher_is_better == (direction == "maximize")
        index = {item.id: item.index for item in suite.items("search")}
        found = suite.score(FakeEngine(), whole(suite), check_degenerate=False)
        scores[direction] = {index[score.item]: score for score in found}
    assert not {s.item for s in scores["maximize"].values()} & {s.item for s in scores["minimize"].values()}
    for number, up in scores["maximize"].items():
        down = scores["minimize"][number]
        assert up.raw == down.raw
        assert up.value == 1 - down.value


def test_a_metric_of_which_nobody_knows_the_direction(tmp_path: Path) -> None:
    path = write_task(tmp_path, metric_list=[{"metric": "mistakes", "aggregation": "mean"}])
    (tmp_path / "code.py").write_text("def count(doc, results):\n    return {'mistakes': 0.25}\n")
    path.write_text(path.read_text() + "process_results: !function code.count\n")
    with pytest.raises(UserError) as caught:
        build(tmp_path, trust_task_code=True)
    assert str(caught.value) == (
        "search.yaml: suite.tasks.0.metric: task 'tiny' does not say whether a larger 'mistakes' is better; "
        "write direction: maximize or direction: minimize beside it"
    )
    suite = build(tmp_path, {"task": "tiny", "direction": "minimize"}, trust_task_code=True)
    assert {s.value for s in suite.score(FakeEngine(), whole(suite), check_degenerate=False)} == {0.75}
