"""Spherical interpolation of two models or of their task vectors, as a whole or neuron by neuron."""

from __future__ import annotations

import numpy as np

from evomerge.methods.kernels import Values
from evomerge.methods.reductions import Gram
from evomerge.methods.registry import MergeMethod, Parameter, register
from evomerge.methods.vectors import Axis, VectorCombination, lengths, shares

COLLINEAR = 1e-6
"""sin φ up to which slerp becomes lerp; between vectors that are opposite, not almost opposite, it is 0."""


def coefficients(products: Gram, values: Values) -> Gram:
    """c = sin((1−t)φ)/sin φ, sin(tφ)/sin φ, with φ the angle between two vectors and t = w_2 / (w_1 + w_2).

    Where the vectors are parallel or opposite (sin φ ≤ 1e-6), c = 1 − t, t. A vector without direction counts
    as orthogonal to the other one.

    Args:
        products: ``(vectors, 2, 2)``.
        values: `weight`.

    Raises:
        CandidateFailed: the weights add up to 0.
    """
    return _slerp(products, float(shares("nuslerp", values["weight"])[1]))


def mergekit_coefficients(products: Gram, values: Values) -> Gram:
    """The same, with t = ½ where |w_1 + w_2| < 1e-6."""
    first, second = values["weight"]
    return _slerp(products, 0.5 if abs(first + second) < 1e-6 else second / (first + second))


def _slerp(products: Gram, t: float) -> Gram:
    xx, xy, yy = products[:, 0, 0], products[:, 0, 1], products[:, 1, 1]
    _, inverse = lengths(products)
    phi = np.arctan2(np.sqrt(np.maximum(xx * yy - xy * xy, 0.0)), xy)
    phi = np.where(inverse.min(axis=1) == 0, np.pi / 2, phi)[:, None]
    steps = np.array([1 - t, t])
    return np.where(np.sin(phi) <= COLLINEAR, steps, np.sin(steps * phi) / np.sin(phi))


def axis(values: Values) -> Axis:
    """Return the axis of the paper dialect."""
    chosen: Axis = values["axis"]
    return chosen


def mergekit_axis(values: Values) -> Axis:
    """mergekit's `nuslerp_row_wise` runs over dimension 0 (the inputs' vectors), its opposite over the rows."""
    if values["nuslerp_flatten"]:
        return "none"
    return "in" if values["nuslerp_row_wise"] else "out"


register(
    MergeMethod(
        name="nuslerp",
        summary="Spherical interpolation between two models, or between their task vectors where there is a base, "
        "by tensor, output neuron or input.",
        paper="Goddard et al. 2024, Arcee's MergeKit: a toolkit for merging large language models, "
        "arXiv 2403.13257 (method nuslerp of the software)",
        inputs=(2, 2),
        base="optional origin",
        parameters=(
            Parameter("weight", "expert", "Share of the input: t is the second's part of the sum."),
            Parameter(
                "axis",
                "shared",
                "What is interpolated on its own: the tensor (none), each output neuron's weights (out), or each "
                "input's (in).",
                "none",
                kind="choice",
                choices=("none", "out", "in"),
                dialects=("paper",),
            ),
            Parameter(
                "nuslerp_flatten",
                "shared",
                "The tensor is interpolated as one vector.",
                True,
                kind="bool",
                dialects=("mergekit",),
            ),
            Parameter(
                "nuslerp_row_wise",
                "shared",
                "Without flatten: each input's weights (a column of a linear layer) are interpolated on their own "
                "if true, each output neuron's (a row) if false.",
                False,
                kind="bool",
                dialects=("mergekit",),
            ),
        ),
        kernels={
            "paper": VectorCombination(coefficients, axis),
            "mergekit": VectorCombination(mergekit_coefficients, mergekit_axis, as_stored=True),
        },
        differs="mergekit names the axis by two switches, by the file's dimensions even where a layer is kept "
        "transposed, and takes t = 1/2 where the weights add up to 0, which is refused in paper.",
    )
)
