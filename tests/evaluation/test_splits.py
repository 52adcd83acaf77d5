"""Which items there are, and that search, validation and test never share one."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import pytest

from evomerge.errors import UserError
from evomerge.evaluation.items import SPLITS
from evomerge.suite_config import Splits
from tests.evaluation.tiny import build, documents, write_task

FROM_TEST = Splits.model_validate(
    {"from": "test", "fractions": {"search": 0.5, "validation": 0.2, "test": 0.3}}
)


def refusal(folder: Path, *tasks: Any, **keys: Any) -> str:
    with pytest.raises(UserError) as caught:
        build(folder, *tasks, **keys)
    return str(caught.value)


def ids(suite: Any, split: Any) -> list[str]:
    return [item.id for item in suite.items(split)]


def data(search: Any, validation: Any = None, test: Any = None) -> dict[str, Any]:
    return {
        "search": search,
        "validation": validation or documents(5, 1000),
        "test": test or documents(5, 2000),
    }


def test_items_do_not_depend_on_the_order_of_the_files(tmp_path: Path) -> None:
    rows = documents(40)
    write_task(tmp_path / "a", data=data(rows))
    random.Random(0).shuffle(rows)
    write_task(tmp_path / "b", data=data(rows))
    for splits in (Splits(search="search", validation="validation", test="test"),):
        a, b = build(tmp_path / "a", splits=splits), build(tmp_path / "b", splits=splits)
        assert ids(a, "search") == ids(b, "search")
        assert a.sha256("search") == b.sha256("search") != a.sha256("test")
        cut = {"seed": 3, "block_items": 7, "packing": "p:1"}
        assert a.blocks("search", **cut) == b.blocks("search", **cut)  # type: ignore[arg-type]


def test_fractions_are_cut_by_hash_of_the_question(tmp_path: Path) -> None:
    rows = documents(300)
    # The same question in other words for the eye only, with other choices: one group.
    rows += [
        {**row, "question": f"  {row['question'].upper()} ", "choices": ["a", "b", "c", "d"]} for row in rows
    ]
    write_task(tmp_path / "a", data={"test": rows})
    random.Random(0).shuffle(rows)
    write_task(tmp_path / "b", data={"test": rows})
    a, b = (build(tmp_path / name, splits=FROM_TEST) for name in "ab")
    sizes = [len(a.items(split)) for split in SPLITS]
    assert sum(sizes) == 600
    assert sizes[0] == pytest.approx(300, abs=50)
    assert sizes[1] == pytest.approx(120, abs=40)
    for split in SPLITS:
        assert ids(a, split) == ids(b, split)
    # A document's twin is 300 rows on, and in the same split.
    split_of = {item.index: split for split in SPLITS for item in a.items(split)}
    assert all(split_of[i] == split_of[i + 300] for i in range(300))


def test_adding_documents_moves_no_other(tmp_path: Path) -> None:
    write_task(tmp_path / "a", data={"test": documents(60)})
    write_task(tmp_path / "b", data={"test": documents(90)})
    a, b = (build(tmp_path / name, splits=FROM_TEST) for name in "ab")
    for split in SPLITS:
        assert set(ids(a, split)) < set(ids(b, split))


def test_a_task_may_override_the_splits_and_name_its_group(tmp_path: Path) -> None:
    write_task(tmp_path, data={"test": [{**row, "topic": "same"} for row in documents(30)]})
    assert "no data split 'search'; it has test" in refusal(tmp_path)
    override = {"task": "tiny", "splits": {"from": "test"}}
    assert len(build(tmp_path, override).items("search")) > 10
    assert "has no validation items" in refusal(tmp_path, {**override, "group": "topic"})
    assert "no field 'topik' (did you mean 'topic'?)" in refusal(tmp_path, {**override, "group": "topik"})


@pytest.mark.parametrize("copied", ["row", "question"])
def test_splits_that_share_a_question_are_refused_with_counts(tmp_path: Path, copied: str) -> None:
    shared = documents(3)
    if copied == "question":
        shared = [{**row, "choices": ["w", "x", "y", "z"]} for row in shared]
    write_task(tmp_path, data=data(documents(12), test=[*documents(5, 2000), *shared]))
    message = refusal(tmp_path)
    assert message.startswith(
        "search.yaml: suite.tasks.0.splits: task 'tiny': 3 of 8 test groups are search groups"
    )
    if copied == "question":
        build(tmp_path, {"task": "tiny", "group": "choices"})
    else:
        renamed = [{**row, "id": f"copy of {row['id']}"} for row in shared]
        write_task(tmp_path, data=data(documents(12), test=[*documents(5, 2000), *renamed]))
        assert "3 items are in two splits" in refusal(tmp_path, {"task": "tiny", "group": "id"})


def test_duplicates_in_a_split_count_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_task(tmp_path, data=data([*documents(6), *documents(2)]))
    with caplog.at_level(logging.WARNING, "evomerge"):
        suite = build(tmp_path)
    assert len(suite.items("search")) == suite.tasks[0].counts["search"] == 6
    assert "2 duplicates among its search items" in caplog.text


def test_limit_keeps_the_same_items_whatever_the_order(tmp_path: Path) -> None:
    rows = documents(40)
    write_task(tmp_path / "a", data=data(rows))
    write_task(tmp_path / "b", data=data(rows[::-1]))
    few = [ids(build(tmp_path / name, {"task": "tiny", "limit": 9}), "search") for name in "ab"]
    assert few[0] == few[1]
    assert len(few[0]) == 9
    more = ids(build(tmp_path / "a", {"task": "tiny", "limit": 20}), "search")
    assert set(few[0]) < set(more)
    assert set(more) < set(ids(build(tmp_path / "a"), "search"))


def test_empty_data_split(tmp_path: Path) -> None:
    write_task(tmp_path, data={**data(documents(3)), "unused": documents(2)})
    (tmp_path / "data" / "tiny_validation.jsonl").write_text("")
    assert "tiny.yaml: dataset_kwargs.data_files.validation: " in refusal(tmp_path)
    assert "holds no rows" in refusal(tmp_path)


def test_only_the_needed_splits_are_rendered_but_all_are_compared(tmp_path: Path) -> None:
    write_task(tmp_path)
    suite = build(tmp_path, splits_needed=("search",))
    assert suite.tasks[0].counts == {"search": 12, "validation": 12, "test": 12}
    with pytest.raises(ValueError, match="without its test items"):
        suite.items("test")
    write_task(tmp_path, data=data(documents(5), test=documents(5)))
    assert "5 of 5 test groups" in refusal(tmp_path, splits_needed=("search",))


def test_items_are_identified_by_what_is_asked_and_wanted(tmp_path: Path) -> None:
    def id_of(**keys: Any) -> str:
        write_task(tmp_path, **keys)
        return {item.index: item.id for item in build(tmp_path, splits_needed=("search",)).items("search")}[0]

    plain = id_of()
    other = documents(12)
    other[0] = {**other[0], "gold": 3}
    assert id_of(metadata={"version": 7}, tag="x", data={**data(documents(12))}) == plain
    assert id_of(data=data(other)) != plain
    assert id_of(target_delimiter="") != plain
    assert id_of(metric_list=[{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]) != plain


def test_the_document_of_an_item_is_the_one_at_its_index(tmp_path: Path) -> None:
    from tests.evaluation.tiny import FakeEngine

    write_task(tmp_path, data=data(documents(30)))
    suite = build(tmp_path, {"task": "tiny", "limit": 7}, splits_needed=("search",))
    assert [item.index for item in suite.items("search")] != sorted(
        item.index for item in suite.items("search")
    )
    for item in suite.items("search"):
        shown = suite.preview(FakeEngine(), item)
        row = documents(30)[item.index]
        assert row["question"] in shown.prompt
        assert shown.reference == row["choices"][row["gold"]]


@pytest.mark.parametrize("sampler", ["default", "first_n"])
def test_fewshot_prompts_are_the_same_for_every_candidate_and_worker(tmp_path: Path, sampler: str) -> None:
    from tests.evaluation.tiny import FakeEngine, whole

    shots = documents(9, 5000)
    write_task(
        tmp_path,
        data={**data(documents(12)), "shots": shots},
        fewshot_split="shots",
        num_fewshot=0,
        fewshot_config={"sampler": sampler},
    )
    asked = []
    for needed in (SPLITS, ("search",)):
        suite = build(tmp_path, {"task": "tiny", "num_fewshot": 2}, splits_needed=needed)
        for _ in range(2):
            engine = FakeEngine()
            suite.score(engine, whole(suite), check_degenerate=False)
            asked.append(engine.asked)
    assert asked[0] == asked[1] == asked[2] == asked[3]
    assert all(request.context.count("Question:") == 3 for request in asked[0])


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({}, "which holds items"),
        ({"fewshot_split": "search"}, "come from the data split 'search'"),
        ({"validation_split": "validation"}, "come from the data split 'validation'"),
        ({"fewshot_split": "copies"}, "2 few-shot examples are items too"),
        ({"fewshot_config": {"samples": documents(3, 100)}}, "few-shot examples are items too"),
        ({"fewshot_split": "few"}, "has only 1 few-shot examples, not 2"),
    ],
)
def test_fewshot_examples_that_are_items_are_refused(tmp_path: Path, keys: dict[str, Any], told: str) -> None:
    rows = {**data(documents(12), documents(12, 100)), "copies": documents(4, 10), "few": documents(1, 5000)}
    write_task(tmp_path, data=rows, **keys)
    build(tmp_path)
    assert told in refusal(tmp_path, {"task": "tiny", "num_fewshot": 2})


def test_fewshot_examples_may_be_listed(tmp_path: Path) -> None:
    write_task(tmp_path, fewshot_config={"sampler": "first_n", "samples": documents(3, 5000)})
    suite = build(tmp_path, {"task": "tiny", "num_fewshot": 2})
    assert len(suite.items("search")) == 12


def test_a_question_is_in_one_split_for_all_tasks(tmp_path: Path) -> None:
    write_task(tmp_path, "one", data={"test": documents(60)})
    write_task(tmp_path, "two", "generate", data={"test": documents(60)})
    suite = build(tmp_path, "one", "two", splits=FROM_TEST)
    for split in SPLITS:
        indices = [
            {item.index for item in suite.items(split) if item.task == task} for task in ("one", "two")
        ]
        assert indices[0] == indices[1]


def test_tasks_without_a_question_are_told_apart_by_choices_or_target(tmp_path: Path) -> None:
    write_task(tmp_path, "choice", doc_to_text="")
    write_task(tmp_path, "text", "rolling")
    suite = build(tmp_path, "choice", "text")
    assert [task.counts["search"] for task in suite.tasks] == [12, 12]


def test_a_chat_template_that_does_not_exist(tmp_path: Path, tokenizer: Any) -> None:
    write_task(tmp_path)
    assert "has no chat template" in refusal(tmp_path, tokenizer=tokenizer, chat_template=True)
