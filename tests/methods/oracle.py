"""The merge methods in NumPy float64, straight from the papers: the oracle of the tests."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.stats
import torch

from evomerge.methods import MaskKey, TensorCache, merge_chunks

# Task vectors whose sums cancel in the first two elements.
CONFLICT = ([1.0, -2.0, 3.0, 0.5], [-1.0, 2.0, 1.0, -0.5], [0.0, 0.0, -4.0, -0.1])


def merge(
    method: str,
    base: torch.Tensor | None,
    inputs: Sequence[torch.Tensor],
    *,
    masks: MaskKey | None = None,
    cache: TensorCache | None = None,
    key: str = "",
    chunk: int = 1 << 18,
    dialect: str = "paper",
    statistics: Sequence[Any] | None = None,
    transposed: bool = False,
    shape: Sequence[int] | None = None,
    **values: Any,
) -> torch.Tensor:
    """Run `merge_chunks` and put its chunks together; parameter `lambda` is spelt ``lambda_``."""
    values = {name.rstrip("_"): value for name, value in values.items()}
    parts, expected = [], 0
    for start, part in merge_chunks(
        method,
        base,
        inputs,
        values,
        masks=masks,
        cache=cache,
        key=key,
        chunk=chunk,
        dialect=dialect,
        statistics=statistics,
        transposed=transposed,
        shape=shape,
    ):
        assert start == expected
        assert part.dim() == 1
        assert part.numel() <= chunk
        parts.append(part.clone())
        expected += part.numel()
    assert expected == inputs[0].numel()
    merged = torch.cat(parts) if parts else torch.empty(0)
    return merged.reshape(inputs[0].shape if shape is None else torch.Size(shape))


def checkpoints(
    n: int, experts: int = 3, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Weights and fine-tunes of realistic spread: θ_0 ~ N(0, .02²), τ ~ N(0, .002²)."""
    generator = torch.Generator().manual_seed(seed)
    base = (0.02 * torch.randn(n, generator=generator, dtype=torch.float64)).to(dtype)
    inputs = [
        (base.double() + 0.002 * torch.randn(n, generator=generator, dtype=torch.float64)).to(dtype)
        for _ in range(experts)
    ]
    return base, inputs


def doubles(*tensors: torch.Tensor) -> list[np.ndarray]:
    return [tensor.double().numpy().reshape(-1) for tensor in tensors]


def linear(inputs: Sequence[torch.Tensor], weights: Sequence[float], normalize: bool) -> np.ndarray:
    total = sum(w * x for w, x in zip(weights, doubles(*inputs), strict=True))
    return total / sum(weights) if normalize else total


def slerp(x: torch.Tensor, y: torch.Tensor, t: float) -> np.ndarray:
    a, b = doubles(x, y)
    cosine = a @ b / (np.linalg.norm(a) * np.linalg.norm(b))
    if abs(cosine) > 0.9995:
        return (1 - t) * a + t * b
    angle = np.arccos(cosine)
    return np.sin((1 - t) * angle) / np.sin(angle) * a + np.sin(t * angle) / np.sin(angle) * b


def along(tensors: Sequence[np.ndarray], axis: str, formula: Any) -> np.ndarray:
    """Apply a formula of flat vectors to whole tensors (``none``), to their rows (``out``) or columns (``in``)."""
    shape = tensors[0].shape
    if axis == "none" or len(shape) < 2:
        return formula([x.reshape(-1) for x in tensors]).reshape(shape)
    dim = len(shape) - 1 if axis == "out" else 0
    moved = [np.moveaxis(x, dim, -1) for x in tensors]
    merged = np.empty(moved[0].shape)
    for index in np.ndindex(merged.shape[:-1]):
        merged[index] = formula([x[index] for x in moved])
    return np.moveaxis(merged, -1, dim)


def multislerp(vectors: Sequence[np.ndarray], weights: Sequence[float], normalize: bool) -> np.ndarray:
    """Normalised lerp of flat vectors, elementwise."""
    w = np.array(weights) / (np.sum(weights) if normalize else 1)
    norms = [np.linalg.norm(x) for x in vectors]
    direction = sum(a * x / norm for a, x, norm in zip(w, vectors, norms, strict=True))
    return (w @ norms) * direction / np.linalg.norm(direction)


def karcher(vectors: Sequence[np.ndarray], weights: Sequence[float], steps: int) -> np.ndarray:
    """The Riemannian mean by its vector iteration, with logarithm and exponential as in a textbook."""
    a = np.array(weights) / np.sum(weights)
    units = [x / np.linalg.norm(x) for x in vectors]
    mean = sum(w * u for w, u in zip(a, units, strict=True))
    mean /= np.linalg.norm(mean)
    for _ in range(steps):
        tangent = np.zeros_like(mean)
        for w, u in zip(a, units, strict=True):
            rest = u - (u @ mean) * mean
            size = np.linalg.norm(rest)
            if size > 0:
                tangent += w * np.arctan2(size, u @ mean) * rest / size
        size = np.linalg.norm(tangent)
        if size < 1e-14:
            break
        mean = np.cos(size) * mean + np.sin(size) * tangent / size
    return sum(w * np.linalg.norm(x) for w, x in zip(a, vectors, strict=True)) * mean


