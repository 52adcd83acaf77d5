"""Model Stock: a step from the base towards the average of its fine-tunes, as long as they agree.

Jang et al. 2024, Model Stock: all we need is just a few fine-tuned models (arXiv 2403.19522), eq. 5.
"""

from __future__ import annotations

import numpy as np

from evomerge.methods.kernels import Values
from evomerge.methods.reductions import Gram
from evomerge.methods.registry import MergeMethod, Parameter, register
from evomerge.methods.vectors import Axis, VectorCombination, lengths


def coefficients(products: Gram, values: Values) -> Gram:
    """θ = t · mean(θ_k) + (1 − t) θ_0, t = K cos φ / (1 + (K − 1) cos φ): returns t / K of each τ_k.

    cos φ is the mean over pairs of the cosines between the τ_k; pairs with a τ_k without direction have 0.
    Unless `clamp` is false, t stays in [0, 1]: where the τ_k oppose each other (cos φ < 0) the formula walks
    away from the average, without bound.

    Args:
        products: ``(vectors, K, K)`` of the τ_k.
        values: `clamp`.
    """
    count = products.shape[1]
    _, inverse = lengths(products)
    cosines = np.clip(inverse[:, :, None] * products * inverse[:, None, :], -1.0, 1.0)
    total = cosines.sum(axis=(1, 2)) - np.einsum("vkk->v", cosines)
    cosine = total / (count * (count - 1))
    denominator = 1 + (count - 1) * cosine
    t = np.where(np.abs(denominator) < 1e-6, 0.0, count * cosine / denominator)
    if values.get("clamp", True):
        t = np.clip(t, 0.0, 1.0)
    return np.repeat(t[:, None] / count, count, axis=1)


def axis(values: Values) -> Axis:
    """With `filter_wise`, each output neuron has its own angle."""
    return "out" if values["filter_wise"] else "none"


register(
    MergeMethod(
        name="model_stock",
        summary="From the base towards the experts' average, tensor by tensor, the farther the smaller the angle "
        "between their task vectors.",
        paper="Jang et al. 2024, Model Stock: all we need is just a few fine-tuned models, arXiv 2403.19522",
        inputs=(2, None),
        base="origin",
        parameters=(
            Parameter(
                "filter_wise", "shared", "Each output neuron has an angle of its own.", False, kind="bool"
            ),
            Parameter(
                "clamp",
                "shared",
                "Go neither beyond the average nor, where task vectors oppose each other, away from it.",
                True,
                kind="bool",
                dialects=("paper",),
            ),
        ),
        kernels={
            "paper": VectorCombination(coefficients, axis),
            "mergekit": VectorCombination(coefficients, axis, as_stored=True),
        },
        differs="mergekit has no clamp to turn off; its own walk away from the average, where task vectors oppose "
        "each other, is left out.",
    )
)
