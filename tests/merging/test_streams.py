"""Streams over stored tensors: the bytes of the file, however they are asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from evomerge.checkpoints import open_checkpoint
from evomerge.merging import streams
from evomerge.merging.streams import Arena, StreamedTensor
from tests.models import make_family

EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make_family(tmp_path_factory.mktemp("streams"))["base"]


@pytest.mark.parametrize("mapped", [True, False])
def test_a_stream_gives_what_is_stored(base, monkeypatch, mapped):
    monkeypatch.setattr(streams, "_WINDOW", 1 << 12)
    if not mapped:
        monkeypatch.setattr(streams, "populate", lambda view: False)
    stored = load_file(base / "model.safetensors")[EMBEDDING].reshape(-1)
    checkpoint = open_checkpoint(base)
    stream = StreamedTensor(checkpoint, EMBEDDING, Arena(), 0)
    n = stream.numel()
    pieces = [stream[start : start + 1000].clone() for start in range(0, n, 1000)]
    assert torch.equal(torch.cat(pieces), stored)
    for start, stop in ((n - 7, n), (0, 3), (n // 2, n // 2 + 900), (5, 5), (100, 4000)):
        assert torch.equal(stream[start:stop], stored[start:stop])


def test_a_stream_whose_slot_went_to_another_still_reads_its_own(base):
    stored = load_file(base / "model.safetensors")
    checkpoint, arena = open_checkpoint(base), Arena()
    first = StreamedTensor(checkpoint, EMBEDDING, arena, 0)
    assert torch.equal(first[:50], stored[EMBEDDING].reshape(-1)[:50])
    norm = StreamedTensor(checkpoint, "model.norm.weight", arena, 0)
    assert torch.equal(norm[:8], stored["model.norm.weight"][:8])
    assert torch.equal(first[10:60], stored[EMBEDDING].reshape(-1)[10:60])
    arena.close()
    assert torch.equal(norm[:8], stored["model.norm.weight"][:8])
