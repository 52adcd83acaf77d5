"""The input as it is, or scaled: for layers that are stacked rather than merged, and for rules.

As in mergekit's method of that name (Goddard et al. 2024, arXiv 2403.13257).
"""

from __future__ import annotations

from collections.abc import Sequence

from evomerge.methods.kernels import LinearCombination, Values
from evomerge.methods.registry import MergeMethod, Parameter, register


def coefficients(values: Values) -> Sequence[float]:
    """θ = scale · θ_1."""
    scale: tuple[float, ...] = values["scale"]
    return scale


register(
    MergeMethod(
        name="passthrough",
        summary="The only input as it is, or times a factor.",
        paper="Goddard et al. 2024, Arcee's MergeKit, arXiv 2403.13257",
        inputs=(1, 1),
        base="unused",
        parameters=(Parameter("scale", "expert", "Factor of the weights; 1 copies them bit for bit.", 1.0),),
        kernels={"paper": LinearCombination(coefficients), "mergekit": LinearCombination(coefficients)},
        differs="Both are the same.",
    )
)