def model_stock(base: np.ndarray, experts: Sequence[np.ndarray], clamp: bool = True) -> np.ndarray:
    """t · mean + (1 − t) · base on flat vectors."""
    deltas = [x - base for x in experts]
    count = len(deltas)
    cosines = [
        deltas[i] @ deltas[j] / np.linalg.norm(deltas[i]) / np.linalg.norm(deltas[j])
        for i in range(count)
        for j in range(i)
    ]
    cosine = np.mean(cosines)
    t = count * cosine / (1 + (count - 1) * cosine)
    t = np.clip(t, 0, 1) if clamp else t
    return t * np.mean(experts, axis=0) + (1 - t) * base


def trim(delta: np.ndarray, density: float) -> np.ndarray:
    rank = max(1, int(np.floor(density * delta.size + 1e-9)))
    threshold = np.sort(np.abs(delta))[::-1][rank - 1]
    return np.where(np.abs(delta) >= threshold, delta, 0.0)


def disjoint_merge(
    deltas: Sequence[np.ndarray],
    weights: Sequence[float],
    elect: str = "sum",
    merge: str = "mean",
    tie: str = "majority",
) -> np.ndarray:
    """Elect and merge as the TIES authors' code does, on weighted task vectors, or as mergekit does."""
    q = np.stack([w * delta for w, delta in zip(weights, deltas, strict=True)])
    scores = {
        "sum": lambda: q.sum(axis=0),
        "count": lambda: np.sign(q).sum(axis=0),
        "max": lambda: np.take_along_axis(q, np.abs(q).argmax(axis=0)[None], axis=0)[0],
    }
    elected = np.sign(scores[elect]())
    elected[elected == 0] = 1 if tie == "positive" else np.sign(elected.sum())
    selected = (np.sign(q) == elected) & (q != 0)
    total = (q * selected).sum(axis=0)
    if merge == "mean":
        return total / np.maximum(selected.sum(axis=0), 1)
    if merge == "weighted":
        divisor = (np.asarray(weights)[:, None] * selected).sum(axis=0)
        return total / np.where(divisor == 0, 1, divisor)
    return total if merge == "sum" else elected * np.abs(q * selected).max(axis=0)


def crumbs(delta: np.ndarray, density: float, gamma: float) -> np.ndarray:
    """Drop ⌊γn⌋ of the largest magnitudes and of the smallest so many that ⌊density·n⌋ remain; no ties."""
    n = delta.size
    count, top = int(np.floor(density * n + 1e-9)), int(np.floor(gamma * n + 1e-9))
    bottom = max(0, n - count - top)
    kept_ones = np.argsort(np.abs(delta))[bottom : bottom + count]
    return np.where(np.isin(np.arange(n), kept_ones), delta, 0.0)


def keep_probabilities(row: np.ndarray, density: float, epsilon: float) -> np.ndarray:
    """DELLA's probabilities of one row, by average ranks."""
    if row.size == 1:
        return np.array([density])
    ranks = scipy.stats.rankdata(np.abs(row))
    return density - epsilon + 2 * epsilon * (ranks - 1) / (row.size - 1)


def sce(deltas: Sequence[np.ndarray], topk: float, masking: bool) -> np.ndarray:
    """Select, calculate, erase; no ties among the variances."""
    tau = np.stack(deltas)
    variance = tau.var(axis=0)
    selected = np.ones(variance.shape, dtype=bool)
    if topk < 1:
        count = int(np.floor(np.count_nonzero(variance) * topk + 1e-9))
        selected = np.isin(np.arange(variance.size), np.argsort(-variance)[:count])
    energy = (tau**2 * selected).sum(axis=1)
    weights = energy / energy.sum() if energy.any() else np.full(len(tau), 1 / len(tau))
    if masking:
        tau = tau * selected
    agrees = np.sign(tau) == np.where(tau.sum(axis=0) >= 0, 1, -1)
    divisor = (weights[:, None] * agrees).sum(axis=0)
    return (weights[:, None] * tau * agrees).sum(axis=0) / np.where(divisor == 0, 1, divisor)


def hash_v1(seed: int, expert: str, tensor: str, index: int) -> int:
    """One element's hash in plain integers."""
    high, low = index >> 32, index & 0xFFFFFFFF
    text = "\x1f".join(["hash_v1", str(seed), expert, tensor, str(high)])
    digest = hashlib.sha256(text.encode()).digest()
    words = [int.from_bytes(digest[i : i + 4], "little") for i in (0, 4)]
    x = low ^ words[0]
    x = (x ^ x >> 17) * 0xED5AD4BB % 2**32
    x ^= words[1]
    x = (x ^ x >> 11) * 0xAC4C1B51 % 2**32
    x = (x ^ x >> 15) * 0x31848BAB % 2**32
    return x ^ x >> 14


def kept(key: MaskKey, k: int, n: int, density: float) -> np.ndarray:
    """The mask of input k's first n elements."""
    return np.array([hash_v1(key.seed, key.experts[k], key.tensor, i) / 2**32 < density for i in range(n)])


def rounded(values: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """Round float64 once to an output dtype, ties to even."""
    return torch.from_numpy(np.ascontiguousarray(values)).to(dtype)
