"""The screen: who answers the full suite, how the rest is ranked, and that a killed run decides the same."""

from __future__ import annotations

import math
import os
import random
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml

import evomerge
from evomerge.config import load_config
from evomerge.errors import UserError
from evomerge.schema import validate
from evomerge.searching.plan import plan_search
from evomerge.searching.progress import Silent
from evomerge.searching.ranking import rank
from evomerge.searching.screening import come_through, places
from evomerge.searching.setup import set_up
from evomerge.suite_config import Suite as SuiteConfig
from tests.searching.records import canonical
from tests.searching.test_kill import in_child
from tests.tasks import make_config

POPULATION = 6
SUITE_KEYS = {"block_items": 8, "items_per_candidate": 16}


def config_with(
    screen: object,
    folder: Path,
    family: dict[str, Path],
    tasks: Path,
    optimizer: str = "cma",
    **changes: object,
) -> Path:
    suite = {
        "include": [str(tasks)],
        "tasks": [{"task": "tiny_a", "metric": "acc"}, {"task": "tiny_b", "metric": "acc", "weight": 2.0}],
        **SUITE_KEYS,
        **({} if screen is None else {"screen": screen}),
    }
    changes = {
        "optimizer": {"type": optimizer, "population": POPULATION},
        "budget": {"candidates": 18},
        **changes,
    }
    return make_config(folder, family, tasks, suite=suite, **changes)


@pytest.mark.parametrize(
    ("keep", "parents", "wanted"),
    [(0.5, 1, 3), (0.4, 1, 3), (0.1, 3, 3), (0.01, 1, 1), (1.0, 3, 6), (0.9, 3, 6)],
)
def test_the_share_is_rounded_up_and_never_below_the_parents(keep: float, parents: int, wanted: int) -> None:
    assert places(keep, population=POPULATION, parents=parents) == wanted
    assert places(0.1, population=30, parents=1) == 3


def test_the_best_come_through_and_equal_recipes_share_their_fate() -> None:
    assert come_through([0.1, 0.9, None, 0.5], list("abcd"), 2) == [False, True, False, True]
    assert come_through([0.5, 0.5, 0.5], list("abc"), 1) == [True, False, False]
    assert come_through([0.5, 0.9, 0.5, 0.9], list("abab"), 2) == [False, True, False, True]
    assert come_through([None, None], list("ab"), 2) == [False, False]


def test_the_screened_rank_below_all_scored_and_above_failures() -> None:
    fitness = [0.2, None, None, 0.9, None, None]
    screened = [None, 0.99, 0.5, None, None, 0.5]
    assert rank(fitness, screened) == [1, 2, 3.5, 0, 5, 3.5]


def screen_scores(run: evomerge.Run) -> pd.DataFrame:
    scores = run.scores().merge(run.items()[["id", "split"]], left_on="item", right_on="id")
    return scores[scores.split == "screen"]


@pytest.mark.parametrize("optimizer", ["cma", "tpe"])
def test_a_search_with_a_screen(optimizer: str, family: dict[str, Path], tasks: Path, tmp_path: Path) -> None:
    screen = {"metric": "gold_nll", "keep": 0.3, "tasks": ["tiny_b"]}
    config = config_with(screen, tmp_path, family, tasks, optimizer)
    run = evomerge.search(config, run=tmp_path / "run", display=Silent())
    scores = screen_scores(run)
    assert set(scores.task) == {"tiny_b:screen"}
    assert (scores.raw > 0).all()
    through = 3 if optimizer == "cma" else 2
    candidates = run.candidates()
    assert set(candidates.status) == {"scored", "screened"}
    for _, generation in candidates.groupby("generation"):
        means = {
            recipe: own.value.mean()
            for recipe, own in scores[scores.recipe.isin(generation.recipe)].groupby("recipe")
        }
        # A recipe of several generations has been screened on several blocks; here none has.
        assert len(means) == generation.recipe.nunique() == POPULATION
        order = sorted(generation.index, key=lambda i: -means[generation.recipe[i]])
        scored = generation[generation.status == "scored"]
        assert set(scored.index) == set(order[:through])
        assert list(generation.loc[order[through:], "rank"]) == list(range(through, POPULATION))
        assert sorted(scored["rank"]) == list(range(through)) or scored.fitness.nunique() < through
        assert scored.fitness.notna().all()
        assert generation[generation.status == "screened"].fitness.isna().all()
    assert run.results["item_evaluations"] == len(run.scores())
    assert run.results["screened_candidates"] == 3 * (POPULATION - through)
    assert list(run.results["winner"]["test"]["tasks"]) == ["tiny_a", "tiny_b"]


def test_the_plan_and_the_budget_count_the_screen(
    family: dict[str, Path], tasks: Path, tmp_path: Path
) -> None:
    screen = {"tasks": ["tiny_a"], "keep": 0.5}
    config = config_with(screen, tmp_path, family, tasks, budget={"item_evaluations": 250})
    setup = set_up(load_config(config), file=config, weights=False)
    per_candidate = setup.items_per_candidate
    assert per_candidate == 16
    # 8 of the 16 items are of tiny_a.
    assert setup.items_per_generation(population=6, parents=3) == 3 * 16 + 6 * 8
    plan = plan_search(setup, setup.config.budget)
    assert plan.generations == 2
    assert "3 of 6 answer more than the screen" in str(plan)
    run = evomerge.search(config, run=tmp_path / "run", display=Silent())
    assert (run.scores().task == "tiny_a:screen").sum() == 2 * 6 * 8
    with pytest.raises(
        UserError, match="one generation of 6 candidates, which answers 96 items; give at least 96"
    ):
        evomerge.search(
            config, run=tmp_path / "poor", overrides=["budget.item_evaluations=95"], display=Silent()
        )


