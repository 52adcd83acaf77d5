"""Multi-SLERP: the mean direction of any number of models, at their mean norm."""

from __future__ import annotations

import numpy as np

from evomerge.methods.kernels import Values
from evomerge.methods.reductions import Gram
from evomerge.methods.registry import MergeMethod, Parameter, register
from evomerge.methods.vectors import RESOLUTION, VectorCombination, lengths, shares


def coefficients(products: Gram, values: Values) -> Gram:
    """θ = (Σ w_k ‖x_k‖) · M / ‖M‖ with M = Σ w_k x_k / ‖x_k‖, x_k being θ_k, or τ_k (and θ_0 added).

    That is normalised linear interpolation. Described is it as a step in the tangent space at M / ‖M‖, by the
    weighted sum of the x_k / ‖x_k‖ projected there: this sum is 0, whatever the weights.

    A vector without direction adds nothing to M, its norm counts. Where the directions cancel out
    (‖M‖ ≤ eps · Σ |w_k|), Σ w_k x_k.

    Args:
        products: ``(vectors, K, K)`` of the x_k.
        values: `weight`, `normalize_weights`, `eps`.

    Raises:
        CandidateFailed: the weights to normalise add up to 0.
    """
    weights = values["weight"]
    w = shares("multislerp", weights) if values["normalize_weights"] else np.array(weights)
    norms, inverse = lengths(products)
    part = w * inverse
    length = np.sqrt(np.maximum(np.einsum("vi,vij,vj->v", part, products, part), 0.0))[:, None]
    cancelled = length <= max(values["eps"], RESOLUTION) * np.abs(w).sum()
    return np.where(cancelled, w, (norms @ w)[:, None] / length * part)


KERNEL = VectorCombination(coefficients)

register(
    MergeMethod(
        name="multislerp",
        on_device=True,
        summary="Mean direction of the models, or of their task vectors where there is a base, at their mean norm "
        "(normalised linear interpolation), tensor by tensor.",
        paper="Goddard 2025, Multi-SLERP, https://goddard.blog/posts/multislerp-wow-what-a-cool-idea",
        inputs=(1, None),
        base="optional origin",
        parameters=(
            Parameter("weight", "expert", "Share of the input; may be negative."),
            Parameter(
                "normalize_weights",
                "shared",
                "Divide by the sum of the weights, which then must not be 0.",
                True,
                kind="bool",
            ),
            Parameter(
                "eps",
                "shared",
                "Length of the mean direction up to which it counts as cancelled, and the weighted sum is taken.",
                1e-8,
                0.0,
            ),
        ),
        kernels={"paper": KERNEL, "mergekit": KERNEL},
        differs="In nothing; where mergekit gives up (more than two models whose directions cancel out, tensors that "
        "no model changed) both take the weighted sum.",
    )
)
