"""nearswap: each weight moves by at most t."""

from __future__ import annotations

import pytest
import torch

from tests.methods import oracle
from tests.methods.oracle import merge


def test_golden_values() -> None:
    a, b = torch.zeros(3, dtype=torch.float64), torch.tensor([1e-3, 1e-5, 1.0], dtype=torch.float64)
    assert merge("nearswap", a, [b], t=1e-4).tolist() == [1e-4, 1e-5, 1e-4]
    assert merge("nearswap", a, [-b], t=1e-4).tolist() == [-1e-4, -1e-5, -1e-4]


def test_close_weights_become_the_inputs_bit_for_bit() -> None:
    base, (expert,) = oracle.checkpoints(3000, experts=1)
    merged = merge("nearswap", base, [expert], t=1e-3).bfloat16()
    close = (expert.float() - base.float()).abs() <= 1e-3
    assert 0.2 < close.double().mean() < 0.8
    assert torch.equal(merged[close], expert[close])
    assert torch.equal(merge("nearswap", base, [expert], t=0.0).bfloat16(), base)


def test_takes_one_input_and_no_negative_threshold() -> None:
    x = torch.ones(2)
    with pytest.raises(ValueError, match="nearswap takes exactly 1 input, here are 2"):
        merge("nearswap", x, [x, x], t=1.0)
    with pytest.raises(ValueError, match=r"t: -1.0 lies outside \[0, inf\)"):
        merge("nearswap", x, [x], t=-1.0)
