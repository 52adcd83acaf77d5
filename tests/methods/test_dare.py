"""dare_linear and dare_ties: random drops of task vectors, rescaled."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from evomerge.methods import MaskKey
from tests.methods import oracle
from tests.methods.oracle import merge

KEY = MaskKey(seed=3, experts=("aa", "bb", "cc"), tensor="model.layers.0.mlp.up_proj.weight")
ALONE = MaskKey(seed=3, experts=("aa",), tensor=KEY.tensor)


def dropped(
    base: torch.Tensor, experts: list[torch.Tensor], densities: tuple[float, ...]
) -> list[np.ndarray]:
    origin, *others = oracle.doubles(base, *experts)
    return [
        oracle.kept(KEY, k, origin.size, density) * (x - origin) / density
        for k, (x, density) in enumerate(zip(others, densities, strict=True))
    ]


@pytest.mark.parametrize("densities", [(0.1, 0.1, 0.1), (0.3, 1.0, 0.7)])
def test_dare_linear_given_the_mask_is_task_arithmetic(densities: tuple[float, ...]) -> None:
    base, experts = oracle.checkpoints(5000, dtype=torch.float64)
    weights = (0.6, -0.2, 0.4)
    merged = merge("dare_linear", base, experts, weight=weights, density=densities, lambda_=0.8, masks=KEY)
    deltas = dropped(base, experts, densities)
    expected = base.numpy() + 0.8 * sum(w * d for w, d in zip(weights, deltas, strict=True))
    np.testing.assert_allclose(merged.numpy(), expected, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.6, -0.2, 0.4)])
def test_dare_ties_given_the_mask_elects_without_a_trim(weights: tuple[float, ...]) -> None:
    base, experts = oracle.checkpoints(5000, dtype=torch.float64)
    densities = (0.3, 0.5, 0.9)
    merged = merge("dare_ties", base, experts, weight=weights, density=densities, lambda_=0.8, masks=KEY)
    expected = base.numpy() + 0.8 * oracle.disjoint_merge(dropped(base, experts, densities), weights)
    np.testing.assert_allclose(merged.numpy(), expected, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("rescale", [True, False])
def test_the_mergekit_dialect_restores_the_sum_of_magnitudes(rescale: bool) -> None:
    base, experts = oracle.checkpoints(5000, dtype=torch.float64)
    weights, densities = (0.6, -0.2, 0.4), (0.3, 1.0, 0.7)
    values = {"weight": weights, "density": densities, "rescale": rescale}
    merged = merge("dare_linear", base, experts, masks=KEY, dialect="mergekit", **values)
    origin, *others = oracle.doubles(base, *experts)
    expected = origin.copy()
    for k, (x, weight, density) in enumerate(zip(others, weights, densities, strict=True)):
        kept = oracle.kept(KEY, k, origin.size, density) * (x - origin)
        expected += weight * kept * (np.abs(x - origin).sum() / np.abs(kept).sum() if rescale else 1)
    np.testing.assert_allclose(merged.numpy(), expected, rtol=1e-11, atol=1e-15)


def test_a_mask_that_keeps_nothing_gives_the_base_in_every_dialect() -> None:
    base, (expert,) = torch.zeros(1), [torch.ones(1)]
    for dialect in ("paper", "mergekit"):
        merged = merge("dare_linear", base, [expert], weight=1.0, density=1e-9, masks=ALONE, dialect=dialect)
        assert merged.tolist() == [0]


def test_moments_are_those_of_the_paper() -> None:
    n, density = 1 << 18, 0.1
    delta = torch.randn(n, generator=torch.Generator().manual_seed(0))
    merged = merge("dare_linear", torch.zeros(n), [delta], weight=1.0, density=density, masks=ALONE)
    squared = delta.square().sum()
    error = (merged - delta).square().sum() / squared
    cosine = (merged @ delta) / (merged.norm() * delta.norm())
    mean_error = (merged - delta).mean() / delta.square().mean().sqrt()
    assert error.item() == pytest.approx(9.0, rel=0.05)
    assert cosine.item() == pytest.approx(0.1**0.5, rel=0.02)
    assert abs(mean_error.item()) < 5 * 3 / n**0.5
    assert (merged[merged != 0] / delta[merged != 0]).unique().numpy() == pytest.approx(10, rel=1e-6)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
@pytest.mark.parametrize("dialect", ["paper", "mergekit"])
def test_density_zero_drops_everything(method: str, dialect: str) -> None:
    base, experts = oracle.checkpoints(1000)
    merged = merge(method, base, experts, weight=0.4, density=0.0, masks=KEY, dialect=dialect)
    assert torch.equal(merged.bfloat16(), base)


def test_density_one_is_task_arithmetic() -> None:
    base, experts = oracle.checkpoints(1000)
    merged = merge("dare_linear", base, experts, weight=0.4, density=1.0, masks=KEY)
    assert torch.equal(merged, merge("task_arithmetic", base, experts, weight=0.4))


def test_density_one_of_dare_ties_is_ties_without_a_trim() -> None:
    base, experts = oracle.checkpoints(1000)
    merged = merge("dare_ties", base, experts, weight=0.4, density=1.0, masks=KEY)
    assert torch.equal(merged, merge("ties", base, experts, weight=0.4, density=1.0))


def test_an_experts_mask_goes_with_the_expert_not_with_its_place() -> None:
    base, experts = oracle.checkpoints(2000)
    turned = MaskKey(KEY.seed, KEY.experts[::-1], KEY.tensor)
    one = merge("dare_linear", base, experts, weight=(0.2, 0.3, 0.5), masks=KEY)
    other = merge("dare_linear", base, experts[::-1], weight=(0.5, 0.3, 0.2), masks=turned)
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


def test_another_seed_gives_another_mask() -> None:
    base, experts = oracle.checkpoints(2000)
    other = MaskKey(KEY.seed + 1, KEY.experts, KEY.tensor)
    assert not torch.equal(
        merge("dare_linear", base, experts, weight=1.0, masks=KEY),
        merge("dare_linear", base, experts, weight=1.0, masks=other),
    )


def test_a_mask_key_is_needed_and_must_name_every_input() -> None:
    x = torch.ones(3)
    with pytest.raises(ValueError, match="needs a mask key"):
        merge("dare_ties", x, [x])
    with pytest.raises(ValueError, match="names 1 experts, here are 2 inputs"):
        merge("dare_ties", x, [x, x], masks=ALONE)
