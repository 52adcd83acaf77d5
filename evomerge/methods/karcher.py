"""Karcher mean: the point of a sphere that is nearest to all models.

Karcher 1977, Riemannian center of mass and mollifier smoothing (Communications on Pure and Applied
Mathematics 30(5)).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from evomerge.methods.kernels import GramCombination, Values
from evomerge.methods.reductions import Gram
from evomerge.methods.registry import MergeMethod, Parameter, register
from evomerge.methods.vectors import RESOLUTION, lengths, shares

Vector = npt.NDArray[np.float64]

OPPOSITE = np.pi - 1e-6
"""Angle from which on there is no direction from one point of the sphere to another."""


def coefficients(products: Gram, values: Values) -> Sequence[float]:
    """θ = (Σ a_k ‖θ_k‖) u with u the minimum over the sphere of Σ a_k ∠(u, u_k)², where u_k = θ_k / ‖θ_k‖.

    The iteration u ← exp_u(Σ a_k log_u(u_k)), log_u(v) = φ/sin φ (v − cos φ u), never leaves the span of the
    u_k. So it runs on the coefficients of u, with inner products from the Gram matrix.

    A tensor without direction does not pull, its norm counts. Nor does one opposite to u. Where the
    directions cancel out at the start, Σ a_k θ_k.

    Args:
        products: ``(K, K)``.
        values: `weight` (in dialect paper: a_k = w_k / Σ w), `max_iter`, `tol`.

    Raises:
        CandidateFailed: the weights add up to 0.
    """
    a = shares("karcher", values.get("weight", (1.0,) * len(products)))
    with np.errstate(all="ignore"):
        norms, inverse = lengths(products[None])
        cosines = inverse.T * products * inverse
        start = np.where(inverse[0] > 0, a, 0.0)
        if not np.sqrt(np.maximum(start @ cosines @ start, 0.0)) > RESOLUTION * np.abs(a).sum():
            return [float(c) for c in a * (1 if np.isfinite(products).all() else np.nan)]
        u = mean_direction(cosines, start, round(values["max_iter"]), values["tol"])
        return [float(c) for c in (a @ norms[0]) * u * inverse[0]]


def mean_direction(cosines: Gram, a: Vector, steps: int, tolerance: float) -> Vector:
    """Return the coefficients, over unit vectors, of their Karcher mean; all of a_k = 0 are left out.

    Args:
        cosines: ``(K, K)``.
        a: ``(K,)`` weights; their sum of vectors is not 0.
        steps: most steps taken.
        tolerance: length of a step that ends the iteration.
    """
    a = a / np.abs(a).sum()
    u = a / np.sqrt(a @ cosines @ a)
    for _ in range(steps):
        dots = np.clip(cosines @ u, -1.0, 1.0)
        phi = np.arccos(dots)
        pull = np.where(phi < OPPOSITE, a / np.sinc(phi / np.pi), 0.0)
        tangent = pull - (pull @ dots) * u
        length = np.sqrt(np.maximum(tangent @ cosines @ tangent, 0.0))
        if not length >= tolerance:
            break
        u = np.cos(length) * u + np.sin(length) / length * tangent
        u /= np.sqrt(u @ cosines @ u)
    return u


KERNEL = GramCombination("inputs", coefficients)

register(
    MergeMethod(
        name="karcher",
        on_device=True,
        summary="Riemannian centre of mass of the models on the sphere, at their mean norm, tensor by tensor.",
        paper="Karcher 1977, Riemannian center of mass and mollifier smoothing, CPAM 30(5); for model weights "
        "arXiv 2603.04972",
        inputs=(1, None),
        base="unused",
        bases={"mergekit": "optional input"},
        parameters=(
            Parameter("weight", "expert", "Share of the input.", 1.0, dialects=("paper",)),
            Parameter("max_iter", "shared", "Most steps of the iteration.", 10, 0, kind="int"),
            Parameter("tol", "shared", "Length of a step, in radians, that ends the iteration.", 1e-5, 0.0),
        ),
        kernels={"paper": KERNEL, "mergekit": KERNEL},
        differs="mergekit weighs all models equally, and the base, if there is one, is one of them.",
    )
)
