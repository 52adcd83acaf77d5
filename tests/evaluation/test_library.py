"""Groups, tags and paths: which tasks a name stands for, and how they share its weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from evomerge.config import load_config
from evomerge.errors import UserError
from evomerge.evaluation.library import Library
from evomerge.initial_config import initial_config
from evomerge.searching.plan import plan_search
from evomerge.searching.setup import set_up
from tests.evaluation.tiny import FakeEngine, build, documents, suite_config, whole, write_task
from tests.tasks import make_config

KEYS = ("target_delimiter", "description", "num_fewshot", "doc_to_text")


def write_group(folder: Path, name: str, members: Any, **keys: Any) -> Path:
    path = folder / f"{name}_group.yaml"
    path.write_text(yaml.safe_dump({"group": name, "task": members, **keys}))
    return path


def refusal(folder: Path, *tasks: Any, **keys: Any) -> str:
    with pytest.raises(UserError) as caught:
        build(folder, *tasks, **keys)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three tasks, a tag on two of them, and groups over both."""
    for start, name in enumerate(("one", "two", "three")):
        tags = {} if name == "three" else {"tag": ["pair"] if name == "one" else "pair"}
        data = {s: documents(4 + 2 * start, 1000 * start + 100 * i) for i, s in enumerate(
            ("search", "validation", "test"))}  # fmt: skip
        write_task(tmp_path, name, data=data, **tags)
    write_group(tmp_path, "flat", ["one", "three"])
    write_group(
        tmp_path,
        "nested",
        ["pair", {"group": "inner", "task": ["three"], "description": "inner "}],
        target_delimiter=": ",
        description="outer ",
    )
    write_group(
        tmp_path,
        "overriding",
        [{"task": "one", "description": "own "}, {"group": "flat_too", "description": "again "}],
        description="of all ",
    )
    write_group(tmp_path, "flat_too", ["two", {"task": "three", "target_delimiter": "-"}], description="low ")
    return tmp_path


@pytest.mark.parametrize("name", ["one", "pair", "flat", "nested", "overriding", "flat_too"])
def test_a_name_stands_for_the_tasks_of_lm_eval_with_their_settings(folder: Path, name: str) -> None:
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    # It finds the data files relative to where it runs.
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        theirs = manager.load([name])["tasks"]
    ours = Library([str(folder)], None).expand(name, key="").definitions
    assert {d.name for d in ours} == set(theirs)
    for definition in ours:
        config = theirs[definition.name].config
        for key in KEYS:
            assert definition.config.get(key) == getattr(config, key) or key not in definition.config


def test_a_group_shares_its_weight_and_its_settings(folder: Path) -> None:
    suite = build(folder, {"task": "flat", "weight": 3.0, "metric": "acc_norm", "limit": 3}, "two")
    assert suite.weights == {"one": 1.5, "three": 1.5, "two": 1.0}
    assert {task.name: task.metric for task in suite.tasks} == {
        "one": "acc_norm",
        "three": "acc_norm",
        "two": "acc",
    }
    counts = {task.name: task.counts["search"] for task in suite.tasks}
    assert counts == {"one": 3, "three": 3, "two": 6}
    scores = suite.score(FakeEngine(), whole(suite), check_degenerate=False)
    assert {score.task for score in scores} == {"one", "two", "three"}


def test_a_group_that_weighs_by_size_does_so_here(folder: Path) -> None:
    write_group(folder, "sized", ["one", "three"], aggregate_metric_list=[
        {"metric": "acc_norm", "weight_by_size": False}, {"metric": "acc"}])  # fmt: skip
    # One has 12 items in all, three has 24.
    by_size = {"one": 1 / 3, "three": 2 / 3}
    assert build(folder, {"task": "sized", "metric": "acc"}).weights == pytest.approx(by_size)
    whole_only = build(folder, {"task": "sized", "metric": "acc"}, splits_needed=("test",))
    assert whole_only.weights == pytest.approx(by_size)
    alike = build(folder, "sized")
    assert alike.weights == {"one": 0.5, "three": 0.5}
    assert {task.metric for task in alike.tasks} == {"acc_norm"}