def test_keeping_everybody_is_no_screen(family: dict[str, Path], tasks: Path, tmp_path: Path) -> None:
    runs = []
    for name, screen in (("with", {"keep": 1.0}), ("without", None)):
        (tmp_path / name).mkdir()
        config = config_with(screen, tmp_path / name, family, tasks)
        runs.append(evomerge.search(config, run=tmp_path / name / "run", display=Silent()))
    tables = [canonical(run.path) for run in runs]
    for table in ("candidates", "results", "scores", "generations", "winners", "short_list"):
        assert tables[0][table] == tables[1][table]


@pytest.mark.parametrize("optimizer", ["cma", "tpe"])
def test_a_killed_run_with_a_screen_resumes_to_the_same_tables(
    optimizer: str, family: dict[str, Path], tasks: Path, tmp_path: Path
) -> None:
    config = config_with({"metric": "gold_bits_per_byte"}, tmp_path, family, tasks, optimizer)
    undisturbed = evomerge.search(config, run=tmp_path / "undisturbed", display=Silent())
    started = time.monotonic()
    evomerge.search(config, run=tmp_path / "timed", display=Silent())
    whole = time.monotonic() - started
    expected = canonical(undisturbed.path)
    assert {row[4] for row in expected["candidates"]} == {"scored", "screened"}
    moments = random.Random(optimizer)
    for attempt in range(2):
        folder = tmp_path / f"killed-{attempt}"

        def search(folder: Path = folder) -> object:
            return evomerge.search(config, run=folder, continue_=True, display=Silent())

        for _ in range(2):
            in_child(search, kill_after=moments.uniform(0.2, 0.9) * whole)
        assert os.WEXITSTATUS(in_child(search)) == 0
        assert canonical(folder) == expected


def test_another_screen_is_not_taken_for_the_recorded_one(
    family: dict[str, Path], tasks: Path, tmp_path: Path
) -> None:
    config = config_with({"metric": "gold_nll"}, tmp_path, family, tasks)
    run = evomerge.search(config, run=tmp_path / "run", display=Silent())
    resolved = run.path / "config.resolved.yaml"
    data = yaml.safe_load(resolved.read_text())
    data["suite"]["screen"]["metric"] = "gold_bits_per_byte"
    resolved.write_text(yaml.safe_dump(data))
    with pytest.raises(UserError, match="the screen items are not what they were when the run started"):
        evomerge.resume(run.path, display=Silent())


def test_a_candidate_that_fails_on_the_screen_has_failed(
    family: dict[str, Path], tasks: Path, tmp_path: Path
) -> None:
    # Their product is far outside of what float32 can hold, so that only the initial candidate has finite weights.
    weight = {"range": [-1.0, 1e30], "initial": 0.4, "per": "expert"}
    parameters = {"weight": weight, "lambda": {"range": [1.0, 1e30], "initial": 1.0}}
    space = {"method": "task_arithmetic", "parameters": parameters}
    config = config_with({}, tmp_path, family, tasks, "random", space=space, budget={"candidates": 6})
    run = evomerge.search(config, run=tmp_path / "run", display=Silent())
    candidates = run.candidates()
    failed = candidates[candidates.status == "failed"]
    assert len(failed) > 0
    assert failed.reason.notna().all()
    assert failed["rank"].min() > candidates[candidates.status != "failed"]["rank"].max()


@pytest.mark.parametrize(
    ("screen", "said"),
    [
        ({"kep": 0.5}, "search.yaml: screen: unknown key 'kep' (did you mean 'keep'?)"),
        ({"keep": 0}, "search.yaml: screen.keep: 0 is not accepted: give a number greater than 0"),
        ({"keep": 1.5}, "search.yaml: screen.keep: 1.5 is not accepted: give a number of at most 1"),
        (
            {"metric": "acc"},
            "search.yaml: screen.metric: 'acc' is not accepted: give gold_nll or gold_bits_per_byte",
        ),
        ({"tasks": []}, "search.yaml: screen.tasks: is empty; give at least 1 entry"),
    ],
)
def test_mistakes_in_the_config(screen: object, said: str) -> None:
    with pytest.raises(UserError) as caught:
        validate(SuiteConfig, {"tasks": ["x"], "screen": screen}, "search.yaml")
    assert str(caught.value) == said


def test_what_cannot_be_screened_is_refused(tmp_path: Path) -> None:
    from tests.evaluation.tiny import build, write_task

    write_task(tmp_path, "choice")
    write_task(tmp_path, "whole", "rolling")

    def refusal(*entries: object, **screen: object) -> str:
        with pytest.raises(UserError) as caught:
            build(tmp_path, *entries, screen=screen)  # type: ignore[arg-type]
        return str(caught.value)

    assert refusal("choice", tasks=["chioce"]) == (
        "search.yaml: suite.screen: tasks: no task of the suite is called 'chioce' (did you mean 'choice'?)"
    )
    assert "task 'whole' scores whole texts" in refusal("choice", "whole", tasks=["whole"])
    for entries in (["whole"], [{"task": "choice", "metric": "gold_nll"}]):
        assert "no task has reference answers besides those it is scored with" in refusal(*entries)
    suite = build(
        tmp_path, "choice", "whole", {"task": "choice", "metric": "gold_nll", "name": "gold"}, screen={}
    )
    assert suite.screen_weights == {"choice:screen": 1.0}
    by_hand = build(tmp_path, {"task": "choice", "metric": "gold_bits_per_byte"})
    assert len(suite.items("screen")) == len(by_hand.items("search"))
    assert math.isclose(sum(suite.weights.values()), 3.0)
