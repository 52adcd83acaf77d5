"""Task files: where they are found, what they may do, and which mistakes are told."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from evomerge.errors import UserError
from evomerge.evaluation.library import Index
from tests.evaluation.tiny import build, documents, write_jsonl, write_task

BOOM = "def boom(*args, **kwargs):\n    pass\n\n\nraise RuntimeError('this code ran')\n"


def refusal(folder: Path, *tasks: Any, **keys: Any) -> str:
    with pytest.raises(UserError) as caught:
        build(folder, *tasks, **keys)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_unknown_task_names_the_nearest_and_the_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evomerge.evaluation.library.lm_eval_index", lambda: Index({"arc_easy": ["x"]}))
    write_task(tmp_path, "multiplication")
    message = refusal(tmp_path, "multiplicaton")
    assert message.startswith("search.yaml: suite.tasks.0.task: unknown task 'multiplicaton'")
    assert "did you mean 'multiplication'?" in message
    assert str(tmp_path) in message


def test_lm_evals_own_index_is_made_only_for_names_that_no_folder_defines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow() -> Any:
        raise AssertionError("the slow index was made")

    monkeypatch.setattr("evomerge.evaluation.library.lm_eval_index", slow)
    write_task(tmp_path)
    build(tmp_path)
    with pytest.raises(AssertionError, match="slow index"):
        build(tmp_path, "arc_easy")


def test_two_definitions_of_one_name(tmp_path: Path) -> None:
    write_task(tmp_path / "a")
    write_task(tmp_path / "b")
    assert "defined twice" in refusal(tmp_path)


def test_missing_include_folder(tmp_path: Path) -> None:
    assert "suite.include: " in refusal(tmp_path / "nowhere")


def test_a_broken_yaml_is_told_for_its_own_task_only(tmp_path: Path) -> None:
    write_task(tmp_path)
    (tmp_path / "broken.yaml").write_text("task: other\nmetric_list: [\n")
    build(tmp_path)
    assert "broken.yaml: not a valid task YAML" in refusal(tmp_path, "other")


def test_includes_are_merged_and_data_files_are_relative_to_the_yaml_that_names_them(tmp_path: Path) -> None:
    write_task(tmp_path / "shared" / "deep", "base")
    (tmp_path / "shared" / "deep" / "base.yaml").rename(tmp_path / "shared" / "deep" / "base")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "mine.yaml").write_text("include: ../shared/deep/base\ntask: mine\n")
    suite = build(tmp_path / "tasks", "mine")
    assert suite.tasks[0].counts == {"search": 12, "validation": 12, "test": 12}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("include: a.yaml\ntask: a\n", "include one another"),
        ("include: gone\ntask: a\n", "gone: cannot be read"),
        ("task: a\nx: !!python/name:os.system\n", "not a valid task YAML"),
    ],
)
def test_yaml_that_cannot_be_used(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    assert told in refusal(tmp_path, "a")


@pytest.mark.parametrize("nested", [False, True])
def test_python_in_task_files_is_never_run_without_trust(tmp_path: Path, nested: bool) -> None:
    path = write_task(tmp_path)
    (tmp_path / "code.py").write_text(BOOM)
    if nested:
        (tmp_path / "common").write_text("process_docs: !function code.boom\n")
        # Overridden by the task's own key: never run here, and yet lm-eval would import it.
        path.write_text("include: common\nprocess_docs: null\n" + path.read_text())
    else:
        path.write_text(path.read_text() + "process_docs: !function code.boom\n")
    message = refusal(tmp_path)
    assert message.startswith(
        "search.yaml: suite.trust_task_code: task 'tiny' calls Python (!function code.boom in "
    )
    assert "set suite.trust_task_code: true" in message
    if nested:
        build(tmp_path, trust_task_code=True)
    else:
        assert "this code ran" in refusal(tmp_path, trust_task_code=True)


@pytest.mark.parametrize(
    "line",
    [
        "class: !function code.boom",
        "custom_dataset: !function code.boom",
        "use_prompt: promptsource:x",
        "description: \"{{ ''.__class__.__mro__ }}\"",
        "metric_list: [{metric: !function code.boom}]",
    ],
)
def test_other_ways_to_python_need_trust_too(tmp_path: Path, line: str) -> None:
    path = write_task(tmp_path, drop=("metric_list",) if line.startswith("metric") else ())
    (tmp_path / "code.py").write_text(BOOM)
    path.write_text(path.read_text() + line + "\n")
    assert "suite.trust_task_code: true" in refusal(tmp_path)


@pytest.mark.parametrize(
    "template",
    [
        "{{ prompt.__class__ }}",
        r'{{ prompt|attr("\x5f\x5fclass\x5f\x5f") }}',
        r'{{ prompt["\x5f\x5fclass\x5f\x5f"] }}',
        '{{ prompt["_" ~ "_class_" ~ "_"] }}',
        "{{ prompt|attr(name) }}",
    ],
)
def test_a_template_that_reaches_for_pythons_internals_needs_trust(tmp_path: Path, template: str) -> None:
    write_task(tmp_path, doc_to_text=template)
    assert "suite.trust_task_code: true" in refusal(tmp_path)


def test_trusted_python_is_used(tmp_path: Path) -> None:
    path = write_task(tmp_path)
    (tmp_path / "code.py").write_text("def half(docs):\n    return docs.select(range(6))\n")
    path.write_text(path.read_text() + "process_docs: !function code.half\n")
    assert build(tmp_path, trust_task_code=True).tasks[0].counts == {"search": 6, "validation": 6, "test": 6}


@pytest.mark.parametrize("keys", [{"unsafe_code": True}, {"metric_list": [{"metric": "code_eval"}]}])
def test_tasks_that_execute_generated_code_need_permission(tmp_path: Path, keys: dict[str, Any]) -> None:
    write_task(tmp_path, kind="generate", **keys)
    assert "suite.allow_code_execution: true" in refusal(tmp_path)


def test_allowed_code_execution(tmp_path: Path) -> None:
    write_task(tmp_path, kind="generate", unsafe_code=True)
    build(tmp_path, allow_code_execution=True)


def test_a_metric_that_only_the_hub_has(tmp_path: Path) -> None:
    write_task(tmp_path, metric_list=[{"metric": "rouge_of_someone"}])
    assert "'rouge_of_someone' is not one of lm-eval's own metrics" in refusal(tmp_path)


def test_missing_and_remote_data_files(tmp_path: Path) -> None:
    path = write_task(tmp_path)
    (tmp_path / "data" / "tiny_search.jsonl").unlink()
    assert "dataset_kwargs.data_files.search: " in refusal(tmp_path)
    path.write_text(path.read_text().replace("data/tiny_search.jsonl", "https://example.org/x.jsonl"))
    assert "data files are local" in refusal(tmp_path)


def test_malformed_data(tmp_path: Path) -> None:
    write_task(tmp_path)
    (tmp_path / "data" / "tiny_search.jsonl").write_text('{"question": "x"\n')
    assert "cannot load the data of 'json'" in refusal(tmp_path)


def test_an_edited_file_with_its_old_time_and_size_is_seen(tmp_path: Path) -> None:
    write_task(tmp_path)
    before = build(tmp_path)
    path = tmp_path / "data" / "tiny_search.jsonl"
    times = path.stat()
    rows = documents(12, 0)
    rows[3]["question"] = rows[3]["question"].replace("What", "Whom")
    write_jsonl(path, rows)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert path.stat().st_size == times.st_size
    after = build(tmp_path)
    changed = {item.index for item in after.items("search")} - {
        item.index for item in after.items("search") if item in before.items("search")
    }
    assert changed == {3}


def test_overrides_that_do_not_fit(tmp_path: Path) -> None:
    write_task(tmp_path)
    assert "generates nothing" in refusal(tmp_path, {"task": "tiny", "gen_kwargs": {"until": ["x"]}})


@pytest.mark.parametrize(
    ("kwargs", "told"),
    [
        ({"do_sample": True}, "would sample"),
        ({"do_sample": None, "temperature": 0.7}, "generation_kwargs.temperature: 0.7 would sample"),
        ({"num_beams": 4}, "generation_kwargs.num_beams: not supported"),
        ({"max_gen_toks": 0}, "at least one token"),
    ],
)
def test_generation_that_is_not_greedy_is_refused(tmp_path: Path, kwargs: dict[str, Any], told: str) -> None:
    write_task(tmp_path, kind="generate")
    assert told in refusal(tmp_path, {"task": "tiny", "gen_kwargs": kwargs})


def test_settings_that_change_nothing_about_greedy_answers_are_taken(tmp_path: Path) -> None:
    write_task(tmp_path, kind="generate")
    plain = build(tmp_path)
    kwargs = {"num_beams": 1, "do_sample": False, "temperature": 1}
    suite = build(tmp_path, {"task": "tiny", "gen_kwargs": kwargs})
    assert {*suite.requests()} == {*plain.requests()}


def test_a_class_that_loads_its_data_itself_is_refused_as_such(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("task: tiny\nclass: !function code.Mine\n")
    (tmp_path / "code.py").write_text("class Mine:\n    pass\n")
    said = refusal(tmp_path, trust_task_code=True)
    assert said.startswith(
        "search.yaml: suite.tasks.0.task: task 'tiny' is a Python class that loads its data"
    )
    assert refusal(tmp_path).startswith("search.yaml: suite.trust_task_code: ")
