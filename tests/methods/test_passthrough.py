"""passthrough: the input as it is, or scaled."""

from __future__ import annotations

import pytest
import torch

from tests.methods import oracle
from tests.methods.oracle import merge


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_copies_bit_for_bit(dtype: torch.dtype) -> None:
    x, _ = oracle.checkpoints(500, dtype=dtype)
    x[0] = -0.0
    merged = merge("passthrough", None, [x]).to(dtype)
    assert torch.equal(merged, x)
    assert torch.signbit(merged[0])


def test_scales() -> None:
    x = torch.tensor([1.0, -2.0])
    assert merge("passthrough", None, [x], scale=0.5).tolist() == [0.5, -1]
    assert merge("passthrough", None, [x], scale=0.0, dialect="mergekit").tolist() == [0, 0]
