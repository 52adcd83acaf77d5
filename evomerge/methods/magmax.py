"""MagMax: of each weight, the change of largest magnitude.

Marczak et al. 2024, MagMax: leveraging model merging for seamless continual learning (arXiv 2407.06322), §4.
"""

from __future__ import annotations

from dataclasses import replace

from evomerge.methods.kernels import Values, dense
from evomerge.methods.registry import MergeMethod, Parameter, register
from evomerge.methods.task_arithmetic import LAMBDA
from evomerge.methods.ties import DisjointMerge, Rule


def rule(values: Values) -> Rule:
    """θ = θ_0 + λ q_m per element, with q_k = w_k τ_k and m = argmax_k |q_k| (of equal ones the first input).

    The largest entry elects the sign, and is the largest of those that have it.
    """
    return Rule(elect="max", merge="max", tie="majority")


register(
    MergeMethod(
        name="magmax",
        summary="Base plus, for each weight, the experts' change of largest magnitude.",
        paper="Marczak et al. 2024, MagMax, arXiv 2407.06322",
        inputs=(1, None),
        base="origin",
        parameters=(
            Parameter(
                "weight", "expert", "Factor of the expert's task vector before the largest is taken.", 1.0
            ),
            replace(LAMBDA, default=0.5),
        ),
        kernels={"paper": DisjointMerge(dense, rule)},
    )
)
