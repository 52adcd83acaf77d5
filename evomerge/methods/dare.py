"""DARE: drop deltas at random and rescale the rest.

Yu et al. 2024, Language models are super Mario: absorbing abilities from homologous models as a free lunch
(arXiv 2311.03099), eq. 1-3.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from evomerge.methods.kernels import DeltaCombination, Sparse, Values
from evomerge.methods.masks import hash_v1, keep_mask
from evomerge.methods.operands import STRIP, Operands
from evomerge.methods.registry import MergeMethod, Parameter, register
from evomerge.methods.task_arithmetic import LAMBDA, coefficients
from evomerge.methods.task_arithmetic import WEIGHT as SUM_WEIGHT
from evomerge.methods.ties import WEIGHT as MEAN_WEIGHT
from evomerge.methods.ties import DisjointMean

DENSITY = Parameter(
    "density", "expert", "Probability that an entry of the delta is kept (1 - p in the paper).", 0.5, 0.0, 1.0
)


def drop(operands: Operands, values: Values) -> Sparse:
    """τ̂_k = m_k ∘ τ_k / density_k, where m_k keeps each entry with probability density_k.

    Entry i of expert k is kept where `masks.hash_v1` of (seed, expert, tensor, i) lies under the density:
    masks are independent between experts and nested in density. Density 0 drops everything.
    """
    key, densities = operands.masks, values["density"]
    if key is None:
        raise ValueError("a method with random masks needs a mask key")
    if len(key.experts) != len(operands.inputs):
        raise ValueError(
            f"the mask key names {len(key.experts)} experts, here are {len(operands.inputs)} inputs"
        )
    hashes = np.empty(STRIP, dtype=np.uint32)
    kept = np.empty(STRIP, dtype=np.bool_)

    def keep(k: int, delta: Tensor, start: int) -> None:
        if densities[k] >= 1:
            return
        n = delta.numel()
        hash_v1(key.seed, key.experts[k], key.tensor, start, hashes[:n])
        values = delta.numpy()
        np.multiply(values, keep_mask(hashes[:n], densities[k], kept[:n]), out=values)

    return Sparse(tuple(1 / d if d > 0 else 0.0 for d in densities), keep)


register(
    MergeMethod(
        name="dare_linear",
        summary="Task arithmetic on task vectors whose entries are dropped at random and rescaled.",
        paper="Yu et al. 2024, Language models are super Mario (DARE), arXiv 2311.03099",
        inputs=(1, None),
        base="origin",
        parameters=(SUM_WEIGHT, DENSITY, LAMBDA),
        kernels={"paper": DeltaCombination(coefficients, drop)},
        random=True,
    )
)
register(
    MergeMethod(
        name="dare_ties",
        summary="TIES election and mean on task vectors whose entries are dropped at random and rescaled.",
        paper="Yu et al. 2024, Language models are super Mario (DARE), arXiv 2311.03099",
        inputs=(1, None),
        base="origin",
        parameters=(MEAN_WEIGHT, DENSITY, LAMBDA),
        kernels={"paper": DisjointMean(drop)},
        random=True,
    )
)
