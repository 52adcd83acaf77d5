from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from evomerge.checkpoints import open_checkpoint
from evomerge.checkpoints.model_config import last_position
from evomerge.cli import main
from evomerge.config import Engine, load_config
from evomerge.engines import probing
from evomerge.errors import Stopped, UserError
from evomerge.scoring import evaluate
from evomerge.searching.phases import plan_phases
from evomerge.searching.run import resume, search
from evomerge.searching.setup import decide_output, decided, pin_revisions, set_up
from evomerge.searching.store import Store
from tests.models import make_family, make_model
from tests.tasks import make_config, make_tasks


def test_a_base_of_mixed_formats_is_searched_in_one(tmp_path: Path, tasks: Path) -> None:
    family = make_family(tmp_path, dtype=torch.bfloat16)
    for path in family.values():
        weights = load_file(path / "model.safetensors")
        weights = {name: w.float() if "norm" in name else w for name, w in weights.items()}
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    path = make_config(tmp_path, family, tasks, budget={"candidates": 4})
    config, [warning] = decide_output(load_config(path), open_checkpoint(str(family["base"])))
    assert config.output.dtype == "bfloat16"
    assert "bfloat16 and float32" in warning

    run = search(path, run=tmp_path / "run")
    exported = open_checkpoint(str(run.export(tmp_path / "model")))
    assert {info.dtype for info in exported.tensors.values()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_models_own_length_is_what_its_config_calls_so(tmp_path: Path, kind: str) -> None:
    model = open_checkpoint(str(make_model(tmp_path / kind, kind=kind)))
    assert decided(Engine(device="cpu"), model).max_length == 512


def test_a_length_beyond_a_table_of_positions_is_refused(
    tmp_path: Path, tasks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    family = make_family(tmp_path, kind="gpt2")
    config = make_config(tmp_path, family, tasks)
    said = (
        f"evomerge: {config}: engine.max_length: 513 is more than the 512 positions that {family['base']} knows; set "
        "at most 512, or leave it out"
    )
    longer = ["--set", "engine.max_length=513"]
    for command in (["plan", str(config)], ["evaluate", str(family["base"]), "--config", str(config)]):
        assert main([*command, *longer]) == 2
        assert capsys.readouterr().err.strip().splitlines()[-1] == said
    assert main(["plan", str(config), "--set", "engine.max_length=512"]) == 0


def test_computed_positions_go_on_beyond_the_length_of_the_training(family: dict[str, Path]) -> None:
    model = open_checkpoint(str(family["base"]))
    assert decided(Engine(device="cpu", max_length=700), model).max_length == 700


@pytest.mark.parametrize(
    ("kind", "tensors", "positions"),
    [
        ("opt", ("model.decoder.embed_positions.weight", "model.decoder.embed_tokens.weight"), 64),
        ("gpt_neo", ("transformer.wpe.weight", "transformer.wte.weight"), 64),
        ("gptj", ("transformer.wte.weight",), 64),
        ("llama", ("model.embed_tokens.weight",), None),
        ("bloom", ("word_embeddings.weight",), None),
    ],
)
def test_who_looks_its_positions_up(kind: str, tensors: tuple[str, ...], positions: int | None) -> None:
    assert last_position({"model_type": kind, "max_position_embeddings": 64}, tensors) == positions


def test_one_format_is_left_as_it_is(family: dict[str, Path], tasks: Path, tmp_path: Path) -> None:
    config = load_config(make_config(tmp_path, family, tasks))
    assert decide_output(config, open_checkpoint(str(family["base"]))) == (config, ())


def test_the_engine_and_the_output_have_one_number_format(
    family: dict[str, Path], tasks: Path, tmp_path: Path
) -> None:
    path, base = make_config(tmp_path, family, tasks), open_checkpoint(str(family["base"]))
    for written in ("engine.dtype=bfloat16", "output.dtype=bfloat16"):
        config, warnings = decide_output(load_config(path, [written]), base)
        assert config.engine.dtype == config.output.dtype == "bfloat16"
        assert warnings == ()
        assert decide_output(config, base) == (config, ())
    with pytest.raises(UserError, match=r"engine\.dtype: float16, but output\.dtype is bfloat16"):
        load_config(path, ["engine.dtype=float16", "output.dtype=bfloat16"])


def test_hub_models_are_pinned_to_their_commit(family: dict[str, Path], tasks: Path, tmp_path: Path) -> None:
    config = load_config(make_config(tmp_path, family, tasks))
    base = config.models.base.model_copy(update={"path": "org/model", "revision": "main"})
    config = config.model_copy(update={"models": config.models.model_copy(update={"base": base})})
    opened = {name: open_checkpoint(str(path)) for name, path in family.items()}
    opened["base"] = replace(opened["base"], path=Path("/cache/models--org--model/snapshots/abc123"))
    pinned = pin_revisions(config, opened)
    assert pinned.models.base.revision == "abc123"
    assert pinned.models.experts == config.models.experts


def test_the_test_items_of_an_unfinished_run_stay_closed(
    family: dict[str, Path], tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(tmp_path, family, tasks, budget={"candidates": 4})
    run = search(config, run=tmp_path / "run")
    results = (run.path / "results.json").rename(tmp_path / "results.json")
    for model in (run.path, run.path / "recipe.yaml"):
        with pytest.raises(UserError, match="test items stay closed"):
            evaluate(model, config, split="test")
    assert evaluate(run.path, config, split="validation").score["n"] == 24
    results.rename(run.path / "results.json")
    assert evaluate(run.path / "recipe.yaml", config, split="test").score["n"] == 32

    def interrupt(self: Store, *args: Any) -> None:
        raise KeyboardInterrupt

    # A run that goes on has results of its first end, and may choose another winner.
    monkeypatch.setattr(Store, "set_winner", interrupt)
    with pytest.raises(Stopped):
        resume(run.path, budget={"candidates": 8})
    with pytest.raises(UserError, match="test items stay closed"):
        evaluate(run.path, config, split="test")


def test_a_budget_of_items_pays_for_the_largest_blocks(family: dict[str, Path], tmp_path: Path) -> None:
    tasks = make_tasks(tmp_path / "tasks", counts={"search": 27, "validation": 4, "test": 4})
    path = make_config(tmp_path, family, tasks, budget={"item_evaluations": 2 * 4 * 16 - 1})
    setup = set_up(load_config(path), file=path, weights=False)
    assert {len(block.items) for block in setup.blocks["search"]} == {7, 8}
    assert (setup.blocks_per_generation, setup.items_per_candidate) == (2, 16)
    (phase,) = plan_phases(setup, setup.config.budget)
    assert phase.generations == 1


def test_a_search_on_a_gpu_asks_once_for_its_longest_text(
    tmp_path: Path, family: dict[str, Path], tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def answer(model: str, **options: Any) -> int:
        asked.append(options)
        return 4096

    monkeypatch.setattr(probing, "probe_batch_tokens", answer)
    path = make_config(tmp_path, family, tasks)
    setup = set_up(load_config(path, ["engine.device=cuda", "engine.dtype=bfloat16"]), file=path)
    (options,) = asked
    assert setup.config.engine.batch_tokens == 4096
    assert {part.packing for blocks in setup.blocks.values() for block in blocks for part in block.parts} == {
        "hf-v2:4096"
    }
    assert options["dtype"] == "bfloat16"
    texts = [request.context + request.continuation for request in setup.suite.requests()]
    assert options["longest"] == max(map(len, texts))

    # What was recorded, or written, is not asked for; nor does a plan ask, or a search on a CPU.
    set_up(setup.config, file=path)
    set_up(load_config(path, ["engine.device=cuda"]), file=path, weights=False)
    assert set_up(load_config(path), file=path).config.engine.batch_tokens == 512
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        (
            {"suite": {"tasks": ["tiny_a", "tiny_b"], "items_per_candidate": 1}},
            "each candidate answers 2 items instead of 1, one of each of the 2 tasks at least; raise suite.items",
        ),
        (
            {"suite": {"tasks": ["tiny_a", "tiny_b"], "items_per_candidate": 23, "block_items": 16}},
            "each candidate answers 16 items instead of 23: it answers whole blocks, 1 of 3; set suite.block_items",
        ),
        (
            {"optimizer": {"type": "tpe", "sigma": 0.1}},
            "optimizer.sigma: 0.1 has no effect: tpe takes no first",
        ),
        ({"workers": {"type": "local", "count": 4}}, "workers.count: 4 has no effect: workers.type is local"),
        ({"workers": {"type": "local", "address": "auto"}}, "workers.address: auto has no effect"),
        (
            {
                "space": {"type": "layers", "pool": ["a", "b"], "genome": "indicators", "max_edits": 3},
                "optimizer": {"type": "catcma"},
            },
            "space.max_edits: 3 has no effect: genome is indicators",
        ),
        (
            {
                "space": {
                    "method": "task_arithmetic",
                    "parameters": {
                        "weight": [
                            {"range": [0, 1], "initial": 0.4, "tensors": "*.mpl.*", "per": "shared"},
                            {"range": [0, 1], "initial": 0.4, "per": "expert"},
                        ]
                    },
                }
            },
            "weight *.mpl.* is searched, but no tensor of the models is selected by it",
        ),
    ],
)
def test_what_has_no_effect_is_announced(
    changes: dict[str, Any], warning: str, family: dict[str, Path], tasks: Path, tmp_path: Path
) -> None:
    def warnings(**changes: Any) -> tuple[str, ...]:
        if "suite" in changes:
            changes = {**changes, "suite": {**changes["suite"], "include": [str(tasks)]}}
        path = make_config(tmp_path, family, tasks, **changes)
        return set_up(load_config(path), file=path, weights=False).warnings

    usual = warnings()
    [said] = [line for line in warnings(**changes) if line not in usual]
    assert warning in said
