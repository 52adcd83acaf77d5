"""hash_v1: the masks of random methods, fixed for ever."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from evomerge.methods.masks import device_hashes, hash_v1, keep_mask
from tests.methods import oracle

EXPERT = "0123456789abcdef" * 4
TENSOR = "model.layers.0.self_attn.q_proj.weight"
N = 1 << 18


def hashes(
    start: int = 0, n: int = N, seed: int = 0, expert: str = EXPERT, tensor: str = TENSOR
) -> np.ndarray:
    return hash_v1(seed, expert, tensor, start, np.empty(n, dtype=np.uint32))


def mask(density: float, **key: object) -> np.ndarray:
    return keep_mask(hashes(**key), density, np.empty(N, dtype=np.bool_))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("seed", "tensor", "index", "expected"),
    [
        (0, TENSOR, 0, 0x4A3B74A8),
        (0, TENSOR, 1, 0xB71B0CAF),
        (0, TENSOR, 65536, 0x69BA59DE),
        (1, TENSOR, 0, 0x5196CC20),
        (0, "lm_head.weight", 0, 0xAB5E8A90),
        (0, TENSOR, 2**32 - 1, 0xA35E6BD5),
        (0, TENSOR, 2**32, 0xAEB3F85A),
        (0, TENSOR, 5 * 2**32 + 7, 0xCB85C007),
    ],
)
def test_golden_values(seed: int, tensor: str, index: int, expected: int) -> None:
    assert hashes(index, 1, seed=seed, tensor=tensor)[0] == expected


@pytest.mark.parametrize("start", [0, 1, 65_535, 2**32 - 5, 7 * 2**32 - 70_000])
def test_is_what_the_definition_says(start: int) -> None:
    n = 70_100
    got = hashes(start, n)
    for offset in (0, 1, 2, 4, 5, 6, 65_535, 65_536, 69_999, 70_000, n - 1):
        assert got[offset] == oracle.hash_v1(0, EXPERT, TENSOR, start + offset)


@pytest.mark.parametrize("start", [0, 65_535, 2**32 - 500, 7 * 2**32 - 1])
def test_a_device_computes_the_same_hashes(start: int) -> None:
    found = device_hashes(3, EXPERT, TENSOR, start, 1000, torch.device("cpu"))
    assert np.array_equal(found.numpy(), hashes(start, 1000, seed=3))


def test_does_not_depend_on_where_a_chunk_begins() -> None:
    start = 2**32 - 100_000
    whole = hashes(start, 200_000)
    parts = [hashes(start + begin, min(7777, 200_000 - begin)) for begin in range(0, 200_000, 7777)]
    assert np.array_equal(whole, np.concatenate(parts))


@pytest.mark.parametrize("density", [0.01, 0.1, 0.5, 0.9])
def test_keeps_the_share_that_was_asked_for(density: float) -> None:
    shares = [mask(density, seed=seed).mean() for seed in range(8)]
    error = 5 * np.sqrt(density * (1 - density) / N)
    assert all(abs(share - density) < error for share in shares)


def test_masks_are_nested_in_density() -> None:
    densities = [0.0, 1e-9, 0.1, 0.3, 0.30001, 0.9, 1.0]
    masks = [mask(density) for density in densities]
    assert not masks[0].any()
    assert masks[-1].all()
    for smaller, larger in itertools.pairwise(masks):
        assert not (smaller & ~larger).any()


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a.astype(float), b.astype(float))[0, 1])


@pytest.mark.parametrize("lag", [1, 2, 3, 64, 4096, 65_536])
def test_neighbours_are_uncorrelated(lag: int) -> None:
    values = hashes()
    kept = values < 2**30
    assert abs(correlation(values[lag:], values[:-lag])) < 5 / np.sqrt(N - lag)
    assert abs(correlation(kept[lag:], kept[:-lag])) < 5 / np.sqrt(N - lag)


@pytest.mark.parametrize(
    "other", [{"seed": 1}, {"expert": EXPERT[::-1]}, {"tensor": "lm_head.weight"}, {"start": 2**32}]
)
def test_seeds_experts_tensors_and_high_words_are_independent(other: dict[str, object]) -> None:
    one, two = hashes(), hashes(**other)  # type: ignore[arg-type]
    assert abs(correlation(one, two)) < 5 / np.sqrt(N)
    both = ((one < 2**31) & (two < 2**31)).mean()
    assert abs(both - 0.25) < 5 * np.sqrt(0.25 * 0.75 / N)


def test_every_bit_is_fair() -> None:
    values = hashes()
    for bit in range(32):
        assert abs((values >> np.uint32(bit) & np.uint32(1)).mean() - 0.5) < 5 * 0.5 / np.sqrt(N)


def test_bytes_are_uniform() -> None:
    counts = np.bincount((hashes() >> np.uint32(24)).astype(np.intp), minlength=256)
    chi2 = ((counts - N / 256) ** 2 / (N / 256)).sum()
    assert 150 < chi2 < 380
