"""slerp: interpolation on the great circle, of un-normalised tensors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.methods import oracle
from tests.methods.oracle import merge


def unit(k: int, scale: float = 1.0) -> torch.Tensor:
    vector = torch.zeros(2, dtype=torch.float64)
    vector[k] = scale
    return vector


@pytest.mark.parametrize(
    ("x", "y", "t", "expected"),
    [
        (unit(0), unit(1), 0.25, (0.923880, 0.382683)),
        (unit(0), unit(1), 0.5, (0.707107, 0.707107)),
        (unit(0), unit(1, 3.0), 0.5, (0.707107, 2.121320)),
        (torch.zeros(2), unit(1), 0.5, (0.0, 0.707107)),
        (unit(0), torch.zeros(2), 0.5, (0.707107, 0.0)),
        (unit(0), -unit(0), 0.5, (0.0, 0.0)),
        (torch.zeros(2), torch.zeros(2), 0.3, (0.0, 0.0)),
    ],
)
def test_golden_values(x: torch.Tensor, y: torch.Tensor, t: float, expected: tuple[float, float]) -> None:
    assert merge("slerp", None, [x, y], t=t).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("t", [-0.2, 0.1, 0.5, 0.9, 1.3])
@pytest.mark.parametrize("spread", [0.03, 0.3, 3.0])
def test_follows_the_formula(t: float, spread: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(70_000, dtype=torch.float64, generator=generator)
    y = x + spread * torch.randn(70_000, dtype=torch.float64, generator=generator)
    merged = merge("slerp", None, [x, y], t=t)
    np.testing.assert_allclose(merged.numpy(), oracle.slerp(x, y, t), rtol=1e-9, atol=1e-10)


def test_a_hundredth_of_a_radian_is_interpolated_linearly() -> None:
    x, y = unit(0), torch.tensor([np.cos(0.01), np.sin(0.01)])
    assert torch.equal(merge("slerp", None, [x, y], t=0.25), 0.75 * x + 0.25 * y)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_ends_are_the_inputs_bit_for_bit(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(1000, generator=generator).to(dtype) for _ in range(2))
    assert torch.equal(merge("slerp", None, [x, y], t=0.0).to(dtype), x)
    assert torch.equal(merge("slerp", None, [x, y], t=1.0).to(dtype), y)


def test_equal_inputs_give_that_input() -> None:
    x, _ = oracle.checkpoints(5000)
    assert torch.equal(merge("slerp", None, [x, x], t=0.37).bfloat16(), x)


def test_swapping_the_inputs_mirrors_t() -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(1000, generator=generator, dtype=torch.float64) for _ in range(2))
    torch.testing.assert_close(
        merge("slerp", None, [x, y], t=0.3), merge("slerp", None, [y, x], t=0.7), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_scaling_both_inputs_scales_the_result(scale: float) -> None:
    x, y = (
        torch.tensor([3.0, 4.0, 0.0], dtype=torch.float64),
        torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64),
    )
    torch.testing.assert_close(
        merge("slerp", None, [scale * x, scale * y], t=0.3),
        scale * merge("slerp", None, [x, y], t=0.3),
        rtol=1e-12,
        atol=0,
    )


def test_one_element_tensors_are_interpolated_linearly() -> None:
    x, y = torch.tensor(2.0), torch.tensor(4.0)
    assert merge("slerp", None, [x, y], t=0.25).item() == 2.5


def test_a_non_finite_input_gives_a_non_finite_result() -> None:
    x, y = torch.tensor([1.0, float("nan")]), torch.tensor([0.0, 1.0])
    assert not torch.isfinite(merge("slerp", None, [x, y], t=0.5)).any()


def test_in_mergekits_dialect_the_base_is_where_t_is_0() -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(1000, generator=generator) for _ in range(2))
    assert torch.equal(merge("slerp", x, [y], t=0.3, dialect="mergekit"), merge("slerp", None, [x, y], t=0.3))
