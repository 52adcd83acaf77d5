from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from evomerge.checkpoints import open_checkpoint
from evomerge.config import Engine, load_config
from evomerge.engines import probing
from evomerge.errors import UserError
from evomerge.scoring import evaluate
from evomerge.searching.run import search
from evomerge.searching.setup import decide_output, decided, pin_revisions, set_up
from tests.models import make_family, make_model
from tests.tasks import make_config


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
    family: dict[str, Path], tasks: Path, tmp_path: Path
) -> None:
    config = make_config(tmp_path, family, tasks, budget={"candidates": 4})
    run = search(config, run=tmp_path / "run")
    (run.path / "results.json").rename(tmp_path / "results.json")
    with pytest.raises(UserError, match="test items stay closed"):
        evaluate(run.path, config, split="test")
    assert evaluate(run.path, config, split="validation").score["n"] == 24


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
