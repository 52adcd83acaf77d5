"""Spherical linear interpolation between two models.

Shoemake 1985, Animating rotation with quaternion curves (SIGGRAPH 19(3)); applied, as everywhere in model
merging, to the un-normalised vectors: only the angle comes from the unit vectors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from evomerge.methods.kernels import GramCombination, Values
from evomerge.methods.reductions import Gram
from evomerge.methods.registry import MergeMethod, Parameter, register

PARALLEL = 0.9995
"""|cos φ| above which slerp becomes lerp; the two differ by less than 1.3e-4 there."""


def coefficients(products: Gram, values: Values) -> Sequence[float]:
    """θ = sin((1−t)φ)/sin φ · x + sin(tφ)/sin φ · y, with φ the angle between x and y.

    φ = atan2(√(x·x d·d − (x·d)²), x·x + x·d) with d = y − x, which unlike acos keeps its digits for small
    angles. For |cos φ| > 0.9995, antipodal vectors included, (1−t) x + t y. A vector without direction
    (norm 0, or under 1e-8 of the other's) counts as orthogonal.

    Args:
        products: ``(2, 2)`` of x and d.
        values: `t`.
    """
    t: float = values["t"]
    xx, xd, dd = float(products[0, 0]), float(products[0, 1]), float(products[1, 1])
    xy, yy = xx + xd, xx + 2 * xd + dd
    if min(xx, yy) <= 1e-16 * max(xx, yy):
        phi = math.pi / 2
    else:
        phi = math.atan2(math.sqrt(max(xx * dd - xd * xd, 0.0)), xy)
    if abs(math.cos(phi)) > PARALLEL:
        return [1 - t, t]
    return [math.sin((1 - t) * phi) / math.sin(phi), math.sin(t * phi) / math.sin(phi)]


SLERP = GramCombination("steps", coefficients)

register(
    MergeMethod(
        name="slerp",
        on_device=True,
        summary="Spherical interpolation from the first input to the second, tensor by tensor.",
        paper="Shoemake 1985, Animating rotation with quaternion curves, SIGGRAPH 19(3)",
        inputs=(2, 2),
        base="unused",
        bases={"mergekit": "input"},
        parameters=(
            Parameter("t", "shared", "0 is the first input, 1 the second; values outside extrapolate."),
        ),
        kernels={"paper": SLERP, "mergekit": SLERP},
        differs="mergekit merges the base and one other model, and t = 0 is the base.",
    )
)