def test_a_task_without_the_metric_that_its_group_adds_up(folder: Path) -> None:
    write_task(folder, "text", "generate")
    write_group(folder, "mixture", ["one", "text"], aggregate_metric_list={"metric": "acc_norm"})
    metrics = {task.name: task.metric for task in build(folder, "mixture").tasks}
    assert metrics == {"one": "acc_norm", "text": "exact_match"}
    assert "task 'text' has no metric 'acc_norm'" in refusal(
        folder, {"task": "mixture", "metric": "acc_norm"}
    )


def test_a_task_of_a_group_is_the_task_by_itself(folder: Path) -> None:
    inside, alone = build(folder, "flat"), build(folder, "one", "three")
    assert {i.id for i in inside.items("search")} == {i.id for i in alone.items("search")}
    assert {i.id for i in build(folder, "nested").items("search")}.isdisjoint(
        i.id for i in alone.items("search")
    )


def test_a_task_that_comes_twice_is_told_once(folder: Path) -> None:
    assert refusal(folder, "one", "flat") == (
        "search.yaml: suite.tasks.1: the task 'one' is already in the suite by suite.tasks.0; take one of them out, "
        "or give this one another metric and a name"
    )
    assert "'three' is already in the suite by suite.tasks.0" in refusal(folder, "flat", "flat_too")
    both = build(folder, {"task": "flat", "metric": "acc"}, {"task": "flat", "metric": "acc_norm"})
    assert list(both.weights) == ["one:acc", "three:acc", "one:acc_norm", "three:acc_norm"]
    named = build(folder, "one", {"task": "flat", "metric": "acc_norm", "name": "norm"})
    assert list(named.weights) == ["one", "norm:one", "norm:three"]


def test_a_task_that_a_group_reaches_twice(folder: Path) -> None:
    write_group(folder, "again", ["one", "flat"])
    assert list(build(folder, "again").weights) == ["one", "three"]
    write_group(folder, "differently", ["one", {"task": "one", "description": "x"}])
    assert "holds the task 'one' twice, with different settings" in refusal(folder, "differently")


def test_groups_that_cannot_be(folder: Path) -> None:
    write_group(folder, "circle", ["ring"])
    write_group(folder, "ring", ["circle"])
    write_group(folder, "hollow", [])
    write_group(folder, "lost", ["one", "thre"])
    write_group(folder, "odd", [{"weight": 2}])
    (folder / "elsewhere").mkdir()
    write_group(folder / "elsewhere", "flat", ["two"])
    assert "group 'circle' holds itself: circle > ring > circle" in refusal(folder, "circle")
    assert "group 'hollow' lists no tasks" in refusal(folder, "hollow")
    assert "unknown task 'thre' in group 'lost' (did you mean 'three'?)" in refusal(folder, "lost")
    assert "is neither a name nor a mapping" in refusal(folder, "odd")
    assert "the group 'flat' is defined twice" in refusal(folder, "flat")


def test_a_task_with_the_old_key_for_tags(folder: Path) -> None:
    path = write_task(folder, "old")
    path.write_text(path.read_text() + "group: elders\n")
    for name in ("old", "elders"):
        assert "this YAML defines a task, whose groups lm-eval calls 'tag' now" in refusal(folder, name)


def test_code_in_a_group_needs_trust_like_that_of_a_task(folder: Path) -> None:
    (folder / "code.py").write_text("def shout(doc):\n    return doc['question'].upper()\n")
    write_group(folder, "within", ["one"], description="d ")
    path = write_group(folder, "loud", ["within"])
    path.write_text(path.read_text() + "doc_to_text: !function code.shout\n")
    assert "suite.trust_task_code: task 'one' calls Python (!function code.shout" in refusal(folder, "loud")
    suite = build(folder, "loud", trust_task_code=True)
    engine = FakeEngine()
    suite.score(engine, whole(suite), check_degenerate=False)
    assert all(request.context.startswith("d WHAT FOLLOWS") for request in engine.asked)


def test_a_task_that_only_a_group_defines(folder: Path) -> None:
    task = yaml.safe_load((folder / "one.yaml").read_text())
    write_group(folder, "inline", [{**task, "task": "made_here"}])
    assert list(build(folder, "inline").weights) == ["inline::made_here"]


