"""Searches over layer paths: run, killed and resumed, exported."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch

import evomerge
from evomerge.cli import main
from evomerge.config import load_config
from evomerge.errors import UserError
from evomerge.merging import merge, paths
from evomerge.searching import generations
from evomerge.searching.phases import plan_phases
from evomerge.searching.progress import Silent, Status, sentence
from evomerge.searching.ranking import fitness_of
from evomerge.searching.results import summary, verdict
from evomerge.searching.setup import set_up
from evomerge.searching.store import Store
from tests.merging.helpers import error
from tests.merging.test_paths import IDS, hop_by_hop, load
from tests.models import make_family, make_model
from tests.searching.records import canonical
from tests.searching.test_kill import in_child
from tests.tasks import make_config

SPACE = {"type": "layers", "pool": ["a", "b"], "scale": {"range": [0.5, 2.0]}}


@pytest.mark.parametrize("genome", ["edits", "indicators"])
def test_an_exported_genotype_computes_its_path(
    genome: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, tasks: Path
) -> None:
    family = make_family(tmp_path_factory.mktemp("exact"), rms_norm_eps=1e-12)
    config = make_config(tmp_path, family, tasks, space={**SPACE, "genome": genome}, optimizer={})
    space = set_up(load_config(config), file=config).space
    models = {name: load(path) for name, path in family.items()}
    numbers = np.random.default_rng(1)
    assert space.variation is not None
    scaled = 0
    for attempt in range(4):
        genotype = space.initial
        for _ in range(3):
            genotype = space.variation.mutate(genotype, numbers)
        recipe = space.decode(genotype)
        out = merge(recipe, tmp_path / str(attempt))
        hops = [(str(hop.model), hop.layer, hop.scale) for hop in recipe.path or ()]
        hops = hops or [("a", layer, 1.0) for layer in range(4)]
        scaled += any(scale != 1 for *_, scale in hops)
        exported = load(out)
        assert exported.config.num_hidden_layers == len(hops)
        with torch.no_grad():
            assert error(exported(IDS).logits, hop_by_hop(models, hops)) < 1e-4
    assert scaled


def search_killed_after(results: int, config: Path, folder: Path) -> None:
    """Go on with a search until it has recorded so many results, then die without a word."""
    record, seen = Store.add_result, 0

    def counted(*arguments: Any) -> None:
        nonlocal seen
        record(*arguments)
        seen += 1
        if seen == results:
            os.kill(os.getpid(), signal.SIGKILL)

    Store.add_result = counted  # type: ignore[method-assign]
    evomerge.search(config, run=folder, continue_=True)


@pytest.mark.parametrize(
    ("space", "optimizer"),
    [({}, {"population": 6}), ({"genome": "indicators", "length_penalty": 0.02}, {"population": 6})],
)
def test_a_killed_search_over_paths_resumes_to_the_same_tables(
    space: dict[str, object],
    optimizer: dict[str, object],
    family: dict[str, Path],
    tasks: Path,
    tmp_path: Path,
) -> None:
    config = make_config(
        tmp_path,
        family,
        tasks,
        space={**SPACE, **space},
        optimizer=optimizer,
        budget={"candidates": 18},
        cache={"scores": False},
    )
    undisturbed = evomerge.search(config, run=tmp_path / "undisturbed")
    results = undisturbed.results
    assert results["candidates"] == 18
    assert results["failed_candidates"] == 0
    assert results["baselines"]["uniform"] is None
    assert results["baselines"]["uniform_reason"]
    assert results["baselines"]["initial"] == results["baselines"]["experts"]["a"]
    found = [undisturbed.candidate(i).path for i in range(18)]
    assert found[0] is None
    assert len({path and len(path) for path in found}) > 2

    folder = tmp_path / "killed"
    for results_until_killed in (2, 25, 9):
        status = in_child(lambda count=results_until_killed: search_killed_after(count, config, folder))
        assert os.WTERMSIG(status) == signal.SIGKILL
    assert os.WEXITSTATUS(in_child(lambda: evomerge.search(config, run=folder, continue_=True))) == 0
    assert canonical(folder) == canonical(undisturbed.path)


def test_what_paths_share_changes_nothing_that_is_recorded(
    family: dict[str, Path], tasks: Path, tmp_path: Path
) -> None:
    found = {}
    for sharing in ("auto", 0):
        config = two_phases(tmp_path, family, tasks, engine={"device": "cpu", "prefix_sharing": sharing})
        found[sharing] = evomerge.search(config, run=tmp_path / str(sharing))
    assert canonical(found["auto"].path) == canonical(found[0].path)
    shared, alone = found["auto"].results, found[0].results
    assert shared["winner"] == alone["winner"]
    assert alone["saved_layer_evaluations"] == 0
    assert shared["saved_layer_evaluations"] > 0
    done = shared["layer_evaluations"] + shared["saved_layer_evaluations"]
    assert done == alone["layer_evaluations"]
    assert "Prefix sharing saved" in summary(shared)
    assert "Prefix sharing" not in summary(alone)
    assert "prefix sharing saved" in sentence(json.loads((found["auto"].path / "status.json").read_text()))


TWO = {
    "type": "coefficients+layers",
    "coefficients": {
        "method": "task_arithmetic",
        "parameters": {
            "weight": {"range": [-0.5, 1.5], "initial": 0.4, "per": "expert", "depth": {"smooth": 2}}
        },
    },
    "layers": {"pool": ["a"], "scale": {"range": [0.5, 2.0]}},
}


def two_phases(folder: Path, family: dict[str, Path], tasks: Path, **changes: Any) -> Path:
    settings: dict[str, Any] = {
        "space": TWO,
        "optimizer": {"population": 4, "layers": {"population": 6}},
        "budget": {"candidates": 20},
        "cache": {"scores": False},
        **changes,
    }
    return make_config(folder, family, tasks, **settings)


def test_coefficients_come_first_and_their_winner_joins_the_pool(
    family: dict[str, Path], tasks: Path, tmp_path: Path
) -> None:
    config = two_phases(tmp_path, family, tasks)
    run = evomerge.search(config, run=tmp_path / "run")
    rows = run.candidate_rows()
    assert [row.generation for row in rows] == [0] * 4 + [1] * 4 + [2] * 6 + [3] * 6
    recipes = [run.candidate(row.id) for row in rows]
    assert all(recipe.path is None for recipe in recipes[:8])
    merged = recipes[8]
    paths = [recipe.path for recipe in recipes[9:] if recipe.path is not None]
    assert merged.path is None
    assert paths
    assert all(path[0].merge == path[-1].merge == "merged" for path in paths)
    assert {hop.model for path in paths for hop in path} == {None, "a"}
    for recipe in recipes[9:]:
        assert recipe.path is None or recipe.merges["merged"] == merged.main
    with run._store() as store:
        assert store.winner(-1)[0] == merged.hash
        assert store.meta("first_phase_generations") == 2
    results = run.results
    assert set(results["baselines"]) >= {"base", "uniform", "initial", "merged", "experts"}
    assert "merged" in results["comparisons"]
    assert results["dimension"] == 6 + 42
    assert "the winner of the coefficients" in verdict(results)
    table = tmp_path / "candidates.csv"
    assert main(["export", str(run.path), "--out", str(table), "--format", "csv"]) == 0
    frame = pandas.read_csv(table)
    assert [*frame.columns[-2:]] == ["x40", "x41"]
    assert frame.filter(regex=r"x\d+").notna().sum(axis=1).tolist() == [6] * 8 + [42] * 12

    again = evomerge.resume(run.path, budget={"candidates": 26})
    assert len(again.candidate_rows()) == 26
    assert again.candidate_rows()[:20] == rows
    assert again.results["test_openings"] == 2


def test_two_phases_killed_at_any_place_resume_to_the_same_tables(
    family: dict[str, Path], tasks: Path, tmp_path: Path
) -> None:
    config = two_phases(tmp_path, family, tasks)
    undisturbed = evomerge.search(config, run=tmp_path / "undisturbed")
    with undisturbed._store() as store:
        _, rows = store.query("SELECT COUNT(*) FROM results")
    folder = tmp_path / "killed"
    left = int(rows[0][0])
    # In the first phase, on its validation items, in the second phase, in the final selection.
    for results_until_killed in (9, 9, 9, left - 27 - 3):
        status = in_child(lambda count=results_until_killed: search_killed_after(count, config, folder))
        assert os.WTERMSIG(status) == signal.SIGKILL
    assert os.WEXITSTATUS(in_child(lambda: evomerge.search(config, run=folder, continue_=True))) == 0
    assert canonical(folder) == canonical(undisturbed.path)


def test_the_share_of_each_phase_is_planned_and_one_too_small_is_refused(
    family: dict[str, Path], tasks: Path, tmp_path: Path
) -> None:
    def phases(**budget: Any) -> list[int | None]:
        config = two_phases(tmp_path, family, tasks, budget=budget)
        setup = set_up(load_config(config), file=config, weights=False)
        return [phase.candidates for phase in plan_phases(setup, setup.config.budget)]

    assert phases(candidates=24) == [12, 12]
    assert phases(candidates=60, layers=0.7) == [16, 42]
    assert phases(item_evaluations=16 * 30, layers=0.2) == [24, 6]
    assert phases(hours=1) == [None, None]
    with pytest.raises(UserError, match=r"share of the budget that coefficients get pays for no generation"):
        phases(candidates=6)
    with pytest.raises(UserError, match=r"share of the budget that layer paths get pays for no generation"):
        phases(candidates=12, layers=0.1)


class Said(Silent):
    """Keeps what a search says."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.phases: list[str] = []

    def show(self, status: Status) -> None:
        self.phases.append(status.phase)

    def say(self, text: str) -> None:
        self.lines.append(text)


