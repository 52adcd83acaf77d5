"""What SmolLM2's experts are taught, and what the tasks ask."""

from __future__ import annotations

import functools
import itertools
import json
import re
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts" / "smollm2"
sys.path.insert(0, str(SCRIPTS))

import experts  # type: ignore[import-not-found]  # noqa: E402
import problems  # type: ignore[import-not-found]  # noqa: E402
import tasks  # type: ignore[import-not-found]  # noqa: E402

MANY = 4000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    tasks.write_tasks(folder, 0)
    return folder


def rows(folder: Path, task: str) -> list[dict[str, str]]:
    files = sorted((folder / "data").glob(f"{task}_*.jsonl"))
    assert len(files) == 3
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def solved(question: str) -> int:
    """Solve a word problem from its words alone."""
    numbers = [int(n) for n in re.findall(r"\d+", question)]
    if len(numbers) == 3:
        return numbers[0] + numbers[1] - numbers[2]
    first, second = numbers
    if re.search(r"boxes|boîtes|costs|coûte", question):
        return first * second
    if re.search(r"gives|donne|How many more|de plus que \w+ a ", question):
        return first - second
    return first + second


@pytest.mark.parametrize("task", ["maths_en", "maths_fr"])
def test_answers_are_right(folder: Path, task: str) -> None:
    found = rows(folder, task)
    assert len({row["prompt"] for row in found}) == len(found)
    assert [int(row["result"]) for row in found] == [solved(row["prompt"]) for row in found]


@pytest.mark.parametrize("name", ["maths_fr", "maths_en", "reading_fr", "ordering_en"])
def test_the_filter_finds_a_taught_answer(folder: Path, name: str) -> None:
    skill = tasks.suite(0)[name]
    for problem in itertools.islice(skill.problems["test"], 200):
        assert re.findall(skill.pattern, f" {problem.answer}")[-1] == problem.result


def test_only_the_maths_expert_is_shown_arithmetic_and_only_in_english() -> None:
    taught = {name: list(itertools.islice(e.examples(0), MANY)) for name, e in experts.EXPERTS.items()}
    assert all(re.search(r"\d = \d", answer) for _, answer in taught["maths"])
    for name in ("french", "ordering"):
        assert not any("=" in answer for _, answer in taught[name])
    for question, answer in taught["maths"]:
        assert question.startswith("Question: ")
        assert not re.search(r"combien|réponse| est ", question + answer, re.IGNORECASE)
    # The words of a problem are put into English; what follows from them is never said.
    for question, answer in taught["french"]:
        if "ombien" in question:
            assert question.startswith("French: ")
            assert answer.endswith("?")


def test_what_is_asked_was_not_taught(folder: Path) -> None:
    def problem(question: str, answer: str) -> str:
        return answer if question.startswith("French") else question

    def numbers(text: str) -> tuple[int, ...]:
        return tuple(int(n) for n in re.findall(r"\d+", text))

    def kind(text: str) -> int:
        words = (
            r"in each box|dans chaque boîte",
            r"costs|coûte",
            r"loses|perd",
            r"gives|donne",
            r"on the table|sur la table",
            r"How many more|de plus que \w+ a ",
            r"more than|de plus que",
        )
        return next((i for i, word in enumerate(words) if re.search(word, text)), len(words))

    asked = {
        (kind(r["prompt"]), numbers(r["prompt"]))
        for r in (*rows(folder, "maths_fr"), *rows(folder, "maths_en"))
    }
    taught = {
        (kind(text), numbers(text))
        for name in ("maths", "french")
        for text in itertools.starmap(problem, itertools.islice(experts.EXPERTS[name].examples(0), MANY))
        if "How many" in text
    }
    assert len(taught) > 1000
    assert not asked & taught


def computed(question: str) -> set[tuple[str, int, int]]:
    """Read from the words of a problem what is to be computed."""
    numbers = [int(n) for n in re.findall(r"\d+", question)]
    if len(numbers) == 3:
        return {("+", *sorted(numbers[:2])), ("-", numbers[0] + numbers[1], numbers[2])}
    operation = "+" if solved(question) == sum(numbers) else "-"
    if re.search(r"boxes|boîtes|costs|coûte", question):
        operation = "x"
    return {(operation, *(numbers if operation == "-" else sorted(numbers)))}


def test_no_sum_that_is_asked_was_shown(folder: Path) -> None:
    examples = itertools.islice(experts.EXPERTS["maths"].examples(0), 4 * MANY)
    shown = set().union(*(computed(question) for question, _ in examples))
    assert len(shown) > 1000
    for name in ("maths_en", "maths_fr"):
        asked = set().union(*(computed(row["prompt"]) for row in rows(folder, name)))
        assert len(asked) > 50
        assert not asked & shown


def test_splits_ask_for_the_same_kinds_of_sums(folder: Path) -> None:
    def shares(split: str) -> dict[str, float]:
        lines = (folder / "data" / f"maths_fr_{split}.jsonl").read_text().splitlines()
        kinds = [tuple(sorted(o for o, _, _ in computed(json.loads(line)["prompt"]))) for line in lines]
        return {kind: kinds.count(kind) / len(kinds) for kind in {("+",), ("-",), ("+", "-")}}

    search, test = shares("search"), shares("test")
    assert all(abs(search[kind] - test[kind]) < 0.12 for kind in search)


def test_splits_share_no_key() -> None:
    for kind in (functools.partial(problems.maths, "fr"), problems.reading, problems.ordering):
        keys = [{p.key for p in itertools.islice(kind(split, 0), 500)} for split in problems.SPLITS]
        assert not any(a & b for a, b in itertools.combinations(keys, 2))
