"""mergekit and peft give the same numbers wherever their dialects agree with the paper's."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from evomerge.methods import MaskKey
from tests.methods import oracle
from tests.methods.oracle import merge

KEY = MaskKey(seed=3, experts=("aa", "bb", "cc"), tensor="w")


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)


class TestMergekit:
    @pytest.fixture
    def peer(self) -> Any:
        return pytest.importorskip("mergekit.merge_methods.api").merge_tensors

    @pytest.mark.parametrize("normalize", [True, False])
    def test_linear(self, peer: Any, normalize: bool) -> None:
        _, experts = oracle.checkpoints(2000, dtype=torch.float64)
        parameters = {"weight": [0.2, 0.9, -0.3], "normalize": normalize}
        theirs = peer(experts, "linear", parameters=parameters)
        close(merge("linear", None, experts, weight=(0.2, 0.9, -0.3), normalize=normalize), theirs)

    @pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
    def test_slerp(self, peer: Any, t: float) -> None:
        generator = torch.Generator().manual_seed(0)
        x, y = (torch.randn(2000, generator=generator, dtype=torch.float64) for _ in range(2))
        theirs = peer([x, y], "slerp", parameters={"t": t}, base_index=0)
        close(merge("slerp", None, [x, y], t=t), theirs)

    def test_task_arithmetic(self, peer: Any) -> None:
        base, experts = oracle.checkpoints(2000, dtype=torch.float64)
        parameters = {"weight": [0.2, 0.9, -0.3], "normalize": False, "lambda": 0.7}
        theirs = peer([base, *experts], "task_arithmetic", parameters=parameters, base_index=0)
        close(merge("task_arithmetic", base, experts, weight=(0.2, 0.9, -0.3), lambda_=0.7), theirs)

    @pytest.mark.parametrize("normalize", [True, False])
    def test_task_arithmetic_normalized(self, peer: Any, normalize: bool) -> None:
        base, experts = oracle.checkpoints(2000, dtype=torch.float64)
        parameters = {"weight": [0.2, 0.9, -0.3], "normalize": normalize, "lambda": 0.7}
        theirs = peer([base, *experts], "task_arithmetic", parameters=parameters, base_index=0)
        ours = merge(
            "task_arithmetic",
            base,
            experts,
            dialect="mergekit",
            weight=(0.2, 0.9, -0.3),
            normalize=normalize,
            lambda_=0.7,
        )
        close(ours, theirs)

    @pytest.mark.parametrize("normalize", [True, False])
    @pytest.mark.parametrize("rescale", [True, False])
    @pytest.mark.parametrize("density", [0.0, 0.0001, 0.3, 1.0])
    def test_ties(self, peer: Any, normalize: bool, rescale: bool, density: float) -> None:
        base, experts = oracle.checkpoints(2000, dtype=torch.float64)
        values = {"weight": (0.4, 0.9, -0.3), "density": (density, 0.5, 0.7)}
        shared = {"normalize": normalize, "rescale": rescale}
        parameters = {**{name: list(value) for name, value in values.items()}, **shared, "lambda": 0.7}
        theirs = peer([base, *experts], "ties", parameters=parameters, base_index=0)
        close(merge("ties", base, experts, dialect="mergekit", lambda_=0.7, **values, **shared), theirs)

    @pytest.mark.parametrize("density", [0.3, 1.0])
    def test_ties_with_equal_weights(self, peer: Any, density: float) -> None:
        base, experts = oracle.checkpoints(2000, dtype=torch.float64)
        parameters = {"weight": [1.0, 1.0, 1.0], "density": [density] * 3, "normalize": True, "lambda": 0.7}
        theirs = peer([base, *experts], "ties", parameters=parameters, base_index=0)
        close(merge("ties", base, experts, density=density, lambda_=0.7), theirs)


class TestMergekitWithOurMasks:
    """mergekit's random methods agree once its draws are replaced by the hashes."""

    @pytest.fixture
    def peer(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        merge_tensors = pytest.importorskip("mergekit.merge_methods.api").merge_tensors
        calls = itertools.count()

        def bernoulli(probabilities: torch.Tensor) -> torch.Tensor:
            k = next(calls) % len(KEY.experts)
            hashes = [
                oracle.hash_v1(KEY.seed, KEY.experts[k], KEY.tensor, i) for i in range(probabilities.numel())
            ]
            draws = torch.tensor(hashes, dtype=torch.float64).reshape(probabilities.shape) / 2**32
            return (draws < probabilities.double()).to(probabilities.dtype)

        monkeypatch.setattr(torch, "bernoulli", bernoulli)
        return merge_tensors

    @pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
    @pytest.mark.parametrize("rescale", [True, False])
    @pytest.mark.parametrize("normalize", [True, False])
    def test_dare(self, peer: Any, method: str, rescale: bool, normalize: bool) -> None:
        base, experts = oracle.checkpoints(3000, dtype=torch.float64)
        values = {"weight": (0.4, 0.9, -0.3), "density": (0.3, 0.5, 0.7)}
        shared = {"normalize": normalize, "rescale": rescale}
        parameters = {**{name: list(value) for name, value in values.items()}, **shared, "lambda": 0.7}
        theirs = peer([base, *experts], method, parameters=parameters, base_index=0)
        ours = merge(method, base, experts, dialect="mergekit", masks=KEY, lambda_=0.7, **values, **shared)
        # mergekit multiplies with the mask in float32.
        torch.testing.assert_close(ours - base, theirs - base, rtol=1e-5, atol=1e-9)


class TestPeft:
    @pytest.fixture
    def peer(self) -> Any:
        return pytest.importorskip("peft.utils.merge_utils")

    @pytest.mark.filterwarnings("ignore:The density")
    @pytest.mark.parametrize("density", [0.3, 1.0])
    def test_ties_with_equal_weights(self, peer: Any, density: float) -> None:
        base, experts = oracle.checkpoints(2000, dtype=torch.float64)
        deltas = [expert - base for expert in experts]
        theirs = peer.ties(deltas, torch.full((3,), 0.4, dtype=torch.float64), density)
        close(merge("ties", base, experts, density=density, weight=0.4), base + theirs)

    def test_task_arithmetic(self, peer: Any) -> None:
        base, experts = oracle.checkpoints(2000, dtype=torch.float64)
        weights = torch.tensor([0.2, 0.9, -0.3], dtype=torch.float64)
        theirs = peer.task_arithmetic([expert - base for expert in experts], weights)
        close(merge("task_arithmetic", base, experts, weight=(0.2, 0.9, -0.3)), base + theirs)