def test_a_resumed_run_is_planned_from_where_its_first_phase_ended(
    family: dict[str, Path], tasks: Path, tmp_path: Path
) -> None:
    run = evomerge.search(two_phases(tmp_path, family, tasks), run=tmp_path / "run")
    before = canonical(run.path)
    with pytest.raises(
        UserError, match=r"13 is less than the 8 of before and one generation of 6; give at least 14"
    ):
        evomerge.resume(run.path, budget={"candidates": 13})
    # Nothing of it was kept.
    evomerge.resume(run.path)
    assert canonical(run.path) == before
    said = Said()
    # A share that would have paid for no coefficients is none of its business any more.
    evomerge.resume(run.path, budget={"candidates": 26, "layers": 0.95}, display=said)
    plan = "\n".join(said.lines)
    assert [phase for phase in said.phases if "replayed" in phase] == [
        "replayed 8 candidates",
        "replayed 20 candidates",
    ]
    assert "4 a generation x 2 generations = 8" in plan
    assert "6 a generation x 3 generations = 18" in plan
    assert len(run.candidates()) == 26


def test_higher_ceilings_are_refused_where_the_time_is_over(
    family: dict[str, Path], tasks: Path, tmp_path: Path
) -> None:
    config = make_config(tmp_path, family, tasks, budget={"hours": 1e-6})
    run = evomerge.search(config, run=tmp_path / "run")
    assert len(run.candidates()) == 4
    with pytest.raises(
        UserError, match=r"--budget: the run has taken .* hours of 1e-06, so it would not go on"
    ):
        evomerge.resume(run.path, budget={"candidates": 12})
    assert len(evomerge.resume(run.path, budget={"candidates": 12, "hours": 1}).candidates()) == 12


