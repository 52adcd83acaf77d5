"""Weighted average of weights.

Wortsman et al. 2022, Model soups: averaging weights of multiple fine-tuned models improves accuracy
without increasing inference time (arXiv 2203.05482).
"""

from __future__ import annotations

from collections.abc import Sequence

from evomerge.errors import CandidateFailed
from evomerge.methods.kernels import LinearCombination, Values
from evomerge.methods.registry import MergeMethod, Parameter, register


def coefficients(values: Values) -> Sequence[float]:
    """θ = Σ w_k θ_k, divided by Σ w_k if `normalize`.

    Raises:
        CandidateFailed: the weights to normalise cancel out.
    """
    weights: tuple[float, ...] = values["weight"]
    if not values["normalize"]:
        return weights
    total = sum(weights)
    if abs(total) <= 1e-8 * sum(map(abs, weights)):
        shown = ", ".join(f"{w:g}" for w in weights)
        raise CandidateFailed(f"linear: the weights {shown} add up to 0 and cannot be normalized")
    return [w / total for w in weights]


AVERAGE = LinearCombination(coefficients)

register(
    MergeMethod(
        name="linear",
        on_device=True,
        summary="Weighted average of the inputs' weights (model soup).",
        paper="Wortsman et al. 2022, Model soups, arXiv 2203.05482",
        inputs=(1, None),
        base="unused",
        parameters=(
            Parameter("weight", "expert", "Share of the input; may be negative."),
            Parameter(
                "normalize",
                "shared",
                "Divide by the sum of the weights, which then must not be 0.",
                True,
                kind="bool",
            ),
        ),
        kernels={"paper": AVERAGE, "mergekit": AVERAGE},
        differs="In nothing; weights that add up to 0, which give NaN in mergekit, are refused in both.",
    )
)
