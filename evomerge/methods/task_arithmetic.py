"""Task arithmetic: add and subtract task vectors.

Ilharco et al. 2023, Editing models with task arithmetic (arXiv 2212.04089).
"""

from __future__ import annotations

from collections.abc import Sequence

from evomerge.methods.kernels import DeltaCombination, Values
from evomerge.methods.registry import MergeMethod, Parameter, register

WEIGHT = Parameter(
    "weight",
    "expert",
    "Factor of the expert's task vector; negative subtracts it, 0 leaves it out. In a recipe also one expression "
    'of the inputs for all: "c + (b - a)" is an analogy, a is to b as c is to the result.',
)
LAMBDA = Parameter("lambda", "shared", "Factor of the merged task vector.", 1.0)
NORMALIZE = Parameter(
    "normalize",
    "shared",
    "Divide the merged task vector by the sum of the weights, unless they cancel out.",
    False,
    kind="bool",
    dialects=("mergekit",),
)


def coefficients(values: Values) -> Sequence[float]:
    """θ = θ_0 + λ Σ w_k τ_k, with `normalize` divided by Σ w_k: returns the factors of τ_k.

    As in mergekit, weights that cancel out (|Σ w_k| < 1e-8) are not divided by their sum.
    """
    scale: float = values["lambda"]
    total = sum(values["weight"])
    if values.get("normalize", False) and abs(total) >= 1e-8:
        scale /= total
    return [scale * w for w in values["weight"]]


register(
    MergeMethod(
        name="task_arithmetic",
        on_device=True,
        summary="Base plus the weighted sum of the experts' task vectors.",
        paper="Ilharco et al. 2023, Editing models with task arithmetic, arXiv 2212.04089",
        inputs=(1, None),
        base="origin",
        parameters=(WEIGHT, NORMALIZE, LAMBDA),
        kernels={"paper": DeltaCombination(coefficients), "mergekit": DeltaCombination(coefficients)},
        differs="mergekit can normalize the weights.",
    )
)
