"""Reordered weights: the same bits, never those of weights that are gone, and none where they cost too much."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from evomerge.engines import reordering
from evomerge.engines.hf import HFEngine
from evomerge.engines.reordering import ReorderedWeights, reordered_bytes
from evomerge.evaluation.requests import Generation, Loglikelihood, Rolling
from tests.evaluation.tiny import documents

PAIRS = [Loglikelihood(row["question"], " " + choice) for row in documents(12) for choice in row["choices"]]
PROMPTS = [Generation(row["question"], ("e",), 3 + i) for i, row in enumerate(documents(12))]
TEXTS = [Rolling(row["question"]) for row in documents(4)]

pytestmark = pytest.mark.skipif(
    not reordered_bytes("cpu", torch.bfloat16, 1), reason="this CPU has no bfloat16 products"
)


def loaded(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def answers(engine: HFEngine) -> tuple[Any, ...]:
    return engine.loglikelihood(PAIRS), engine.generate(PROMPTS), engine.loglikelihood_rolling(TEXTS)


def test_answers_are_the_same_bits(
    family: dict[str, Path], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = HFEngine(loaded(family["base"]), tokenizer, batch_tokens=300)
    assert engine._reordered.works
    fast = answers(engine)
    monkeypatch.setattr(reordering, "MOST_BYTES", 0)
    plain = HFEngine(loaded(family["base"]), tokenizer, batch_tokens=300)
    assert not plain._reordered.works
    assert answers(plain) == fast


def test_new_weights_are_reordered_anew(family: dict[str, Path], tokenizer: Any) -> None:
    live, expert = loaded(family["base"]), loaded(family["a"])
    engine = HFEngine(live, tokenizer, batch_tokens=300)
    base = answers(engine)
    engine.weights_changed()
    with torch.no_grad():
        for parameter, other in zip(live.parameters(), expert.parameters(), strict=True):
            parameter.copy_(other)
    swapped = answers(engine)
    assert swapped != base
    assert swapped == answers(HFEngine(expert, tokenizer, batch_tokens=300))


def test_the_model_is_left_as_it_was(family: dict[str, Path], tokenizer: Any) -> None:
    live = loaded(family["base"])
    engine = HFEngine(live, tokenizer, batch_tokens=300)
    answers(engine)
    with engine._reordered.used():
        assert any("forward" in module.__dict__ for module in live.modules())
    assert not any("forward" in module.__dict__ for module in live.modules())
    with pytest.raises(ValueError), engine._reordered.used():
        int("x")
    assert not any("forward" in module.__dict__ for module in live.modules())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 1), (2, 65), (0,), (2, 0)])
def test_a_layer_gives_the_same_bits(bias: bool, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(48, 33, bias=bias, dtype=torch.bfloat16)
    rows = torch.randn(*shape, 48, generator=generator).bfloat16()
    reordered = ReorderedWeights(layer)
    with torch.inference_mode():
        plain, scattered = layer(rows), layer(rows.mT.contiguous().mT)
        with reordered.used():
            assert "forward" in layer.__dict__
            assert torch.equal(layer(rows), plain)
            assert torch.equal(layer(rows.mT.contiguous().mT), scattered)


def test_layers_that_compute_something_else_take_no_part() -> None:
    class Doubled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    replaced = nn.Linear(4, 4, dtype=torch.bfloat16)
    replaced.__dict__["forward"] = forward = lambda rows: rows
    model = nn.Sequential(Doubled(4, 4, dtype=torch.bfloat16), replaced, nn.Linear(4, 4))
    reordered = ReorderedWeights(model)
    assert not reordered.possible
    with reordered.used():
        assert replaced.__dict__["forward"] is forward
    assert replaced.__dict__["forward"] is forward


def test_large_models_and_other_formats_are_not_held_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)
    assert ReorderedWeights(layer).possible
    assert reordered_bytes("cpu", torch.bfloat16, 8192) == 8192
    assert reordered_bytes("cpu", torch.float32, 8192) == 0
    assert reordered_bytes("cuda", torch.bfloat16, 8192) == 0
    monkeypatch.setattr(reordering, "MOST_BYTES", 8191)
    assert not ReorderedWeights(layer).possible
    assert reordered_bytes("cpu", torch.bfloat16, 8192) == 0


def test_a_trial_that_shows_other_bits_turns_them_off(
    family: dict[str, Path], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    multiply = reordering._Product.__call__
    monkeypatch.setattr(reordering._Product, "__call__", lambda *given: 1.01 * multiply(*given))
    engine = HFEngine(loaded(family["base"]), tokenizer, batch_tokens=300)
    assert engine._reordered.works is False
    assert engine.generate(PROMPTS)
