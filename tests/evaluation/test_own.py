"""Scoring by a function of the user's: what it is given, what it may return, and what happens to its mistakes."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from evomerge.engines.hf import HFEngine
from evomerge.errors import CandidateFailed, EngineLost, UserError
from evomerge.evaluation.model import Model
from evomerge.evaluation.requests import Generation, Loglikelihood, Rolling
from evomerge.evaluation.suite import Suite
from evomerge.schema import validate
from evomerge.suite_config import Suite as SuiteConfig
from tests.evaluation.tiny import NAMED, FakeEngine, whole, write_jsonl

ROWS = [{"id": i, "prompt": f"Say {i}.", "wanted": str(i % 7), "topic": f"t{i % 5}"} for i in range(60)]


class Folder:
    """A folder with a module and items, and the suites made of them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        write_jsonl(path / "items.jsonl", ROWS)

    def write(self, code: str, module: str = "scoring") -> None:
        file = self.path / (module.replace(".", "/") + ".py")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(code)

    def suite(self, function: str = "scoring:score", tokenizer: Any = None, **keys: Any) -> Suite:
        items = keys.pop("items", str(self.path / "items.jsonl"))
        trust = keys.pop("trust_task_code", True)
        entry = {"python": function, "items": items, "folder": str(self.path), **keys}
        config = validate(SuiteConfig, {"tasks": [entry], "trust_task_code": trust}, "search.yaml")
        return Suite.build(config, NAMED, tokenizer, file="search.yaml")

    def score(self, code: str, engine: Any = None, **keys: Any) -> Any:
        self.write(code)
        suite = self.suite(**keys)
        scores = suite.score(engine or FakeEngine(), whole(suite))
        index = {item.id: item.index for item in suite.items("search")}
        return {index[score.item]: score for score in scores}

    def refusal(self, code: str | None = None, engine: Any = None, **keys: Any) -> str:
        def act() -> Any:
            return self.suite(**keys) if code is None else self.score(code, engine, **keys)

        with pytest.raises(UserError) as caught:
            act()
        return str(caught.value)


@pytest.fixture
def folder(tmp_path: Path) -> Any:
    before = set(sys.modules)
    yield Folder(tmp_path)
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("scoring", "helpers", "package", "uses"):
            del sys.modules[name]


GENERATES = """
def score(model, items):
    answers = model.generate([item["prompt"] for item in items], max_tokens=4, stop=["\\n"])
    return [1.0 if answer == item["wanted"] else 0.25 for answer, item in zip(answers, items)]
"""


def test_a_function_scores_each_item(folder: Folder) -> None:
    engine = FakeEngine(text=lambda r: "3")
    scores = folder.score(GENERATES, engine)
    assert all(score.value == score.raw == (1.0 if i % 7 == 3 else 0.25) for i, score in scores.items())
    assert {r.context for r in engine.asked} == {ROWS[i]["prompt"] for i in scores}
    assert {(r.stops, r.max_tokens) for r in engine.asked} == {(("\n",), 4)}
    (task,) = folder.suite().tasks
    assert (task.name, task.metric, task.output_type, task.higher_is_better) == (
        "score",
        "score",
        "python",
        True,
    )
    assert sum(task.counts.values()) == 60
    assert folder.suite(name="style", weight=3).weights == {"style": 3.0}


@pytest.mark.parametrize(
    "expression",
    ["[i['id'] / 100 for i in items]", "tuple(i['id'] / 100 for i in items)", "(i['id'] / 100 for i in items)",
     "numpy.array([i['id'] / 100 for i in items])", "torch.tensor([i['id'] / 100 for i in items]).double()",
     "[{'score': i['id'] / 100, 'answer': 'x'} for i in items]"],
)  # fmt: skip
def test_what_counts_as_a_list_of_scores(folder: Folder, expression: str) -> None:
    scores = folder.score(f"import numpy, torch\ndef score(model, items): return {expression}\n")
    assert {i: score.value for i, score in scores.items()} == pytest.approx({i: i / 100 for i in scores})


