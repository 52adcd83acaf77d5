"""regmean: linear layers by least squares, against NumPy's own least squares."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from evomerge.errors import CandidateFailed
from evomerge.methods import Statistic, regmean
from tests.methods import oracle
from tests.methods.oracle import merge

IN, OUT = 7, 5


def layer(
    tokens: tuple[int, ...] = (40, 30, 20), inputs: int = IN
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Weights ``(OUT, inputs)`` and layer inputs ``(tokens, inputs)`` of three models, in float64."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mixing = normal(inputs, inputs)
    return [normal(OUT, inputs) for _ in tokens], [normal(n, inputs) @ mixing for n in tokens]


def gram(x: torch.Tensor) -> torch.Tensor:
    return x.T @ x / len(x)


def lstsq(weights: list[torch.Tensor], xs: list[torch.Tensor], shares: tuple[float, ...]) -> np.ndarray:
    """min Σ share_k ‖X_k W' − X_k W_k'‖² / tokens_k, by stacking: no Gram matrix involved."""
    scaled = [np.sqrt(s / len(x)) * x.numpy() for x, s in zip(xs, shares, strict=True)]
    targets = [x @ w.numpy().T for x, w in zip(scaled, weights, strict=True)]
    solution, *_ = np.linalg.lstsq(np.concatenate(scaled), np.concatenate(targets), rcond=None)
    return solution.T


@pytest.mark.parametrize("method", ["regmean", "regmean++"])
@pytest.mark.parametrize("shares", [(1.0, 1.0, 1.0), (0.5, 2.0, 1.0), (0.0, 1.0, 3.0)])
def test_solves_the_stacked_regression(method: str, shares: tuple[float, ...]) -> None:
    weights, xs = layer()
    merged = merge(
        method, None, weights, statistics=[gram(x) for x in xs], weight=shares, alpha=1.0, ridge=0.0
    )
    np.testing.assert_allclose(merged.numpy(), lstsq(weights, xs, shares), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9])
def test_alpha_damps_what_lies_off_the_diagonal(alpha: float) -> None:
    weights, xs = layer()
    damped = [alpha * gram(x) + (1 - alpha) * gram(x).diag().diag() for x in xs]
    right = sum(w @ g for w, g in zip(weights, damped, strict=True))
    expected = np.linalg.solve(sum(damped).numpy(), right.numpy().T).T
    merged = merge(
        "regmean", None, weights, statistics=[gram(x) for x in xs], weight=1.0, alpha=alpha, ridge=0.0
    )
    np.testing.assert_allclose(merged.numpy(), expected, rtol=1e-8, atol=1e-10)


def test_the_golden_value() -> None:
    weights = [torch.tensor([[1.0, 1.0]]), torch.tensor([[3.0, 5.0]])]
    grams = [torch.tensor([1.0, 3.0]).diag(), torch.eye(2)]
    merged = merge("regmean", None, weights, statistics=grams, ridge=0.0)
    np.testing.assert_allclose(merged.numpy(), [[2, 2]], rtol=1e-6)


def test_the_golden_value_of_alpha() -> None:
    matrix = Statistic(torch.tensor([2.0, 1.0, 1.0, 2.0]))
    assert regmean.gram(matrix, 2, 0.5).tolist() == [[2, 0.5], [0.5, 2]]


def test_diagonal_grams_weigh_each_column_like_fisher() -> None:
    weights, _ = layer()
    energies = [torch.rand(IN, dtype=torch.float64) + 0.1 for _ in weights]
    merged = merge("regmean", None, weights, statistics=[e.diag() for e in energies], ridge=0.0)
    expected = merge(
        "fisher", None, weights, statistics=[e.expand(OUT, IN) for e in energies], normalize=False, floor=0.0
    )
    torch.testing.assert_close(merged, expected)


def test_equal_grams_give_the_mean() -> None:
    weights, xs = layer()
    merged = merge("regmean", None, weights, statistics=[gram(xs[0])] * 3)
    torch.testing.assert_close(merged, sum(weights) / 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_weights_are_kept_bit_for_bit(dtype: torch.dtype) -> None:
    weights, xs = layer()
    same = weights[0].to(dtype)
    merged = merge("regmean", None, [same] * 3, statistics=[gram(x) for x in xs])
    assert torch.equal(merged.to(dtype), same)


@pytest.mark.parametrize("weight", [(0.0, 2.0, 0.0), (1.0,)])
def test_one_model_alone_is_copied(weight: tuple[float, ...]) -> None:
    weights, xs = layer()
    chosen = weights[: len(weight)]
    merged = merge("regmean", None, chosen, statistics=[gram(x) for x in xs[: len(weight)]], weight=weight)
    assert torch.equal(merged, chosen[weight.index(max(weight))])


def test_transposed_weights_give_the_transposed_result() -> None:
    weights, xs = layer()
    plain = merge("regmean", None, weights, statistics=[gram(x) for x in xs])
    turned = merge(
        "regmean",
        None,
        [w.T.contiguous() for w in weights],
        statistics=[gram(x) for x in xs],
        transposed=True,
    )
    assert torch.equal(turned.T, plain)


def test_a_dead_feature_keeps_the_mean_of_its_column() -> None:
    weights, xs = layer()
    for x in xs:
        x[:, 2] = 0
    merged = merge("regmean", None, weights, statistics=[gram(x) for x in xs])
    torch.testing.assert_close(merged[:, 2], sum(w[:, 2] for w in weights) / 3)
    live = [i for i in range(IN) if i != 2]
    alone = merge(
        "regmean",
        None,
        [w[:, live] for w in weights],
        statistics=[gram(x[:, live]) for x in xs],
        ridge=1e-6 * 6 / 7,
    )
    torch.testing.assert_close(merged[:, live], alone)


def test_fewer_tokens_than_features_still_has_a_solution() -> None:
    weights, xs = layer(tokens=(2, 1, 2), inputs=30)
    grams = [gram(x) for x in xs]
    merged = merge("regmean", None, weights, statistics=grams, alpha=1.0, ridge=1e-8)
    mean = sum(weights) / 3
    targets = [x @ (w - mean).T for x, w in zip(xs, weights, strict=True)]
    scaled = [np.sqrt(1 / len(x)) for x in xs]
    stacked = np.concatenate([s * x.numpy() for s, x in zip(scaled, xs, strict=True)])
    wanted = np.concatenate([s * t.numpy() for s, t in zip(scaled, targets, strict=True)])
    least, *_ = np.linalg.lstsq(stacked, wanted, rcond=None)
    np.testing.assert_allclose(merged.numpy(), mean.numpy() + least.T, rtol=1e-4, atol=1e-4)
    with pytest.raises(CandidateFailed, match="not positive definite; give alpha below 1"):
        merge("regmean", None, weights, statistics=grams, alpha=1.0, ridge=0.0)


def test_what_has_no_gram_is_averaged() -> None:
    _, inputs = oracle.checkpoints(5000)
    merged = merge("regmean", None, inputs, weight=(1.0, 2.0, 3.0))
    np.testing.assert_allclose(merged.numpy(), oracle.linear(inputs, (1, 2, 3), True), rtol=1e-5, atol=1e-8)


def test_the_order_of_the_inputs_does_not_matter() -> None:
    weights, xs = layer()
    grams = [gram(x) for x in xs]
    one = merge("regmean", None, weights, statistics=grams)
    torch.testing.assert_close(merge("regmean", None, weights[::-1], statistics=grams[::-1]), one)


def test_what_does_not_fit_is_refused() -> None:
    weights, xs = layer()
    with pytest.raises(ValueError, match="a Gram matrix of 9 elements for 7 inputs"):
        merge("regmean", None, weights, statistics=[torch.eye(3)] * 3)
    with pytest.raises(CandidateFailed, match="not finite"):
        merge("regmean", None, weights, statistics=[gram(xs[0]), gram(xs[1]), torch.full((IN, IN), np.nan)])
    with pytest.raises(CandidateFailed, match="all weights are 0"):
        merge("regmean", None, weights, statistics=[gram(x) for x in xs], weight=0.0)
