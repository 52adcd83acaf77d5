"""The Fisher information, against naive loops and closed forms."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from evomerge.checkpoints import open_checkpoint
from evomerge.data_config import Data
from evomerge.statistics import Statistics, collect_statistics
from evomerge.statistics.fisher import add_squared_gradients
from tests.merging.helpers import read
from tests.models import make_model
from tests.statistics.helpers import encode, load, mean_squares, write_texts


def whole(statistics: Statistics, name: str) -> torch.Tensor:
    found = statistics.of(name)
    assert found is not None, name
    return found.values[0 : found.values.numel()]


@pytest.mark.parametrize(
    ("kind", "tied"), [("llama", False), ("llama", True), ("gpt2", True), ("qwen2", False)]
)
def test_is_the_mean_of_squared_gradients_of_single_texts(tmp_path: Path, kind: str, tied: bool) -> None:
    folder = make_model(tmp_path / "model", seed=3, kind=kind, layers=2, tied=tied)
    statistics = collect_statistics(folder, write_texts(tmp_path / "texts.jsonl"), "fisher", tmp_path / "out")
    expected = mean_squares(load(folder), encode(folder))
    names = list(open_checkpoint(folder).tensors)
    assert set(statistics.about["tensors"]) == set(names) == set(expected)
    for name in names:
        torch.testing.assert_close(
            whole(statistics, name).double(), expected[name].reshape(-1), rtol=1e-3, atol=1e-7
        )
    everything = torch.cat([expected[name].reshape(-1) for name in names])
    assert statistics.about["unit"] == pytest.approx(float(everything.square().mean().sqrt()), rel=1e-4)
    assert statistics.about["sequences"] == 4


def test_a_mixtures_experts_have_their_parts(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", seed=3, kind="mixtral", layers=1)
    statistics = collect_statistics(folder, write_texts(tmp_path / "texts.jsonl"), "fisher", tmp_path / "out")
    expected = mean_squares(load(folder), encode(folder))
    assert set(statistics.about["tensors"]) == set(read(folder))
    joined = expected["model.layers.0.mlp.experts.gate_up_proj"]
    for expert in range(3):
        stem = f"model.layers.0.block_sparse_moe.experts.{expert}"
        gate, up = joined[expert].chunk(2)
        for part, wanted in (("w1", gate), ("w3", up)):
            found = whole(statistics, f"{stem}.{part}.weight").double()
            torch.testing.assert_close(found, wanted.reshape(-1), rtol=1e-3, atol=1e-7)


def test_a_prompt_is_given_and_the_answer_is_asked_for(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", layers=1)
    file = write_texts(tmp_path / "texts.jsonl", [" two"], question=["one and one is"])
    data = Data(texts=str(file), prompt="question")
    statistics = collect_statistics(folder, data, "fisher", tmp_path / "out")
    (ids,) = encode(folder, ["one and one is two"])
    expected = mean_squares(load(folder), [ids], start=len("one and one is"))
    name = "model.layers.0.mlp.down_proj.weight"
    torch.testing.assert_close(
        whole(statistics, name).double(), expected[name].reshape(-1), rtol=1e-3, atol=1e-7
    )


def test_sampled_labels_are_the_models_own_and_always_the_same(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", layers=1)
    file = write_texts(tmp_path / "texts.jsonl", ["a cat"] * 300)
    name = "lm_head.weight"
    one, two = (
        whole(
            collect_statistics(
                folder, Data(texts=str(file), labels="sampled", samples=300), "fisher", tmp_path / out
            ),
            name,
        )
        for out in ("one", "two")
    )
    assert torch.equal(one, two)
    # E (∂ log p / ∂W)² of a sum over positions with independent labels: Σ_t p_t (1 − p_t) h_t².
    model, (ids,) = load(folder), encode(folder, ["a cat"])
    with torch.no_grad():
        hidden = model.model(ids).last_hidden_state[0, :-1].double()
        p = model.lm_head(hidden.float()).double().softmax(-1)
    expected = (p * (1 - p)).T @ hidden.square()
    likely = expected > expected.quantile(0.99)
    ratio = one.reshape(expected.shape).double()[likely].sum() / expected[likely].sum()
    assert 0.8 < float(ratio) < 1.25


class LogisticRegression(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.weight = nn.Parameter(torch.randn(features, dtype=torch.float64, generator=generator))


def test_logistic_regression_has_its_closed_form() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40, 6, dtype=torch.float64, generator=generator)
    model = LogisticRegression(6)
    with torch.no_grad():
        p = torch.sigmoid(x @ model.weight).numpy()
    closed = np.diag(x.numpy().T @ np.diag(p * (1 - p)) @ x.numpy())

    def example(row: torch.Tensor, label: int, probability: float):
        sign = 1.0 if label else -1.0
        # The expectation over labels: each label's squared gradient, weighted by its probability.
        return lambda: probability**0.5 * nn.functional.logsigmoid(sign * (row @ model.weight))

    examples = [
        example(row, label, float(q if label else 1 - q))
        for row, q in zip(x, p, strict=True)
        for label in (0, 1)
    ]
    sums, count = add_squared_gradients(model, examples)
    assert count == 80
    np.testing.assert_allclose(sums[model.weight].numpy(), closed, rtol=1e-9)


def test_squares_come_before_sums() -> None:
    model = LogisticRegression(2)
    opposite = torch.tensor([1.0, 2.0], dtype=torch.float64)
    examples = [lambda: model.weight @ opposite, lambda: -(model.weight @ opposite)]
    sums, _ = add_squared_gradients(model, examples)
    assert sums[model.weight].tolist() == [2.0, 8.0]