def test_truth_values_are_scores(folder: Folder) -> None:
    scores = folder.score("def score(model, items): return [item['id'] % 2 == 0 for item in items]\n")
    assert {i: score.value for i, score in scores.items()} == {i: float(i % 2 == 0) for i in scores}


def test_the_models_answers_are_the_engines(folder: Folder, model: Any, tokenizer: Any) -> None:
    engine = HFEngine(model, tokenizer, batch_tokens=300)
    asked = Model(engine, tokenizer)
    prompts = ["one", "two and three", ""]
    generations = [Generation(prompt, ("e",), 5) for prompt in prompts]
    assert asked.generate(prompts, max_tokens=5, stop="e") == [a.text for a in engine.generate(generations)]
    pairs = [("a", " b c"), ("", "whole")]
    wanted = [logprob for logprob, _ in engine.loglikelihood([Loglikelihood(*pair) for pair in pairs])]
    assert asked.loglikelihood(pairs) == wanted
    texts = ["naïve text", "b"]
    rolled = engine.loglikelihood_rolling([Rolling(text) for text in texts])
    sizes = [len(text.encode()) for text in texts]
    expected = [-logprob / size / math.log(2) for logprob, size in zip(rolled, sizes, strict=True)]
    assert asked.bits_per_byte(texts) == pytest.approx(expected)
    assert asked.generate([]) == asked.loglikelihood([]) == asked.bits_per_byte([]) == []
    assert asked.tokenizer is tokenizer
    asked.close()
    with pytest.raises(RuntimeError, match="while the scoring function runs"):
        asked.generate(["x"])


@pytest.mark.parametrize(
    ("expression", "said"),
    [
        ("[0.5]", "returned 1 scores for {n} items; return one for each"),
        ("[0.5] * 99", "returned 99 scores for {n} items; return one for each"),
        ("['x'] * len(items)", "returned 'x' for item 0 of its list; a score is a number from 0 to 1"),
        (
            "[0.5] * (len(items) - 1) + [None]",
            "returned None for item {last} of its list; a score is a number",
        ),
        (
            "[float('nan')] * len(items)",
            "returned nan for item 0 of its list; a score is a number from 0 to 1",
        ),
        ("[1.5] * len(items)", "returned 1.5 for item 0 of its list; a score is a number from 0 to 1"),
        ("[-0.1] * len(items)", "returned -0.1 for item 0 of its list; a score is a number from 0 to 1"),
        (
            "[{'answer': 'x'}] * len(items)",
            "returned {{'answer': 'x'}} for item 0 of its list; a mapping needs the",
        ),
        ("[[0.5]] * len(items)", "returned [0.5] for item 0 of its list; a score is a number from 0 to 1"),
        ("0.5", "fails: TypeError: it returned 0.5, not a list of scores"),
        ("None", "fails: TypeError: it returned None, not a list of scores"),
        ("'0.5'", "fails: TypeError: it returned '0.5', not a list of scores"),
        ("{'score': 1}", "fails: TypeError: it returned {{'score': 1}}, not a list of scores"),
        ("[item['gold'] for item in items]", "fails in {file}, line 2: KeyError: 'gold'"),
        ("exit(1)", "fails in {file}, line 2: SystemExit: 1"),
        (
            "model.generate('a')",
            "fails in {file}, line 2: TypeError: prompts is a list of texts, not a single one",
        ),
        (
            "model.generate([3])",
            "fails in {file}, line 2: TypeError: prompts is a list of texts; 3 is not one",
        ),
        (
            "model.generate(['a'], max_tokens=0)",
            "fails in {file}, line 2: ValueError: max_tokens is a whole number",
        ),
        ("model.loglikelihood(['ab'])", "fails in {file}, line 2: TypeError: each of the pairs is two texts"),
        (
            "model.loglikelihood([('a', 3)])",
            "fails in {file}, line 2: TypeError: each of the pairs is two texts",
        ),
        ("model.bits_per_byte('a')", "fails in {file}, line 2: TypeError: texts is a list of texts"),
    ],
)
def test_a_mistake_of_the_function_is_told_and_never_a_score(
    folder: Folder, expression: str, said: str
) -> None:
    message = folder.refusal(f"def score(model, items):\n    return {expression}\n")
    count = len(folder.suite().items("search"))
    wanted = said.format(n=count, last=count - 1, file=folder.path / "scoring.py")
    assert message.startswith(f"task 'score': scoring:score {wanted}")
    assert "\n" not in message


