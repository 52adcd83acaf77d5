"""Parity with `lm_eval.simple_evaluate` on real items, where EVOMERGE_EVALDATA names a folder that has them.

The model is the one that EVOMERGE_MODEL names (say smollm2/SmolLM2-135M-Instruct), else the tiny one.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from evomerge.engines.hf import HFEngine
from evomerge.evaluation.requests import Generation, Loglikelihood, Rolling
from evomerge.evaluation.suite import Suite
from evomerge.suite_config import Splits
from evomerge.suite_config import Suite as SuiteConfig
from tests.evaluation.tiny import whole

TASKS = Path(__file__).resolve().parents[2] / "experiments" / "evaluation_cost" / "tasks"
CONFIGS = {
    "arc_easy": ("acc", "none"),
    "arc_challenge": ("acc_norm", "none"),
    "arc_easy_5shot": ("acc_norm", "none"),
    "hellaswag": ("acc_norm", "none"),
    "wikidata": ("acc", "none"),
    "svamp": ("exact_match", "number"),
    "gsm8k": ("exact_match", "flexible-extract"),
    "wikitext2": ("bits_per_byte", "none"),
}
ITEMS = 8
BF16_NATS, BF16_SHARE = 0.5, 0.01
"""Two computations of a bfloat16 model differ in a request's log-probability by no more nats, and share of it."""

pytestmark = [
    pytest.mark.skipif("EVOMERGE_EVALDATA" not in os.environ, reason="EVOMERGE_EVALDATA names no items"),
    pytest.mark.timeout(1800),
]


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def real(request: pytest.FixtureRequest, family: dict[str, Path]) -> tuple[Any, Any, int]:
    """Return the model in one number format, its tokenizer and the longest input used."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = os.environ.get("EVOMERGE_MODEL", str(family["base"]))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=request.param)
    return model, AutoTokenizer.from_pretrained(folder), min(model.config.max_position_embeddings, 2048)


@pytest.mark.parametrize("name", CONFIGS)
def test_scores_are_those_of_simple_evaluate(
    real: tuple[Any, Any, int], name: str, tmp_path: Path, record_property: Any
) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model, tokenizer, length = real
    exact = model.dtype == torch.float32
    metric, filter_ = CONFIGS[name]
    text = (TASKS / f"{name}.yaml").read_text().replace("${DATA}", os.environ["EVOMERGE_EVALDATA"])
    (tmp_path / f"{name}.yaml").write_text(text)
    task = yaml.safe_load(text)["task"]
    chosen = metric if filter_ == "none" else f"{metric},{filter_}"
    config = SuiteConfig.model_validate(
        {
            "include": (str(tmp_path),),
            "tasks": [{"task": task, "limit": ITEMS, "metric": chosen}],
            "chat_template": False,
        }
    )
    named = Splits(search="search", validation="validation", test="test")
    suite = Suite.build(config, named, tokenizer, splits_needed=("search",))
    engine = HFEngine(model, tokenizer, batch_tokens=512, max_length=length)
    scores = suite.score(engine, whole(suite), check_degenerate=False)
    index = {item.id: item.index for item in suite.items("search")}
    raw = {index[score.item]: score.raw for score in scores}

    lm = HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        device="cpu",
        batch_size=8,
        max_length=length,
        softmax_dtype="float32",
    )
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    theirs = simple_evaluate(
        model=lm,
        tasks=[task],
        task_manager=manager,
        samples={task: sorted(raw)},
        bootstrap_iters=2,
        random_seed=None,
        numpy_random_seed=None,
        torch_random_seed=None,
    )
    samples = [s for s in theirs["samples"][task] if s["filter"] == filter_]
    assert len(samples) == len(raw) == ITEMS

    flipped, worst = 0, 0.0
    for number, sample in zip(sorted(raw), samples, strict=True):
        given = [response[0] for response in sample["resps"]]
        arguments = sample["arguments"]
        if name in ("svamp", "gsm8k"):
            prompt, kwargs = arguments[0]
            request = Generation(prompt, tuple(kwargs["until"]), kwargs["max_gen_toks"])
            answer = engine.generate([request])[0].text
            agrees = answer == given[0] and raw[number] == sample[metric]
            assert agrees or not exact
            flipped += not agrees
            continue
        if name == "wikitext2":
            ours = engine.loglikelihood_rolling([Rolling(arguments[0][0])])
            expected = np.array(given, dtype=float)
        else:
            ours = [a[0] for a in engine.loglikelihood([Loglikelihood(*pair) for pair in arguments])]
            expected = np.array([g[0] for g in given])
        difference = np.abs(np.array(ours) - expected)
        tolerance = 1e-5 * np.abs(expected) if exact else BF16_NATS + BF16_SHARE * np.abs(expected)
        worst = max(worst, float((difference / np.abs(expected)).max()))
        assert (difference <= tolerance).all()
        if name != "wikitext2":
            agrees = raw[number] == sample[metric]
            margin = float(np.diff(np.sort(expected)[-2:])[0]) if len(expected) > 1 else 0.0
            assert agrees or (not exact and margin <= 2 * tolerance.max())
            flipped += not agrees
    record_property("disagreements", flipped)
    record_property("largest difference", worst)
    print(
        f"{name} {model.dtype}: largest relative difference {worst:.2g}, {flipped} of {ITEMS} items disagree"
    )
    if exact and name != "wikitext2":
        values = np.array([raw[number] for number in sorted(raw)])
        results = theirs["results"][task]
        assert results[f"{metric},{filter_}"] == pytest.approx(values.mean(), abs=1e-12)
        stderr = values.std(ddof=1) / np.sqrt(len(values))
        assert results[f"{metric}_stderr,{filter_}"] == pytest.approx(stderr, abs=1e-12)
