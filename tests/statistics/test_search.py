"""Searches over methods that need data: what the texts are, and that they are looked at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import evomerge
from evomerge.config import load_config
from evomerge.errors import UserError
from evomerge.recipe import load_recipe
from evomerge.searching.setup import set_up
from evomerge.statistics import collect
from tests.statistics.helpers import write_texts
from tests.tasks import COUNTS, make_config, make_tasks

WEIGHT = {"weight": {"range": [0.0, 1.5], "initial": 1.0, "per": "expert"}}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tasks(tmp_path_factory.mktemp("tasks") / "tasks")


def config_of(folder: Path, family: dict[str, Path], tasks: Path, data: Any, method: str = "regmean") -> Path:
    space = {"method": method, "parameters": WEIGHT}
    if data is not None:
        space["data"] = data
    return make_config(folder, family, tasks, space=space, budget={"candidates": 4})


def test_a_search_computes_the_statistics_once_and_its_recipe_can_be_merged(
    tmp_path: Path, family: dict[str, Path], tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[str] = []
    real = collect.kept_statistics

    def counted(*arguments: Any, **options: Any) -> Any:
        computed.append(arguments[2])
        return real(*arguments, **options)

    monkeypatch.setattr(collect, "kept_statistics", counted)
    write_texts(tmp_path / "texts.jsonl")
    data = {
        "texts": {"a": {"task": "tiny_a"}, "b": {"task": "tiny_b"}, "c": "./texts.jsonl"},
        "samples": 8,
    }
    run = evomerge.search(config_of(tmp_path, family, tasks, data, "fisher"), run=tmp_path / "run")
    assert sorted(computed) == ["a", "b", "c"]
    assert run.results["candidates"] == 4
    recipe = load_recipe(tmp_path / "run" / "recipe.yaml")
    if recipe.main.needs:
        assert recipe.main.data.file_of("c").file == str(tmp_path / "texts.jsonl")
        run.export(tmp_path / "out")
        assert sorted(computed) == ["a", "b", "c"]


def test_a_tasks_texts_are_the_prompts_and_answers_of_its_search_items(
    tmp_path: Path, family: dict[str, Path], tasks: Path
) -> None:
    file = config_of(tmp_path, family, tasks, {"texts": {"task": "tiny_a"}})
    setup = set_up(load_config(file), file=file)
    recipe = setup.space.decode(setup.space.initial)
    texts = recipe.main.data.file_of("b")
    assert (texts.key, texts.prompt) == ("text", "prompt")
    lines = [json.loads(line) for line in Path(texts.file).read_text().splitlines()]
    expected = {}
    for split in COUNTS:
        rows = [json.loads(line) for line in (tasks / f"tiny_a_{split}.jsonl").read_text().splitlines()]
        expected[split] = {(row["prompt"], row["choices"][row["gold"]]) for row in rows}
    assert {(line["prompt"], line["text"]) for line in lines} == expected["search"]
    assert len(lines) == COUNTS["search"]
    again = set_up(load_config(file), file=file)
    assert again.space.decode(again.space.initial).hash == recipe.hash


@pytest.mark.parametrize(
    ("method", "data", "message"),
    [
        ("fisher", None, r"space: fisher needs data for every expert"),
        ("regmean", {"texts": {"a": "x"}}, r"space\.data\.texts: the input 'b' has none"),
        (
            "regmean",
            {"texts": {"task": "tiny"}},
            r"no task of the suite is called 'tiny' \(did you mean 'tiny_",
        ),
        (
            "regmean++",
            {"texts": "x"},
            r"space\.method: regmean\+\+ cannot be searched: .* search regmean, or",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, family: dict[str, Path], tasks: Path, method: str, data: Any, message: str
) -> None:
    file = config_of(tmp_path, family, tasks, data, method)
    with pytest.raises(UserError, match=message):
        set_up(load_config(file), file=file, weights=False)


def test_paths_are_relative_to_the_config(tmp_path: Path, family: dict[str, Path], tasks: Path) -> None:
    file = config_of(tmp_path, family, tasks, {"texts": "texts.jsonl"})
    config = load_config(file)
    assert config.space.data.file_of("a").file == str(tmp_path / "texts.jsonl")
    with pytest.raises(UserError, match=r"texts\.jsonl: no such file of texts"):
        set_up(config, file=file)
    assert yaml.safe_load(config.to_yaml())["space"]["data"]["samples"] == 256


def test_a_recipe_has_no_tasks(family: dict[str, Path]) -> None:
    with pytest.raises(
        UserError, match=r"data\.texts: a recipe has no tasks, 'gsm8k' is none of its; name a file"
    ):
        evomerge.Recipe.from_dict(
            {
                "models": {"a": str(family["a"])},
                "merges": {"m": {"method": "regmean", "inputs": ["a"], "data": {"texts": {"task": "gsm8k"}}}},
            }
        )
