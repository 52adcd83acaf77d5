"""Whole searches over tiny models: what comes out, that it is repeatable, and that it is honest."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import evomerge
from evomerge.checkpoints import open_checkpoint
from evomerge.cli import main
from evomerge.errors import UserError
from evomerge.merging import live
from evomerge.searching.progress import LineDisplay, Silent, Status
from tests.merging.helpers import digests, read
from tests.models import make_model
from tests.searching.records import canonical
from tests.tasks import make_config, make_tasks


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, family: dict[str, Path], tasks: Path
) -> tuple[Path, evomerge.Run]:
    folder = tmp_path_factory.mktemp("finished")
    config = make_config(folder, family, tasks)
    return config, evomerge.search(config, run=folder / "run")


def test_results_hold_everybody_on_unseen_items(finished: tuple[Path, evomerge.Run]) -> None:
    _, run = finished
    results = run.results
    assert results["candidates"] == 12
    assert results["dimension"] == 3
    assert results["test_openings"] == 1
    everybody = {"base", "initial", "uniform", "a", "b", "c"}
    assert set(results["comparisons"]) == everybody
    for split, items in (("search", 48), ("validation", 24), ("test", 32)):
        assert results["winner"][split]["n"] == items
    winner, best = results["winner"], run.candidates().fitness.max()
    assert results["optimism"] == pytest.approx(winner["search"]["mean"] - winner["test"]["mean"])
    assert results["optimism_best_seen"] == pytest.approx(best - winner["test"]["mean"])
    by_hand = {task: results["winner"]["test"]["tasks"][task]["mean"] for task in ("tiny_a", "tiny_b")}
    assert results["winner"]["test"]["mean"] == pytest.approx((by_hand["tiny_a"] + 2 * by_hand["tiny_b"]) / 3)
    for name in everybody:
        entry = results["baselines"]["experts"].get(name) or results["baselines"][name]
        delta = results["winner"]["test"]["mean"] - entry["test"]["mean"]
        assert results["comparisons"][name]["delta"] == pytest.approx(delta)


def test_the_documentation_knows_every_key_of_the_results(finished: tuple[Path, evomerge.Run]) -> None:
    text = (Path(__file__).parents[2] / "docs" / "results.md").read_text(encoding="utf-8")
    documented = {word for span in re.findall(r"`([^`\n]+)`", text) for word in re.findall(r"\w+", span)}
    results = finished[1].results
    keys = {*results, *results["winner"], *results["comparisons"]["base"], *results["winner"]["test"]}
    keys |= set(results["winner"]["test"]["tasks"]["tiny_a"])
    assert keys - documented == set()
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    table = {key for row in rows for key in re.findall(r"`([a-z0-9_]+)`", row)}
    assert table - set(results) == set()


def test_fitness_is_the_weighted_mean_of_recorded_items(finished: tuple[Path, evomerge.Run]) -> None:
    _, run = finished
    candidates, scores = run.candidates(), run.scores()
    generation = candidates[candidates.generation == 1]
    blocks = None
    for row in generation.itertuples():
        of_recipe = scores[scores.recipe == row.recipe]
        common = set(of_recipe.block)
        blocks = common if blocks is None else blocks & common
    for row in generation.itertuples():
        mine = scores[(scores.recipe == row.recipe) & scores.block.isin(blocks)]
        means = mine.groupby("task").value.mean()
        assert row.fitness == pytest.approx((means.tiny_a + 2 * means.tiny_b) / 3)


def test_a_worker_merges_with_all_of_its_cores(
    family: dict[str, Path], tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[int] = []
    execute = live.execute

    def spied(*arguments: Any, **options: Any) -> None:
        used.append(options["threads"])
        execute(*arguments, **options)

    monkeypatch.setattr(live, "execute", spied)
    config = make_config(tmp_path, family, tasks, workers={"type": "local", "cpus": 2.5})
    evomerge.search(config, run=tmp_path / "run", overrides=["budget.candidates=4"])
    evomerge.evaluate(family["a"], config)
    assert len(used) >= 9
    assert set(used) == {2}


def test_a_small_task_beside_a_large_one_is_in_every_generation(
    family: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few, many = (
        make_tasks(tmp_path / "few", counts={"search": 3, "validation": 4, "test": 4}),
        tmp_path / "many",
    )
    make_tasks(many, counts={"search": 60, "validation": 4, "test": 4}, seed=1)
    for path in few.glob("tiny_b*"):
        path.unlink()
    for path in many.glob("tiny_a*"):
        path.unlink()
    suite = {
        "include": [str(few), str(many)],
        "tasks": [{"task": "tiny_a", "metric": "acc"}, {"task": "tiny_b", "metric": "acc"}],
        "items_per_candidate": 8,
    }
    config = make_config(tmp_path, family, few, suite=suite)
    run = evomerge.search(config, run=tmp_path / "run")
    assert len(run.candidates()) == 12
    assert run.candidates().fitness.notna().all()
    per_recipe = run.scores().groupby("recipe").task.nunique()
    assert (per_recipe == 2).all()
    capsys.readouterr()
    assert main(["plan", str(config)]) == 0
    shown = capsys.readouterr().out
    assert "each candidate answers 21 items instead of 8" in shown
    assert "'tiny_a' has 3 search items" in shown


def test_the_same_config_gives_the_same_run(finished: tuple[Path, evomerge.Run], tmp_path: Path) -> None:
    config, run = finished
    torch.rand(7)
    again = evomerge.search(config, run=tmp_path / "again")
    assert canonical(again.path) == canonical(run.path)
    assert (again.path / "recipe.yaml").read_text() == (run.path / "recipe.yaml").read_text()


def test_another_seed_gives_another_run(finished: tuple[Path, evomerge.Run], tmp_path: Path) -> None:
    config, run = finished
    other = evomerge.search(config, run=tmp_path / "other", overrides=["seed=4"])
    assert list(other.candidates().genotype) != list(run.candidates().genotype)


def test_the_exported_model_is_the_scored_one(finished: tuple[Path, evomerge.Run], tmp_path: Path) -> None:
    config, run = finished
    out = run.export(tmp_path / "model")
    assert open_checkpoint(str(out)).num_layers == 4
    scored = evomerge.evaluate(out, config, split="test")
    assert scored.score["mean"] == run.results["winner"]["test"]["mean"]
    by_recipe = evomerge.evaluate(run.path, config, split="test")
    assert by_recipe.score == scored.score


def test_the_winner_as_a_mergekit_yaml_is_the_same_model(
    finished: tuple[Path, evomerge.Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, run = finished
    model, document = run.export(tmp_path / "model"), tmp_path / "merge.yml"
    assert main(["export", str(run.path), "--out", str(document), "--format", "mergekit"]) == 0
    assert f"is in {document} as a mergekit YAML" in capsys.readouterr().out
    assert main(["merge", str(document), str(tmp_path / "again")]) == 0
    assert digests(read(tmp_path / "again")) == digests(read(model))


def test_resuming_a_finished_run_changes_nothing(finished: tuple[Path, evomerge.Run]) -> None:
    _, run = finished
    before, results = canonical(run.path), run.results
    (run.path / "results.json").unlink()
    evomerge.resume(run.path)
    assert canonical(run.path) == before
    rebuilt = run.results
    for key in ("winner", "baselines", "comparisons", "test_openings", "candidates"):
        assert rebuilt[key] == results[key]


def test_prolonging_a_finished_run_opens_the_test_items_again_and_says_so(
    finished: tuple[Path, evomerge.Run], tmp_path: Path
) -> None:
    config, _ = finished
    run = evomerge.search(config, run=tmp_path / "run", overrides=["budget.candidates=8"])
    longer = evomerge.resume(run.path, budget={"candidates": 12})
    assert longer.results["candidates"] == 12
    assert longer.results["test_openings"] == 2
    direct = evomerge.search(config, run=tmp_path / "direct")
    assert list(longer.candidates().genotype) == list(direct.candidates().genotype)
    assert list(longer.candidates().fitness) == list(direct.candidates().fitness)


@pytest.mark.parametrize("optimizer", ["tpe", "random"])
def test_other_optimisers_run_and_repeat(
    optimizer: str, family: dict[str, Path], tasks: Path, tmp_path: Path
) -> None:
    config = make_config(tmp_path, family, tasks, optimizer={"type": optimizer, "population": 4})
    first = evomerge.search(config, run=tmp_path / "first", overrides=["budget.candidates=8"])
    resumed = evomerge.resume(first.path, budget={"candidates": 12})
    direct = evomerge.search(config, run=tmp_path / "direct")
    assert list(resumed.candidates().genotype) == list(direct.candidates().genotype)


def test_a_candidate_with_non_finite_weights_fails_and_the_search_goes_on(
    family: dict[str, Path], tasks: Path, tmp_path: Path
) -> None:
    space = {
        "method": "task_arithmetic",
        "parameters": {"weight": {"range": [0.0, 1e38], "initial": 1.0, "per": "shared"}, "lambda": 1e30},
    }
    config = make_config(tmp_path, family, tasks, space=space, optimizer={"type": "random", "population": 4})
    run = evomerge.search(config, run=tmp_path / "run")
    candidates = run.candidates()
    failed = candidates[candidates.status == "failed"]
    assert len(failed) >= 3
    assert failed.fitness.isna().all()
    assert failed.reason.str.len().gt(10).all()
    assert run.results["failed_candidates"] == len(failed)
    assert run.results["winner"]["test"]["n"] == 32


def test_a_run_refuses_changed_parents_and_changed_items(
    family: dict[str, Path], tasks: Path, tmp_path: Path
) -> None:
    import shutil

    own = {name: tmp_path / name for name in family}
    for name, path in family.items():
        shutil.copytree(path, own[name])
    own_tasks = shutil.copytree(tasks, tmp_path / "tasks")
    config = make_config(tmp_path, own, own_tasks)
    run = evomerge.search(config, run=tmp_path / "run", overrides=["budget.candidates=4"])
    before = canonical(run.path)

    items = own_tasks / "tiny_a_search.jsonl"
    text = items.read_text()
    items.write_text(text.replace('"gold": 0', '"gold": 1', 1))
    with pytest.raises(UserError, match="search items are not what they were"):
        evomerge.resume(run.path, budget={"candidates": 8})
    items.write_text(text)

    make_model(own["a"], seed=99, base=own["base"])
    with pytest.raises(UserError, match="'a' is not what it was"):
        evomerge.resume(run.path, budget={"candidates": 8})
    assert canonical(run.path) == before


def test_an_existing_run_is_not_overwritten(finished: tuple[Path, evomerge.Run]) -> None:
    config, run = finished
    before = canonical(run.path)
    with pytest.raises(UserError, match="exists already"):
        evomerge.search(config, run=run.path)
    assert canonical(run.path) == before


def test_continue_refuses_another_config(finished: tuple[Path, evomerge.Run], tmp_path: Path) -> None:
    config, run = finished
    other = tmp_path / "other.yaml"
    other.write_text(config.read_text().replace("seed: 3", "seed: 5"))
    with pytest.raises(UserError, match="another config"):
        evomerge.search(other, run=run.path, continue_=True)


class Recorder(Silent):
    def __init__(self) -> None:
        self.seen: list[Status] = []

    def show(self, status: Status) -> None:
        self.seen.append(status)


def test_every_phase_tells_how_far_it_is(family: dict[str, Path], tasks: Path, tmp_path: Path) -> None:
    recorder = Recorder()
    evomerge.search(make_config(tmp_path, family, tasks), run=tmp_path / "run", display=recorder)
    totals = {"generation 1": 4 * 16, "winner on all search items": 48}
    for phase in ("generation 1", "validation", "winner on all search items", "test"):
        steps = [s for s in recorder.seen if s.phase == phase and s.phase_total]
        done = [s.phase_done for s in steps]
        assert done == sorted(done)
        assert done[-1] == steps[-1].phase_total
        assert steps[-1].phase_total == totals.get(phase, done[-1])
        assert len(set(done)) > 1
    assert recorder.seen[-1].eta_seconds == 0


def test_a_person_sees_the_plan_the_preview_and_each_generation(
    family: dict[str, Path], tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    config = make_config(tmp_path, family, tasks)
    run = evomerge.search(config, run=tmp_path / "run", display=LineDisplay(sys.stderr))
    shown = capsys.readouterr().err
    assert "3 searched numbers" in shown
    assert "give at least 45" in shown
    for words in ("generation 1", "generation 3", "median", "incumbent", "validation", "test"):
        assert words in shown
    preview = (run.path / "preview.md").read_text()
    assert preview.count("### tiny_a") == 4
    status = json.loads((run.path / "status.json").read_text())
    assert status["state"] == "done"
    assert status["candidates"] == 12
    events = [json.loads(line)["event"] for line in (run.path / "log.jsonl").read_text().splitlines()]
    assert events[0] == "created"
    assert events.count("generation") == 3
