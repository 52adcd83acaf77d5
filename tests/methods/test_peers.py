"""mergekit and peft give the same numbers wherever their dialects agree with the paper's."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from evomerge.methods import MaskKey
from tests.methods import oracle
from tests.methods.oracle import merge

KEY = MaskKey(seed=3, experts=("aa", "bb", "cc"), tensor="w")


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)


@pytest.fixture
def our_draws() -> Callable[[torch.Tensor], torch.Tensor]:
    """What takes the place of `torch.bernoulli`: the k-th call compares with expert k's hashes."""
    calls = itertools.count()

    def bernoulli(probabilities: torch.Tensor) -> torch.Tensor:
        expert = KEY.experts[next(calls) % len(KEY.experts)]
        hashes = [oracle.hash_v1(KEY.seed, expert, KEY.tensor, i) for i in range(probabilities.numel())]
        draws = torch.tensor(hashes, dtype=torch.float64).reshape(probabilities.shape) / 2**32
        return (draws < probabilities.double()).to(probabilities.dtype)

    return bernoulli


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

    @pytest.mark.parametrize("method", ["breadcrumbs", "breadcrumbs_ties"])
    @pytest.mark.parametrize("rescale", [True, False])
    @pytest.mark.parametrize("density", [0.0, 0.3, 0.995, 1.0])
    def test_breadcrumbs(self, peer: Any, method: str, rescale: bool, density: float) -> None:
        base, experts = oracle.checkpoints(2000, dtype=torch.float64)
        values = {"weight": (0.4, 0.9, -0.3), "density": (density, 0.5, 0.7), "gamma": (0.01, 0.0, 0.2)}
        shared = {"normalize": not rescale, "rescale": rescale}
        parameters = {**{name: list(value) for name, value in values.items()}, **shared, "lambda": 0.7}
        theirs = peer([base, *experts], method, parameters=parameters, base_index=0)
        close(merge(method, base, experts, dialect="mergekit", lambda_=0.7, **values, **shared), theirs)

    @pytest.mark.parametrize("topk", [0.0, 0.1, 1.0])
    def test_sce(self, peer: Any, topk: float) -> None:
        # Changes so large that mergekit's absolute guards do not act.
        base, experts = oracle.checkpoints(2000, dtype=torch.float64)
        base, experts = 100 * base, [100 * x for x in experts]
        theirs = peer([base, *experts], "sce", parameters={"select_topk": topk}, base_index=0)
        close(merge("sce", base, experts, dialect="mergekit", select_topk=topk), theirs)

    def test_nearswap(self, peer: Any) -> None:
        base, experts = oracle.checkpoints(2000, experts=1, dtype=torch.float64)
        theirs = peer([base, *experts], "nearswap", parameters={"t": 1e-3}, base_index=0)
        close(merge("nearswap", base, experts, dialect="mergekit", t=1e-3), theirs)

    @pytest.mark.parametrize("epsilon", [1e-5, 2e-3])
    def test_ram(self, peer: Any, epsilon: float) -> None:
        base, experts = oracle.checkpoints(2000, dtype=torch.float64)
        theirs = peer([base, *experts], "ram", parameters={"epsilon": epsilon}, base_index=0)
        close(merge("ram", base, experts, dialect="mergekit", epsilon=epsilon), theirs)
        values = {"epsilon": epsilon, "r": 0.3, "alpha": 0.9}
        theirs = peer([base, *experts], "ramplus_tl", parameters=values, base_index=0)
        # mergekit's factors are float32.
        ours = merge("ramplus_tl", base, experts, dialect="mergekit", **values)
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)

    def test_arcee_fusion(self, peer: Any) -> None:
        base, experts = oracle.checkpoints(2000, experts=1, dtype=torch.float64)
        base, expert = 50 * base.reshape(40, 50), 50 * experts[0].reshape(40, 50)
        close(merge("arcee_fusion", base, [expert]), peer([base, expert], "arcee_fusion", base_index=0))

    def test_passthrough(self, peer: Any) -> None:
        x, _ = oracle.checkpoints(100, dtype=torch.float64)
        close(
            merge("passthrough", None, [x], scale=0.3), peer([x], "passthrough", parameters={"scale": [0.3]})
        )

    @pytest.mark.parametrize("density", [0.3, 1.0])
    def test_ties_with_equal_weights(self, peer: Any, density: float) -> None:
        base, experts = oracle.checkpoints(2000, dtype=torch.float64)
        parameters = {"weight": [1.0, 1.0, 1.0], "density": [density] * 3, "normalize": True, "lambda": 0.7}
        theirs = peer([base, *experts], "ties", parameters=parameters, base_index=0)
        close(merge("ties", base, experts, density=density, lambda_=0.7), theirs)


class TestMergekitWithOurMasks:
    """mergekit's random methods agree once its draws are replaced by the hashes."""

    @pytest.fixture
    def peer(self, our_draws: Callable[[torch.Tensor], torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> Any:
        merge_tensors = pytest.importorskip("mergekit.merge_methods.api").merge_tensors
        monkeypatch.setattr(torch, "bernoulli", our_draws)
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

    @pytest.mark.parametrize("method", ["della", "della_linear"])
    @pytest.mark.parametrize("rescale", [True, False])
    @pytest.mark.parametrize("normalize", [True, False])
    @pytest.mark.parametrize("shape", [(3000,), (20, 150)])
    def test_della(
        self, peer: Any, method: str, rescale: bool, normalize: bool, shape: tuple[int, ...]
    ) -> None:
        base, experts = oracle.checkpoints(3000, dtype=torch.float64)
        base, experts = base.reshape(shape), [x.reshape(shape) for x in experts]
        values = {"weight": (0.4, 0.9, -0.3), "density": (0.3, 0.5, 0.7), "epsilon": (0.2, 0.15, 0.1)}
        shared = {"normalize": normalize, "rescale": rescale}
        parameters = {**{name: list(value) for name, value in values.items()}, **shared, "lambda": 0.7}
        theirs = peer([base, *experts], method, parameters=parameters, base_index=0)
        ours = merge(method, base, experts, dialect="mergekit", masks=KEY, lambda_=0.7, **values, **shared)
        # mergekit ranks and multiplies with the mask in float32.
        close = (ours - theirs).abs() <= 1e-9 + 1e-5 * (theirs - base).abs()
        assert close.double().mean() >= 0.999


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

    @pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
    def test_dare_with_our_masks(
        self,
        peer: Any,
        method: str,
        our_draws: Callable[[torch.Tensor], torch.Tensor],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        base, experts = oracle.checkpoints(2000, dtype=torch.float64)
        monkeypatch.setattr(torch, "bernoulli", our_draws)
        deltas = [expert - base for expert in experts]
        theirs = getattr(peer, method)(deltas, torch.full((3,), 0.4, dtype=torch.float64), 0.3)
        close(merge(method, base, experts, density=0.3, weight=0.4, masks=KEY), base + theirs)

    def test_task_arithmetic(self, peer: Any) -> None:
        base, experts = oracle.checkpoints(2000, dtype=torch.float64)
        weights = torch.tensor([0.2, 0.9, -0.3], dtype=torch.float64)
        theirs = peer.task_arithmetic([expert - base for expert in experts], weights)
        close(merge("task_arithmetic", base, experts, weight=(0.2, 0.9, -0.3)), base + theirs)
