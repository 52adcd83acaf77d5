"""Scores of a live model of every architecture, against its plain forward pass."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evomerge.engines.hf import HFEngine
from evomerge.evaluation.requests import Generation, Loglikelihood
from evomerge.merging import Materializer, open_parents
from tests.merging.helpers import make_recipe
from tests.models import ARCHITECTURES, VOCAB, WRAPPERS, make_model, make_tokenizer

REQUESTS = [Loglikelihood("abc" * k, " " + end) for k in (1, 4, 9, 12) for end in ("yes", "no", "perhaps")]


SHARED = "What all of these prompts begin with, longer than a window. "
PROMPTS = [
    Generation(f"{SHARED * (i % 2)}{'x' * (i // 2)} question?", ("#", "qq"), 5 + 3 * (i % 4))
    for i in range(9)
]
WINDOW = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
WINDOWED: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral, window": ("mistral", {"sliding_window": 8}),
    "mixtral, window": ("mixtral", {"sliding_window": 8}),
    "phi3, window": ("phi3", {"sliding_window": 8}),
    "qwen2, window": ("qwen2", WINDOW),
    "qwen3, window": ("qwen3", WINDOW),
    "gemma3_text, both": ("gemma3_text", {"layer_types": ["sliding_attention", "full_attention"]}),
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    **{kind: (kind, {}) for kind in (*ARCHITECTURES, *WRAPPERS)},
    **WINDOWED,
}
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
PLAIN: dict[str, dict[str, Any]] = {
    "Mamba": {"num_hidden_layers": 2, "state_size": 8},
    "Lfm2": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
    "RecurrentGemma": {"num_hidden_layers": 3, "attention_window_size": 8, "lru_width": 32, "head_dim": 8},
}


def plain_scores(model: Any, tokenizer: Any) -> list[float]:
    """Return what the plain forward pass says of `REQUESTS`, in float64."""
    expected = []
    for request in REQUESTS:
        context, whole = (
            tokenizer.encode(text) for text in (request.context, request.context + request.continuation)
        )
        with torch.no_grad():
            logits = model(torch.tensor([whole])).logits[0, :-1].double().log_softmax(-1)
        targets = torch.tensor(whole[1:])[:, None]
        expected.append(float(logits.gather(1, targets)[len(context) - 1 :].sum()))
    return expected


def generated_alone(model: Any, tokenizer: Any) -> list[str]:
    """Return transformers' own greedy answer to each of `PROMPTS`, cut at the stop strings."""
    answers = []
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer.encode(prompt.context)])
        whole = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=prompt.max_tokens
        )
        text = tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)
        for stop in (*prompt.stops, tokenizer.eos_token):
            text = text.split(stop)[0]
        answers.append(text)
    return answers


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_the_model_alone(kind: str, attention: str, tmp_path: Path) -> None:
    """Prefixes, shared rows and texts that grow together, with windows shorter than every prompt."""
    name, options = KINDS[kind]
    folder = make_model(tmp_path / "m", 3, kind=name, layers=2, **options)
    model_class = WRAPPERS[name][1] if name in WRAPPERS else ARCHITECTURES[name][1]
    model = model_class.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention)
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    engine = HFEngine(model, tokenizer, batch_tokens=64, max_length=256)
    assert "paths=head+tree" in engine.fingerprint
    expected = plain_scores(model, tokenizer)
    np.testing.assert_allclose([s for s, _ in engine.loglikelihood(REQUESTS)], expected, rtol=1e-5)
    assert [answer.text for answer in engine.generate(PROMPTS)] == generated_alone(model, tokenizer)
    assert model.config.get_text_config()._attn_implementation == attention


@pytest.mark.parametrize("kind", PLAIN)
def test_models_with_a_state_of_another_kind_are_run_the_plain_way(kind: str, tmp_path: Path) -> None:
    import transformers

    config = getattr(transformers, f"{kind}Config")(**SMALL, **PLAIN[kind])
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(0.15 * torch.randn(parameter.shape, generator=generator))
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    engine = HFEngine(model, tokenizer, batch_tokens=64, max_length=256)
    assert "tree" not in engine.fingerprint.split("paths=")[1].split()[0]
    expected = plain_scores(model, tokenizer)
    np.testing.assert_allclose([s for s, _ in engine.loglikelihood(REQUESTS)], expected, rtol=1e-5)
    assert [answer.text for answer in engine.generate(PROMPTS)] == generated_alone(model, tokenizer)


@pytest.mark.parametrize("kind", [*ARCHITECTURES, *WRAPPERS])
def test_scores_of_a_path_are_those_of_the_plain_forward_pass(kind: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m", 3, kind=kind, layers=2)
    recipe = make_recipe({"m": folder}, path=[{"model": "m", "layer": 1}, {"model": "m", "layer": 0}])
    model = Materializer(open_parents(recipe)).materialize(recipe)
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    engine = HFEngine(model, tokenizer, batch_tokens=64, max_length=64)
    expected = plain_scores(model, tokenizer)
    np.testing.assert_allclose([s for s, _ in engine.loglikelihood(REQUESTS)], expected, rtol=1e-4)
    assert len(engine.generate([Generation("abc", ("#",), 4)])) == 1


LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [3.0, 4.0, 5.0, 6.0]}
LENGTHS: dict[str, tuple[str, dict[str, Any]]] = {
    "longrope": (
        "phi3",
        {"rope_parameters": {**LONGROPE, "rope_theta": 1e4}, "original_max_position_embeddings": 40},
    ),
    "dynamic": (
        "llama",
        {
            "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
            "max_position_embeddings": 40,
        },
    ),
}


@pytest.mark.parametrize("kind", LENGTHS)
def test_positions_that_depend_on_the_length_of_a_text(kind: str, tmp_path: Path) -> None:
    """Texts on both sides of the length that the model was trained for; asked alone, each by a new model."""
    name, options = LENGTHS[kind]
    folder = make_model(tmp_path / "m", 3, kind=name, layers=2)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **options}))
    model_class = ARCHITECTURES[name][1]
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    requests = [
        Loglikelihood("abc" * k, " " + end) for k in (2, 8, 9, 12, 20) for end in ("yes", "no", "maybe")
    ]

    def engine(max_length: int) -> HFEngine:
        model = model_class.from_pretrained(folder, dtype=torch.float32)
        return HFEngine(model, tokenizer, batch_tokens=4096, max_length=max_length)

    assert "tree" in engine(40).fingerprint.split("paths=")[1].split()[0]
    together = engine(256)
    assert "tree" not in together.fingerprint.split("paths=")[1].split()[0]
    for _ in range(2):
        np.testing.assert_allclose(
            [score for score, _ in together.loglikelihood(requests)],
            [engine(256).loglikelihood([request])[0][0] for request in requests],
            rtol=1e-5,
        )
