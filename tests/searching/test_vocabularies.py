"""A search over experts that speak other vocabularies than the base."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

import evomerge
from evomerge.config import load_config
from evomerge.errors import UserError
from evomerge.searching.setup import set_up
from tests.merging.speakers import write_model, write_tokenizer
from tests.tasks import make_config


@pytest.fixture(scope="module")
def speakers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("speakers")
    tokens: dict[str, tuple[list[str], list[str]]] = {
        "base": ([], []),
        "a": (["Ġthe"], ["<|im_end|>"]),
        "b": ([], ["<tool>"]),
        "c": ([], []),
    }
    models = {}
    for seed, (name, (words, added)) in enumerate(tokens.items()):
        ids = write_tokenizer(folder / name, words, added)
        models[name] = write_model(folder / name, ids, seed, rows=300 if name == "c" else None)
    return models


@pytest.mark.parametrize("tokenizer", ["union", "base"])
def test_what_is_scored_is_what_is_exported(
    speakers: dict[str, Path], tasks: Path, tmp_path: Path, tokenizer: str
) -> None:
    config = make_config(tmp_path, speakers, tasks)
    overrides = [f"output.tokenizer={tokenizer}", "budget.candidates=4"]
    run = evomerge.search(config, run=tmp_path / "run", overrides=overrides)
    winner = run.results["winner"]
    out = run.export(tmp_path / "out")
    vocab = AutoTokenizer.from_pretrained(out).get_vocab()
    assert ("<|im_end|>" in vocab) is (tokenizer != "base")
    assert ("<tool>" in vocab) is (tokenizer == "union")
    score = evomerge.evaluate(out, config, split="validation").score
    assert score["mean"] == pytest.approx(winner["validation"]["mean"])


def test_baselines_share_the_outputs_tokenizer(
    speakers: dict[str, Path], tasks: Path, tmp_path: Path
) -> None:
    file = make_config(tmp_path, speakers, tasks)
    lacks = "tokens that the output's tokenizer lacks"
    for tokenizer, told in (("union", False), ("base", True)):
        setup = set_up(load_config(file, [f"output.tokenizer={tokenizer}"]), file=file, weights=False)
        assert {len(recipe.models) for recipe in setup.baselines.values()} == {4}
        assert any(lacks in warning for warning in setup.warnings) is told


def test_an_unknown_tokenizer_is_named(speakers: dict[str, Path], tasks: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"output.tokenizer: no model is called 'unoin'"):
        load_config(make_config(tmp_path, speakers, tasks), ["output.tokenizer=unoin"])