def test_what_the_engine_says_passes_even_through_a_function_that_catches_it(folder: Folder) -> None:
    catches = """
def score(model, items):
    try:
        model.loglikelihood([(item["prompt"], " x") for item in items])
        model.generate([item["prompt"] for item in items])
    except Exception as error:
        {what}
    return [0.0] * len(items)
"""
    for what in ("pass", "raise ValueError('mine')"):
        folder.write(catches.format(what=what))
        suite = folder.suite()
        for bad in (math.nan, -math.inf):
            with pytest.raises(CandidateFailed, match="a log-probability is not finite"):
                suite.score(FakeEngine(lambda r, bad=bad: bad), whole(suite))

        def lose(request: Generation) -> str:
            raise EngineLost("gone")

        with pytest.raises(EngineLost, match="gone"):
            suite.score(FakeEngine(text=lose), whole(suite))


def test_memory_that_runs_out_is_no_mistake_of_the_function(folder: Folder) -> None:
    folder.write("def score(model, items): raise MemoryError('full')\n")
    suite = folder.suite()
    with pytest.raises(MemoryError):
        suite.score(FakeEngine(), whole(suite))


def test_items_are_copies(folder: Folder) -> None:
    folder.write("""
def score(model, items):
    known = all(set(item) == {"id", "prompt", "wanted", "topic"} for item in items)
    for item in items:
        item.clear()
    return [known] * len(items)
""")
    suite = folder.suite()
    for _ in range(2):
        assert {score.value for score in suite.score(FakeEngine(), whole(suite))} == {1.0}


def test_modules_beside_the_config_are_found_and_the_path_is_left_alone(folder: Folder) -> None:
    folder.write("HALF = 0.5\n", "helpers")
    folder.write("from helpers import HALF\n", "package.__init__")
    folder.write("""
import package

def score(model, items):
    from package import late
    return [package.HALF + late.QUARTER] * len(items)
""", "package.scores")  # fmt: skip
    folder.write("QUARTER = 0.25\n", "package.late")
    path = list(sys.path)
    suite = folder.suite("package.scores:score")
    assert sys.path == path
    assert {score.value for score in suite.score(FakeEngine(), whole(suite))} == {0.75}
    assert sys.path == path
    assert not list(folder.path.glob("**/__pycache__"))


def test_a_changed_module_is_imported_anew_and_changes_the_items(folder: Folder, tmp_path: Path) -> None:
    folder.write("def score(model, items): return [0.1] * len(items)\n")
    first = folder.suite()
    assert folder.suite().sha256("search") == first.sha256("search")
    folder.write("def score(model, items): return [0.2] * len(items)\n")
    second = folder.suite()
    assert {score.value for score in first.score(FakeEngine(), whole(first))} == {0.1}
    assert {score.value for score in second.score(FakeEngine(), whole(second))} == {0.2}
    assert not {item.id for item in first.items("search")} & {item.id for item in second.items("search")}
    assert {i.index for i in first.items("search")} == {i.index for i in second.items("search")}
    other = Folder(tmp_path / "other")
    other.write("def score(model, items): return [0.3] * len(items)\n")
    third = other.suite()
    assert {score.value for score in third.score(FakeEngine(), whole(third))} == {0.3}


def test_an_unchanged_module_is_imported_once(folder: Folder) -> None:
    folder.write(
        "COUNT = []\ndef score(model, items):\n    COUNT.append(1)\n    return [len(COUNT) / 10] * len(items)\n"
    )
    for wanted in (0.1, 0.2, 0.3):
        suite = folder.suite()
        assert {score.value for score in suite.score(FakeEngine(), whole(suite))} == {wanted}