def test_a_path_is_relative_to_the_config(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, family: dict[str, Path]
) -> None:
    elsewhere = tmp_path_factory.mktemp("config")
    (elsewhere / "mine").mkdir()
    write_task(elsewhere / "mine", "own")
    write_group(elsewhere / "mine", "grouped", ["one", "three"])
    tasks = ["./mine/own.yaml", str(elsewhere / "mine" / "grouped_group.yaml"),
             {"task": "./mine/own.yaml", "metric": "acc_norm", "name": "normed"}]  # fmt: skip
    path = make_config(elsewhere, family, folder, suite={"include": [str(folder)], "tasks": tasks})
    config = load_config(path)
    assert config.suite.tasks[0].task == str(elsewhere / "mine" / "own.yaml")
    setup = set_up(config, file=path, weights=False)
    assert list(setup.suite.weights) == ["own", "one", "three", "normed"]
    plan = plan_search(setup, config.budget)
    assert set(plan.items["search"]) == {"own", "one", "three", "normed", "all"}
    assert all(name in str(plan) for name in ("own", "one", "three", "normed"))
    with pytest.raises(UserError, match=r"no\.yaml: no such file"):
        set_up(load_config(path, ["suite.tasks=[./no.yaml]"]), file=path, weights=False)


def test_the_config_keeps_what_was_written(folder: Path) -> None:
    config = suite_config(folder, {"task": "flat", "weight": 2.0})
    build(folder, {"task": "flat", "weight": 2.0})
    assert [(task.task, task.name, task.weight) for task in config.tasks] == [("flat", "flat", 2.0)]


def test_an_initial_config_of_a_group(folder: Path, family: dict[str, Path]) -> None:
    models = [str(family[name]) for name in ("base", "a", "b")]
    text = initial_config(models, ["flat"], include=[str(folder)])
    assert yaml.safe_load(text)["suite"]["tasks"] == [{"task": "flat", "weight": 1.0}]
    write_task(folder, "single", data={"test": documents(9, 9000)})
    write_group(folder, "mixed", ["one", "single"])
    tasks = yaml.safe_load(initial_config(models, ["mixed"], include=[str(folder)]))["suite"]["tasks"]
    assert [(task["task"], task["weight"]) for task in tasks] == [("one", 0.5), ("single", 0.5)]


def test_the_index_of_lm_evals_own_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from evomerge.evaluation import library

    root = (tmp_path / "tasks").resolve()
    root.mkdir()
    (root / "a.yaml").write_text("task: a\n")
    made: list[int] = []

    def make() -> library.Index:
        made.append(1)
        return library.Index({"a": [str(root / "a.yaml")]}, {}, {"tag": ["a"]})

    monkeypatch.setenv("EVOMERGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(library, "_own_tasks", lambda: root)
    monkeypatch.setattr(library, "_read_lm_eval_index", make)
    indexes = []
    for _ in range(2):
        library.lm_eval_index.cache_clear()
        indexes.append(library.lm_eval_index())
    assert indexes[0] == indexes[1]
    (kept,) = (tmp_path / "cache" / "lm-eval-index").iterdir()
    for text in ("{", "[]", kept.read_text().replace("a.yaml", "../b.yaml")):
        kept.write_text(text)
        library.lm_eval_index.cache_clear()
        assert library.lm_eval_index() == indexes[0]
    (root / "b.yaml").write_text("task: b\n")
    library.lm_eval_index.cache_clear()
    library.lm_eval_index()
    assert len(made) == 5
    library.lm_eval_index.cache_clear()


@pytest.mark.slow
def test_lm_evals_own_tasks_groups_and_tags() -> None:
    library = Library((), None)
    (hellaswag,) = library.expand("hellaswag", key="").definitions
    assert hellaswag.config["output_type"] == "multiple_choice"
    mmlu = library.expand("mmlu", key="")
    assert len(mmlu.definitions) == 57
    assert mmlu.aggregates[0].by_size
    assert {d.name for d in library.expand("ai2_arc", key="").definitions} == {"arc_easy", "arc_challenge"}
