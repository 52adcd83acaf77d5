"""Models with other vocabularies, merged by mergekit 0.1.5 and by us: the same row for every token.

Two things differ and are left out. The union of mergekit makes every further token an added one and numbers
them in no particular order, so rows are compared token by token. Padding rows are not compared: mergekit
drops those that a model has.
"""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoTokenizer

from evomerge.errors import UserError
from evomerge.mergekit import from_mergekit
from evomerge.merging import merge
from tests.mergekit.conftest import steps
from tests.mergekit.test_golden import document
from tests.merging.helpers import read
from tests.merging.speakers import EMBEDDING, HEAD, World

ARITHMETIC = """
merge_method: task_arithmetic
base_model: base
models:
- {model: a, parameters: {weight: 0.5}}
- {model: b, parameters: {weight: 0.75}}
"""
LINEAR = """
merge_method: linear
models:
- {model: a, parameters: {weight: 0.7}}
- {model: b, parameters: {weight: 0.2}}
- {model: base, parameters: {weight: 0.3}}
"""
TIES = """
merge_method: ties
base_model: base
models:
- {model: a, parameters: {weight: 0.5, density: 0.6}}
- {model: b, parameters: {weight: 0.75, density: 0.6}}
"""
SLERP = """
merge_method: slerp
base_model: base
parameters: {t: 0.3}
models:
- {model: base}
- {model: a}
"""
RULES = """
tokenizer:
  source: union
  tokens:
    "<tool>": {source: {kind: zero}, force: true}
    "Ġdog": {source: {kind: model_token, model: base, token: "Ġcat"}, force: true}
    "<|im_end|>": {source: b}
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def peer(data: dict[str, object], out: Path) -> Path:
    config = pytest.importorskip("mergekit.config")
    run_merge = pytest.importorskip("mergekit.merge").run_merge
    options = pytest.importorskip("mergekit.options").MergeOptions
    logging.disable(logging.CRITICAL)
    try:
        run_merge(
            config.MergeConfiguration.model_validate(data),
            str(out),
            options(write_model_card=False, quiet=True, random_seed=0),
        )
    finally:
        logging.disable(logging.NOTSET)
    return out


@pytest.mark.parametrize(
    ("merging", "tokenizer"),
    [
        (ARITHMETIC, "tokenizer_source: union"),
        (ARITHMETIC, "tokenizer_source: base"),
        (ARITHMETIC, "tokenizer_source: b"),
        (ARITHMETIC, RULES),
        (LINEAR, "tokenizer_source: union"),
        (LINEAR, "tokenizer: {source: a, pad_to_multiple_of: 64}"),
        (TIES, "tokenizer_source: union"),
        (SLERP, "tokenizer_source: base"),
    ],
)
def test_every_token_has_mergekits_row(world: World, tmp_path: Path, merging: str, tokenizer: str) -> None:
    data = document(merging, world.models)
    data |= place(yaml.safe_load(tokenizer), world.models)
    theirs = peer(data, tmp_path / "theirs")
    ours = merge(from_mergekit(data).recipe, tmp_path / "ours")
    vocabs = [AutoTokenizer.from_pretrained(out).get_vocab() for out in (ours, theirs)]
    assert vocabs[0].keys() == vocabs[1].keys()
    for tensor in (EMBEDDING, HEAD):
        one, other = read(ours)[tensor], read(theirs)[tensor]
        assert one.shape == other.shape
        rows = [torch.tensor([vocab[token] for token in vocabs[0]]) for vocab in vocabs]
        assert (steps(one[rows[0]], other[rows[1]]) <= 1).float().mean() >= 0.999
        if "pad" in tokenizer:
            assert (steps(one[len(vocabs[0]) :], other[len(vocabs[0]) :]) <= 2).float().mean() >= 0.95


def place(node: object, models: dict[str, Path]) -> dict[str, object]:
    """Put folders in place of models' names wherever a tokenizer's source may name one."""

    def walk(node: object, key: str = "") -> object:
        if isinstance(node, dict):
            return {name: walk(item, name) for name, item in node.items()}
        named = key in ("source", "tokenizer_source", "model") and node in models and node != "base"
        return str(models[str(node)]) if named or (key == "model" and node == "base") else node

    found = walk(node)
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("template", ["chatml", "auto", "{% for m in messages %}{{ m.content }}{% endfor %}"])
def test_chat_templates_are_taken_over(world: World, template: str) -> None:
    data = document(ARITHMETIC, world.models) | {"chat_template": template}
    assert from_mergekit(data).recipe.output.chat_template == template


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ({"<x>": {}}, r"tokenizer.tokens.<x>.source: is missing"),
        ({"<x>": {"source": {"kind": "one"}}}, r"tokenizer.tokens.<x>: source.kind: 'one' is not accepted"),
    ],
)
def test_rules_that_cannot_be_understood(world: World, tokens: dict[str, object], message: str) -> None:
    data = document(ARITHMETIC, world.models) | {"tokenizer": {"source": "union", "tokens": tokens}}
    with pytest.raises(UserError, match=message):
        from_mergekit(data)
