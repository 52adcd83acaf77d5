"""della and della_linear: random drops by rank."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from evomerge.errors import CandidateFailed
from evomerge.methods import MaskKey
from evomerge.methods.della import magprune, places
from evomerge.methods.operands import Operands
from tests.methods import oracle
from tests.methods.oracle import merge

KEY = MaskKey(seed=3, experts=("aa", "bb", "cc"), tensor="w")
ALONE = MaskKey(seed=3, experts=("aa",), tensor="w")


def probabilities(delta: torch.Tensor, density: float, epsilon: float) -> np.ndarray:
    operands = Operands(torch.zeros_like(delta), [delta], ALONE)
    values = {"density": (density,), "epsilon": (epsilon,)}
    return magprune(operands, values)[1](0, 0, delta.numel()).reshape(delta.shape)


def test_golden_keep_probabilities() -> None:
    found = probabilities(torch.tensor([0.1, -0.4, 0.2, 0.3]), 0.5, 0.2)
    np.testing.assert_allclose(found, [0.3, 0.7, 0.5 - 0.2 / 3, 0.5 + 0.2 / 3], rtol=1e-12)


def test_ranks_are_those_of_the_row_and_equal_entries_share_theirs() -> None:
    delta = torch.tensor([[1.0, 2.0, 3.0], [9.0, -9.0, 7.0], [5.0, 5.0, 5.0]])
    expected = [[0.3, 0.5, 0.7], [0.6, 0.6, 0.3], [0.5, 0.5, 0.5]]
    np.testing.assert_allclose(probabilities(delta, 0.5, 0.2), expected, rtol=1e-12)


@pytest.mark.parametrize("shape", [(1,), (4, 1), (1, 1)])
def test_a_row_of_one_entry_is_kept_with_the_density(shape: tuple[int, ...]) -> None:
    np.testing.assert_allclose(probabilities(torch.ones(shape), 0.4, 0.2), np.full(shape, 0.4))


@pytest.mark.parametrize("width", [2, 3, 100, 3000])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_ranks_are_exact_with_and_without_ties(width: int, dtype: type) -> None:
    generator = np.random.default_rng(0)
    rows = np.concatenate(
        [generator.integers(0, 40, (3, width)), generator.random((3, width)), np.ones((1, width))]
    )
    rows = rows.astype(dtype)
    for row, found in zip(rows, 0.4 + 0.2 * places(rows), strict=True):
        np.testing.assert_allclose(found, oracle.keep_probabilities(row, 0.5, 0.1), rtol=1e-12)


def test_the_compiled_ranks_are_those_of_numpy() -> None:
    rows = np.random.default_rng(0).exponential(size=(5, 2000)).astype(np.float32)
    rows[:, ::3] = rows[:, 1:2]
    np.testing.assert_array_equal(places(rows), places(rows.astype(np.float64)))


def pruned(
    base: torch.Tensor,
    experts: list[torch.Tensor],
    densities: tuple[float, ...],
    epsilon: float,
    divide: bool,
) -> list[np.ndarray]:
    found = []
    for k, (x, density) in enumerate(zip(experts, densities, strict=True)):
        delta = (x - base).double().numpy()
        rows = delta.reshape(-1, delta.shape[-1])
        p = np.stack([oracle.keep_probabilities(row, density, epsilon) for row in rows]).reshape(-1)
        hashes = [oracle.hash_v1(KEY.seed, KEY.experts[k], KEY.tensor, i) for i in range(p.size)]
        kept = np.where(np.array(hashes) / 2**32 < p, rows.reshape(-1), 0.0)
        factor = 1 / p if divide else np.abs(rows).sum() / np.abs(kept).sum()
        found.append(kept * factor)
    return found


@pytest.mark.parametrize("dialect", ["paper", "mergekit"])
def test_given_the_mask_it_is_the_formula(dialect: str) -> None:
    base, experts = oracle.checkpoints(3000, dtype=torch.float64)
    base, experts = base.reshape(20, 150), [x.reshape(20, 150) for x in experts]
    weights, densities = (0.6, -0.2, 0.4), (0.3, 0.5, 0.7)
    values = {"weight": weights, "density": densities, "epsilon": 0.2, "lambda_": 0.8, "masks": KEY}
    sparse = pruned(base, experts, densities, 0.2, dialect == "paper")
    merged = merge("della_linear", base, experts, dialect=dialect, **values)
    expected = base.numpy().reshape(-1) + 0.8 * sum(w * s for w, s in zip(weights, sparse, strict=True))
    np.testing.assert_allclose(merged.numpy().reshape(-1), expected, rtol=1e-11, atol=1e-15)
    merged = merge("della", base, experts, dialect=dialect, **values)
    rule = ("sum", "mean", "majority") if dialect == "paper" else ("sum", "weighted", "positive")
    expected = base.numpy().reshape(-1) + 0.8 * oracle.disjoint_merge(sparse, weights, *rule)
    np.testing.assert_allclose(merged.numpy().reshape(-1), expected, rtol=1e-11, atol=1e-15)


def test_the_expectation_is_the_task_vector() -> None:
    delta = torch.rand(1 << 17, generator=torch.Generator().manual_seed(0)).reshape(64, -1) + 0.5
    merged = merge("della_linear", torch.zeros_like(delta), [delta], weight=1.0, masks=ALONE, density=0.4)
    kept = (merged != 0).double()
    n = delta.numel()
    assert abs(kept.mean().item() - 0.4) < 5 * (0.4 * 0.6 / n) ** 0.5
    # The variance of an entry is (1 - p)/p · delta².
    p = torch.from_numpy(probabilities(delta, 0.4, 0.15))
    error = ((merged - delta).sum() / ((1 - p) / p * delta.double().square()).sum().sqrt()).item()
    assert abs(error) < 5
    upper = delta > delta.median(dim=1, keepdim=True).values
    assert kept[upper].mean() > kept[~upper].mean() + 0.1


def test_without_a_span_it_is_dare() -> None:
    base, experts = oracle.checkpoints(2000)
    values = {"weight": (0.6, -0.2, 0.4), "density": (0.3, 0.5, 0.7), "masks": KEY}
    ours = merge("della_linear", base, experts, epsilon=0.0, **values)
    torch.testing.assert_close(ours, merge("dare_linear", base, experts, **values), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("method", ["della", "della_linear"])
@pytest.mark.parametrize("dialect", ["paper", "mergekit"])
def test_density_zero_and_one(method: str, dialect: str) -> None:
    base, experts = oracle.checkpoints(300)
    values = {"weight": 0.5, "masks": KEY, "dialect": dialect}
    assert torch.equal(merge(method, base, experts, density=0.0, **values).bfloat16(), base)
    (other,) = {"della": ["ties"], "della_linear": ["task_arithmetic"]}[method]
    dense = {"density": 1.0} if other == "ties" else {}
    full = merge(other, base, experts, weight=0.5, dialect=dialect, **dense)
    assert torch.equal(merge(method, base, experts, density=1.0, **values), full)


@pytest.mark.parametrize(("density", "epsilon"), [(0.1, 0.15), (0.9, 0.15), (0.15, 0.15)])
def test_probabilities_that_leave_zero_to_one_are_refused(density: float, epsilon: float) -> None:
    base, experts = oracle.checkpoints(10)
    with pytest.raises(CandidateFailed, match=f"della: density {density:g} and epsilon {epsilon:g} give"):
        merge("della", base, experts, density=density, epsilon=epsilon, masks=KEY)
