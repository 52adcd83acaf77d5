"""Task arithmetic: add and subtract task vectors.

Ilharco et al. 2023, Editing models with task arithmetic (arXiv 2212.04089).
"""

from __future__ import annotations

from collections.abc import Sequence

from evomerge.methods.kernels import DeltaCombination, Values
from evomerge.methods.registry import MergeMethod, Parameter, register

WEIGHT = Parameter(
    "weight", "expert", "Factor of the expert's task vector; negative subtracts it, 0 leaves it out."
)
LAMBDA = Parameter("lambda", "shared", "Factor of the merged task vector.", 1.0)


def coefficients(values: Values) -> Sequence[float]:
    """θ = θ_0 + λ Σ w_k τ_k: returns λ w_k."""
    return [values["lambda"] * w for w in values["weight"]]


register(
    MergeMethod(
        name="task_arithmetic",
        summary="Base plus the weighted sum of the experts' task vectors.",
        paper="Ilharco et al. 2023, Editing models with task arithmetic, arXiv 2212.04089",
        inputs=(1, None),
        base="origin",
        parameters=(WEIGHT, LAMBDA),
        kernels={"paper": DeltaCombination(coefficients)},
    )
)
