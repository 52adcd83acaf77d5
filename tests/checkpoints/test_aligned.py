"""Rows of embedding and head read in another order: whatever is asked for, the bytes are the same."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.checkpoints import open_checkpoint
from evomerge.checkpoints.aligned import Alignment, Fill, align, with_head
from evomerge.checkpoints.reader import Checkpoint
from tests.models import VOCAB, make_model

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ROWS, WIDTH = 40, 8


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> list[Checkpoint]:
    folder = tmp_path_factory.mktemp("parents")
    dtypes = (torch.bfloat16, torch.bfloat16, torch.float32)
    return [
        open_checkpoint(make_model(folder / str(i), seed=i, dtype=dtype, hidden=WIDTH, layers=1))
        for i, dtype in enumerate(dtypes)
    ]


row = st.one_of(st.just(-1), st.integers(0, VOCAB - 1))
# Stretches of consecutive rows are what vocabularies are made of.
stretch = st.tuples(st.integers(0, VOCAB - 12), st.integers(1, 12)).map(lambda s: list(range(s[0], sum(s))))
own = st.lists(st.one_of(stretch, row.map(lambda r: [r])), min_size=ROWS).map(lambda p: [*chain(*p)][:ROWS])


def expected(
    parents: Sequence[Checkpoint], own: Sequence[int], fill: np.ndarray, tokens: int
) -> torch.Tensor:
    tables = [parent.tensor(EMBEDDING).double() for parent in parents]
    rows = []
    for i in range(tokens):
        given = [table[r] for table, r in zip(tables, fill[:, i], strict=True) if r >= 0]
        if own[i] >= 0:
            rows.append(tables[0][own[i]])
        else:
            rows.append(sum(given) / len(given) if given else torch.zeros(WIDTH).double())
    rows += [torch.stack(rows).mean(dim=0)] * (ROWS - tokens)
    return torch.stack(rows)


@settings(max_examples=60, deadline=None)
@given(
    own=own,
    fill=st.lists(st.lists(row, min_size=ROWS, max_size=ROWS), min_size=3, max_size=3),
    tokens=st.integers(1, ROWS),
    start=st.integers(0, ROWS * WIDTH),
    length=st.integers(0, ROWS * WIDTH),
)
def test_any_part_of_an_aligned_tensor_is_that_of_the_rows_one_by_one(
    parents: list[Checkpoint], own: list[int], fill: list[list[int]], tokens: int, start: int, length: int
) -> None:
    alignment = Alignment(np.array(own), Fill(tuple(parents), np.array(fill)), tokens)
    viewed = align(parents[0], {EMBEDDING: alignment})
    dtype = viewed.read_dtype(EMBEDDING)
    whole = viewed.tensor(EMBEDDING)
    assert whole.shape == (ROWS, WIDTH)
    assert not viewed.mapped(EMBEDDING)
    torch.testing.assert_close(
        whole.double(), expected(parents, own, np.array(fill), tokens), rtol=1e-6, atol=1e-7
    )
    stop = min(start + length, ROWS * WIDTH)
    part = viewed.read_into(EMBEDDING, start, torch.empty(stop - start, dtype=dtype))
    assert torch.equal(part, whole.view(-1)[start:stop])


def test_rows_of_one_format_are_read_in_it_and_means_in_a_wider_one(parents: list[Checkpoint]) -> None:
    some = np.array([3, -1])
    for rows, dtype in (
        ([[-1, -1], [-1, 5], [-1, -1]], torch.bfloat16),
        ([[-1, 5], [-1, 5], [-1, -1]], torch.float32),
        ([[-1, -1], [-1, -1], [-1, 5]], torch.float32),
        ([[-1, -1], [-1, -1], [5, -1]], torch.bfloat16),
    ):
        viewed = align(parents[0], {HEAD: Alignment(some, Fill(tuple(parents), np.array(rows)), 2)})
        assert viewed.read_dtype(HEAD) == dtype
        assert viewed.sha256 == parents[0].sha256


def test_the_head_of_a_tied_checkpoint_is_its_embedding(tmp_path: Path) -> None:
    tied = open_checkpoint(make_model(tmp_path / "tied", tied=True, layers=1))
    viewed = with_head(tied, HEAD)
    assert not viewed.tied
    assert viewed.mapped(HEAD)
    assert torch.equal(viewed.tensor(HEAD), tied.tensor(EMBEDDING))
    out = viewed.read_into(HEAD, 5, torch.empty(7))
    assert torch.equal(out, tied.tensor(EMBEDDING).view(-1)[5:12])
