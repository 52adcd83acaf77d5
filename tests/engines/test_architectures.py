"""Scores of a live model of every architecture, against its plain forward pass."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from evomerge.engines.hf import HFEngine
from evomerge.evaluation.requests import Generation, Loglikelihood
from evomerge.merging import Materializer, open_parents
from tests.merging.helpers import make_recipe
from tests.models import ARCHITECTURES, WRAPPERS, make_model, make_tokenizer

REQUESTS = [Loglikelihood("abc" * k, " " + end) for k in (1, 4) for end in ("yes", "no", "perhaps")]


@pytest.mark.parametrize("kind", [*ARCHITECTURES, *WRAPPERS])
def test_scores_are_those_of_the_plain_forward_pass(kind: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m", 3, kind=kind, layers=2)
    recipe = make_recipe({"m": folder}, path=[{"model": "m", "layer": 1}, {"model": "m", "layer": 0}])
    model = Materializer(open_parents(recipe)).materialize(recipe)
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    engine = HFEngine(model, tokenizer, batch_tokens=64, max_length=64)
    expected = []
    for request in REQUESTS:
        context, whole = (
            tokenizer.encode(text) for text in (request.context, request.context + request.continuation)
        )
        with torch.no_grad():
            logits = model(torch.tensor([whole])).logits[0, :-1].double().log_softmax(-1)
        targets = torch.tensor(whole[1:])[:, None]
        expected.append(float(logits.gather(1, targets)[len(context) - 1 :].sum()))
    np.testing.assert_allclose([score for score, _ in engine.loglikelihood(REQUESTS)], expected, rtol=1e-4)
    assert len(engine.generate([Generation("abc", ("#",), 4)])) == 1
