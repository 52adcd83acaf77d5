"""The token budget of a forward pass: the largest that fits, found once, recorded with the run."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from evomerge.engines import probing
from evomerge.engines.live import LiveModel
from evomerge.engines.trials import try_savings


@pytest.mark.parametrize(
    ("limit", "budget"), [(10, 1024), (1024, 1024), (5000, 4096), (8192, 8192), (10**9, 65536)]
)
def test_the_largest_power_of_two_that_fits(limit: int, budget: int) -> None:
    assert probing.largest_that_fits(lambda tokens: tokens <= limit) == budget


def test_exhausted_memory_does_not_fit_and_a_mistake_is_raised(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = LiveModel(model, torch.device("cpu"), 512)
    try_savings(live)
    assert live.forks
    assert probing.fits(live, 300, longest=100, room=None)

    def full(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(live, "hidden", full)
    assert not probing.fits(live, 300, longest=100, room=None)
    monkeypatch.setattr(live, "hidden", None)
    with pytest.raises(TypeError):
        probing.fits(live, 300, longest=100, room=None)


def test_probing_in_a_process_of_its_own(family: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    options: Any = {"dtype": "float32", "device": "cpu", "longest": 8, "max_length": 8, "largest": 2048}
    assert probing.probe_batch_tokens(str(family["base"]), **options) == 2048
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    assert probing.probe_batch_tokens(str(family["base"]), **options) is None
