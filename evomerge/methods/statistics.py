"""What is known of an input from data, for the methods that weigh the inputs with it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from evomerge.errors import CandidateFailed
from evomerge.methods.kernels import Values
from evomerge.methods.operands import STRIP, Operands
from evomerge.methods.registry import Parameter

WEIGHT = Parameter("weight", "expert", "Factor of the input's share; at least one is positive.", 1.0, 0.0)


@dataclass(frozen=True)
class Statistic:
    """One statistic of one input for one tensor.

    Attributes:
        values: flat: the diagonal Fisher information of each weight ``(n,)``, or the Gram matrix of a layer's
            inputs ``(d_in · d_in,)``. Only slices of it are read.
        unit: of a Fisher information: its root mean square over all weights of the model.
    """

    values: Tensor
    unit: float = 1.0

    @classmethod
    def of(cls, values: Tensor) -> Statistic:
        """Take a tensor for the whole model's statistic."""
        flat = values.detach().reshape(-1)
        return cls(flat, root_mean_square(flat))


def root_mean_square(flat: Tensor) -> float:
    """Return √(Σ x² / n) of a flat tensor, summed in float64 in a fixed order."""
    parts = (flat[start : start + STRIP].double() for start in range(0, flat.numel(), STRIP))
    total = math.fsum(float(part.square().sum()) for part in parts)
    return math.sqrt(total / max(1, flat.numel()))


def statistics_of(operands: Operands) -> tuple[Statistic, ...] | None:
    """Return the operands' statistics, one for each input, or None where there are none."""
    if operands.statistics is None:
        return None
    given: Sequence[Statistic | Tensor] = operands.statistics
    if len(given) != len(operands.inputs):
        raise ValueError(f"{len(given)} statistics for {len(operands.inputs)} inputs")
    return tuple(item if isinstance(item, Statistic) else Statistic.of(item) for item in given)


def shares(values: Values) -> list[float]:
    """Return w_k / Σ w.

    Raises:
        CandidateFailed: all weights are 0.
    """
    total = math.fsum(values["weight"])
    if total <= 0:
        raise CandidateFailed("all weights are 0; at least one input needs a positive one")
    return [w / total for w in values["weight"]]
