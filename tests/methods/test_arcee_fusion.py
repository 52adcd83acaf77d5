"""arcee_fusion: what matters most of the changes."""

from __future__ import annotations

import torch

from tests.methods import oracle
from tests.methods.oracle import merge


def test_agrees_with_the_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(30, 50, generator=generator, dtype=torch.float64)
    expert = base + 0.1 * torch.randn(30, 50, generator=generator, dtype=torch.float64)
    p, q = (x.softmax(dim=-1) + 1e-8 for x in (expert, base))
    importance = (expert - base).abs() * (p * (p / q).log()).sum(dim=-1, keepdim=True)
    ordered = importance.flatten().sort().values
    n = ordered.numel()
    low, middle, high = (ordered[int(share * (n - 1))] for share in (0.25, 0.5, 0.75))
    expected = torch.where(importance >= middle + 1.5 * (high - low), expert, base)
    merged = merge("arcee_fusion", base, [expert])
    torch.testing.assert_close(merged, expected, rtol=1e-14, atol=1e-14)
    assert 0.02 < (merged != base).double().mean() < 0.5


def test_equal_models_give_that_model() -> None:
    base, _ = oracle.checkpoints(200)
    assert torch.equal(merge("arcee_fusion", base, [base.clone()]).bfloat16(), base)


def test_the_quartiles_are_exact_in_float32_too() -> None:
    base, (expert,) = oracle.checkpoints(4000, experts=1)
    shaped = [x.reshape(50, 80) for x in (base, expert)]
    half = merge("arcee_fusion", shaped[0], [shaped[1]])
    double = merge("arcee_fusion", shaped[0].double(), [shaped[1].double()])
    assert torch.equal(half.bfloat16(), double.bfloat16())
