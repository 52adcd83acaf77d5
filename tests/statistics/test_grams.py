"""Gram matrices, layer by layer, against hooks on whole forward passes of the loaded model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from evomerge.checkpoints import open_checkpoint
from evomerge.checkpoints.names import parse
from evomerge.statistics import Statistics, collect_statistics, grams, layers
from tests.merging.helpers import read
from tests.models import ARCHITECTURES, make_model
from tests.statistics.helpers import encode, inputs_of, load, write_texts

MIXTURES = ("mixtral", "qwen3_moe")


def grams_of(folder: Path, file: Path, out: Path) -> Statistics:
    return collect_statistics(folder, file, "gram", out)


def matrix(statistics: Statistics, tensor: str) -> torch.Tensor:
    found = statistics.of(tensor)
    assert found is not None, tensor
    size = found.values.numel()
    return found.values[0:size].double().reshape(int(size**0.5), -1)


def mean_gram(rows: torch.Tensor, tokens: int) -> torch.Tensor:
    return rows.T @ rows / tokens


@pytest.mark.parametrize("kind", list(ARCHITECTURES))
def test_are_those_of_whole_forward_passes(tmp_path: Path, kind: str) -> None:
    folder = make_model(tmp_path / "model", seed=3, kind=kind, layers=2)
    statistics = grams_of(folder, write_texts(tmp_path / "texts.jsonl"), tmp_path / "out")
    model, sequences = load(folder), encode(folder)
    expected = inputs_of(model, sequences)
    tokens = sum(ids.numel() for ids in sequences)
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and isinstance(parse(f"{name}.weight").position, int)
    }
    assert linears
    for name in linears:
        gram = mean_gram(expected[name], tokens)
        torch.testing.assert_close(matrix(statistics, f"{name}.weight"), gram, rtol=1e-3, atol=1e-5)
    assert statistics.about["tokens"] == tokens
    covered = {f"{name}.weight" for name in linears}
    if kind not in MIXTURES:
        assert set(statistics.about["tensors"]) == covered
    else:
        covered |= {name for name in read(folder) if ".experts." in name}
        assert set(statistics.about["tensors"]) <= covered


@pytest.mark.parametrize("kind", MIXTURES)
def test_experts_have_those_of_the_tokens_that_are_routed_to_them(tmp_path: Path, kind: str) -> None:
    folder = make_model(tmp_path / "model", seed=3, kind=kind, layers=1)
    statistics = grams_of(folder, write_texts(tmp_path / "texts.jsonl"), tmp_path / "out")
    weights = {name: tensor.double() for name, tensor in read(folder).items()}
    model, sequences = load(folder), encode(folder)
    inputs = inputs_of(model, sequences)
    module = next(name for name in inputs if name.endswith(".experts"))
    rows, chosen = inputs[module], inputs[f"{module}/chosen"]
    prefix = next(name for name in weights if ".experts.0." in name).partition(".experts.0.")[0]
    parts = ("w1", "w3", "w2") if kind == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    for expert in range(3):
        gate, up, down = (f"{prefix}.experts.{expert}.{part}.weight" for part in parts)
        routed = rows[(chosen == expert).any(dim=1)]
        assert 0 < len(routed) < len(rows)
        inner = torch.nn.functional.silu(routed @ weights[gate].T) * (routed @ weights[up].T)
        for name, x in ((gate, routed), (up, routed), (down, inner)):
            expected = mean_gram(x, len(rows))
            torch.testing.assert_close(matrix(statistics, name), expected, rtol=1e-3, atol=1e-5)
        assert statistics.about["tensors"][gate] == statistics.about["tensors"][up]


def test_llama_has_four_matrices_a_layer(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", layers=2)
    statistics = grams_of(folder, write_texts(tmp_path / "texts.jsonl"), tmp_path / "out")
    tensors = statistics.about["tensors"]
    assert len(tensors) == 2 * 7
    assert len(set(tensors.values())) == 2 * 4
    layer = "model.layers.1."
    assert len({tensors[f"{layer}self_attn.{p}_proj.weight"] for p in "qkv"}) == 1
    assert len({tensors[f"{layer}mlp.{p}_proj.weight"] for p in ("gate", "up")}) == 1


def test_names_are_those_of_the_files(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", kind="gpt2", layers=1)
    statistics = grams_of(folder, write_texts(tmp_path / "texts.jsonl"), tmp_path / "out")
    assert set(statistics.about["tensors"]) <= set(open_checkpoint(folder).tensors)
    assert statistics.of("transformer.wte.weight") is None


def test_longer_texts_in_the_same_file_change_nothing_about_shorter_ones(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", layers=2)
    short, long = "a cat sat", "a text that is much longer than the other one"
    name = "model.layers.1.mlp.down_proj.weight"
    alone, other, both = (
        grams_of(folder, write_texts(tmp_path / f"{i}.jsonl", texts), tmp_path / f"out{i}")
        for i, texts in enumerate(([short], [long], [short, long]))
    )
    parts = [s.about["tokens"] * matrix(s, name) for s in (alone, other)]
    torch.testing.assert_close(both.about["tokens"] * matrix(both, name), sum(parts), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_the_bits_do_not_depend_on_the_number_of_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    folder = make_model(tmp_path / "model", seed=3, kind=kind, layers=2)
    file = write_texts(tmp_path / "texts.jsonl", [f"text {i} " + i * "x" for i in range(20)])
    monkeypatch.setattr(grams, "BLOCK", 24)
    found = []
    for count in (1, 5):
        monkeypatch.setattr(layers, "_cpus", lambda count=count: count)
        found.append(grams_of(folder, file, tmp_path / f"out{count}"))
    one, five = found
    assert one.about["tensors"] == five.about["tensors"]
    for name in one.about["tensors"]:
        assert torch.equal(matrix(one, name), matrix(five, name))