def test_a_run_of_one_phase_has_no_share_for_layer_paths(
    family: dict[str, Path], tasks: Path, tmp_path: Path
) -> None:
    config = make_config(tmp_path, family, tasks, budget={"candidates": 4})
    run = evomerge.search(config, run=tmp_path / "run")
    with pytest.raises(
        UserError, match=r"--budget: layers: needs space.type coefficients\+layers; leave it out"
    ):
        evomerge.resume(run.path, budget={"candidates": 8, "layers": 0.5})
    assert len(evomerge.resume(run.path, budget={"candidates": 8}).candidates()) == 8


def test_ranks_count_the_length_and_fitness_does_not(
    family: dict[str, Path], tasks: Path, tmp_path: Path
) -> None:
    space = {**SPACE, "length_penalty": 0.5}
    changes = {"optimizer": {"population": 8}, "budget": {"candidates": 8}}
    config = make_config(tmp_path, family, tasks, space=space, **changes)
    run = evomerge.search(config, run=tmp_path / "run")
    rows = run.candidate_rows()
    lengths = [len(run.candidate(row.id).path or range(4)) for row in rows]
    assert len(set(lengths)) > 1
    worth = [row.fitness - 0.5 * length for row, length in zip(rows, lengths, strict=True)]
    order = sorted(range(8), key=lambda i: rows[i].rank)
    assert [worth[i] for i in order] == sorted(worth, reverse=True)
    assert all(0 <= row.fitness <= 1 for row in rows)


