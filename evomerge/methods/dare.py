"""DARE: drop deltas at random and rescale the rest.

Yu et al. 2024, Language models are super Mario: absorbing abilities from homologous models as a free lunch
(arXiv 2311.03099), eq. 1-3.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from torch import Tensor

from evomerge.methods.kernels import DeltaCombination, Sparse, Values
from evomerge.methods.masks import MaskKey, device_hashes, hash_v1, keep_mask, limit_of
from evomerge.methods.native import Mask
from evomerge.methods.norms import RESCALE, rescaled
from evomerge.methods.operands import STRIP, Operands
from evomerge.methods.registry import MergeMethod, Parameter, register
from evomerge.methods.task_arithmetic import LAMBDA, NORMALIZE, coefficients
from evomerge.methods.task_arithmetic import WEIGHT as SUM_WEIGHT
from evomerge.methods.ties import (
    DIFFERS,
    ELECT,
    MERGE,
    NORMALIZE_AGREEING,
    DisjointMerge,
    mergekit_rule,
)
from evomerge.methods.ties import WEIGHT as MEAN_WEIGHT

DENSITY = Parameter(
    "density",
    "expert",
    "Probability that an entry of the delta is kept (1 - p in the paper).",
    0.5,
    0.0,
    1.0,
    defaults={"mergekit": 1.0},
)
SCALING = (
    "paper divides kept entries by the density; mergekit, with rescale, scales them so that the tensor's sum of "
    "magnitudes is what it was."
)


def mask_key(operands: Operands) -> MaskKey:
    """Return what the masks depend on.

    Raises:
        ValueError: the operands have no mask key, or not one that names every input.
    """
    key = operands.masks
    if key is None:
        raise ValueError("a method with random masks needs a mask key")
    if len(key.experts) != len(operands.inputs):
        raise ValueError(
            f"the mask key names {len(key.experts)} experts, here are {len(operands.inputs)} inputs"
        )
    return key


def mask(operands: Operands, values: Values) -> Sparse:
    """τ̂_k = m_k ∘ τ_k, where m_k keeps each entry with probability density_k.

    Entry i of expert k is kept where `masks.hash_v1` of (seed, expert, tensor, i) lies under the density:
    masks are independent between experts and nested in density. Density 0 drops everything.
    """
    densities, key = values["density"], mask_key(operands)
    hashes, kept = np.empty(STRIP, dtype=np.uint32), np.empty(STRIP, dtype=np.bool_)

    def keep(k: int, delta: Tensor, start: int) -> None:
        if densities[k] >= 1:
            return
        n = delta.numel()
        if delta.device.type != "cpu":
            found = device_hashes(key.seed, key.experts[k], key.tensor, start, n, delta.device)
            delta.mul_((found < limit_of(densities[k])).to(delta.dtype))
            return
        hash_v1(key.seed, key.experts[k], key.tensor, start, hashes[:n])
        entries, survives = delta.numpy(), keep_mask(hashes[:n], densities[k], kept[:n])
        with np.errstate(invalid="ignore"):
            np.multiply(entries, survives, out=entries)

    rules = tuple(Mask(key, k, density) for k, density in enumerate(densities))
    return Sparse(tuple(1.0 if d > 0 else 0.0 for d in densities), keep, rules)


def drop(operands: Operands, values: Values) -> Sparse:
    """τ̂_k = m_k ∘ τ_k / density_k, whose expectation is τ_k."""
    scales = tuple(1 / d if d > 0 else 0.0 for d in values["density"])
    return replace(mask(operands, values), scales=scales)


register(
    MergeMethod(
        name="dare_linear",
        on_device=True,
        summary="Task arithmetic on task vectors whose entries are dropped at random and rescaled.",
        paper="Yu et al. 2024, Language models are super Mario (DARE), arXiv 2311.03099",
        inputs=(1, None),
        base="origin",
        parameters=(SUM_WEIGHT, DENSITY, NORMALIZE, RESCALE, LAMBDA),
        kernels={
            "paper": DeltaCombination(coefficients, drop),
            "mergekit": DeltaCombination(coefficients, rescaled(mask)),
        },
        random=True,
        differs=SCALING,
    )
)
register(
    MergeMethod(
        name="dare_ties",
        on_device=True,
        summary="TIES election and merge on task vectors whose entries are dropped at random and rescaled.",
        paper="Yu et al. 2024, Language models are super Mario (DARE), arXiv 2311.03099",
        inputs=(1, None),
        base="origin",
        parameters=(
            MEAN_WEIGHT,
            DENSITY,
            ELECT,
            MERGE,
            replace(NORMALIZE_AGREEING, default=False),
            RESCALE,
            LAMBDA,
        ),
        kernels={
            "paper": DisjointMerge(drop),
            "mergekit": DisjointMerge(rescaled(mask), mergekit_rule),
        },
        random=True,
        differs=f"{SCALING} After that, {DIFFERS}",
    )
)