def test_rows_of_a_group_stay_in_one_split(folder: Folder) -> None:
    folder.write("def score(model, items): return [0.5] * len(items)\n")
    rows = [{**row, "topic": f"t{row['id'] % 20}"} for row in ROWS]
    write_jsonl(folder.path / "items.jsonl", rows)
    suite = folder.suite(group="topic")
    topics = [
        {rows[item.index]["topic"] for item in suite.items(s)} for s in ("search", "validation", "test")
    ]
    assert sum(map(len, topics)) == len(set().union(*topics))


def test_three_files(folder: Folder) -> None:
    for start, split in enumerate(("search", "validation", "test")):
        write_jsonl(folder.path / f"{split}.jsonl", ROWS[start * 20 : start * 20 + 20 - start])
    files = {split: str(folder.path / f"{split}.jsonl") for split in ("search", "validation", "test")}
    folder.write("def score(model, items): return [0.5] * len(items)\n")
    assert folder.suite(items=files).tasks[0].counts == {"search": 20, "validation": 19, "test": 18}


def test_the_preview_shows_the_item_and_the_answer(folder: Folder) -> None:
    folder.write(
        "def score(model, items): return [{'score': 0.5, 'answer': item['wanted']} for item in items]\n"
    )
    suite = folder.suite()
    item = suite.items("search")[0]
    shown = suite.preview(FakeEngine(), item)
    row = ROWS[item.index]
    assert (json.loads(shown.prompt), shown.answer, shown.raw) == (row, row["wanted"], 0.5)


def test_misuse_is_told_before_anything_runs(folder: Folder) -> None:
    marker = folder.path / "ran"
    folder.write(f"open({str(marker)!r}, 'w').close()\ndef score(model, items): ...\nx = 3\n")
    assert folder.refusal(trust_task_code=False) == (
        "search.yaml: suite.trust_task_code: task 'score' calls Python (scoring:score); read it, then set "
        "suite.trust_task_code: true"
    )
    assert not marker.exists()
    place = "search.yaml: suite.tasks.0: task '{}': "
    assert folder.refusal(function="scorng:score") == (
        f"{place.format('score')}there is no module 'scorng', neither in {folder.path} nor installed; "
        "put scorng.py there"
    )
    assert folder.refusal(function="scoring:scor") == (
        f"{place.format('scor')}the module 'scoring' has no function 'scor' (did you mean 'score'?)"
    )
    assert folder.refusal(function="scoring:x").startswith(
        f"{place.format('x')}the module 'scoring' has no function"
    )
    folder.write("import nothing_of_this_name\n")
    assert folder.refusal() == (
        f"{place.format('score')}importing scoring fails in {folder.path / 'scoring.py'}, line 1: "
        "ModuleNotFoundError: No module named 'nothing_of_this_name'"
    )
    folder.write("def score(model, items)\n")
    assert folder.refusal().startswith(
        f"{place.format('score')}importing scoring fails: SyntaxError: expected ':'"
    )
    folder.write("def score(model, items): ...\n")
    assert folder.refusal(group="tpic").endswith("has no field 'tpic' (did you mean 'topic'?); it has id, prompt, "
                                                 "wanted, topic")  # fmt: skip
    text = folder.path / "items.txt"
    text.write_text("x")
    assert (
        folder.refusal(items=str(text))
        == f"{text}: items are rows of a JSONL file; one whose name ends in .jsonl"
    )
    for wrong in ("scoring", "scoring.score", "./scoring.py:score", "scoring:"):
        assert folder.refusal(function=wrong).startswith(
            f"search.yaml: tasks.0.python: '{wrong}' is not accepted: write module:function, e.g. scoring:score"
        )
    with pytest.raises(UserError, match=r"search\.yaml: tasks\.0\.items: this key is required"):
        validate(SuiteConfig, {"tasks": [{"python": "a:b"}]}, "search.yaml")
    assert folder.refusal(itms="x") == "search.yaml: tasks.0: unknown key 'itms' (did you mean 'items'?)"