@pytest.mark.parametrize("stops", [True, False])
def test_candidates_below_the_first_model_stop_after_their_first_block(
    stops: bool, family: dict[str, Path], tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def worse(candidate: Any, anchor: Any, weights: Any) -> bool:
        return fitness_of(candidate, weights) < fitness_of(anchor, weights)

    monkeypatch.setattr(generations, "hopeless", worse)
    space = {**SPACE, "stop_early": stops}
    changes = {"optimizer": {"population": 12}, "budget": {"candidates": 24}, "cache": {"scores": False}}
    config = make_config(tmp_path, family, tasks, space=space, **changes)
    run = evomerge.search(config, run=tmp_path / "run")
    with run._store() as store:
        for generation in (0, 1):
            blocks = store.generation_blocks(generation)
            rows = store.candidates(generation)
            assert len(blocks) == 2
            screened = [row for row in rows if row.status == "screened"]
            assert bool(screened) == stops
            assert max(row.rank for row in rows if row.status == "scored") < min(
                (row.rank for row in screened), default=99
            )
            for row in screened:
                assert row.fitness is None
                assert blocks[0] in store.results(row.recipe)
    again = tmp_path / "again"
    for results_until_killed in (5, 11):
        status = in_child(lambda count=results_until_killed: search_killed_after(count, config, again))
        assert os.WTERMSIG(status) == signal.SIGKILL
    evomerge.search(config, run=again, continue_=True)
    assert canonical(again) == canonical(run.path)
    assert run.results["screened_candidates"] == sum(row.status == "screened" for row in run.candidate_rows())


def test_scales_are_refused_where_they_do_not_fold(
    family: dict[str, Path], tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(paths._FORMS, "llama")
    config = make_config(tmp_path, family, tasks, space=SPACE, optimizer={})
    with pytest.raises(UserError, match=r"tiny.yaml: space.scale: a scale other than 1 folds only into"):
        set_up(load_config(config), file=config)
    config = make_config(tmp_path, family, tasks, space={**SPACE, "scale": 1}, optimizer={})
    assert set_up(load_config(config), file=config).space.dimension == 30


def test_models_that_cannot_share_a_config_are_refused(
    family: dict[str, Path], tasks: Path, tmp_path: Path
) -> None:
    other = make_model(tmp_path / "other", seed=5, base=family["base"])
    settings = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**settings, "rms_norm_eps": 1e-3}))
    changed = {**family, "b": other}
    config = make_config(tmp_path, changed, tasks, space=SPACE, optimizer={})
    with pytest.raises(UserError, match=r"tiny.yaml: space.pool: .*rms_norm_eps"):
        set_up(load_config(config), file=config)
