"""Every registered method in every dialect, with operands and values: for what all of them promise."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from evomerge.methods import MaskKey, Parameter, all_methods, get_method
from tests.methods import oracle

OWN_VALUES: dict[str, dict[str, Any]] = {
    "breadcrumbs": {"density": (0.4, 0.6), "gamma": 0.2},
    "breadcrumbs_ties": {"density": (0.4, 0.6), "gamma": 0.2},
    "della": {"density": (0.3, 0.4)},
    "della_linear": {"density": (0.3, 0.4)},
    "dare_linear": {"density": (0.3, 0.4)},
    "dare_ties": {"density": (0.3, 0.4)},
    "sce": {"select_topk": 0.4},
    "ties": {"density": (0.3, 0.4)},
    "wudi": {"steps": 5},
}
"""Values of a method in place of those that `_value` makes up."""


@dataclass(frozen=True)
class Case:
    """One method in one dialect, with values for its parameters.

    Attributes:
        inputs: number of inputs.
        values: `oracle.merge`'s keywords.
    """

    method: str
    dialect: str
    inputs: int
    values: dict[str, Any] = field(default_factory=dict)

    def operands(
        self, shape: Sequence[int], dtype: torch.dtype = torch.float32, seed: int = 0
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return a base and inputs of realistic spread."""
        size = torch.Size(shape)
        base, inputs = oracle.checkpoints(size.numel(), self.inputs, dtype, seed)
        return base.reshape(size), [x.reshape(size) for x in inputs]

    def merge(self, base: torch.Tensor, inputs: Sequence[torch.Tensor], **options: Any) -> torch.Tensor:
        """Run the method."""
        needs = get_method(self.method).needs
        if needs and "statistics" not in options:
            options["statistics"] = statistics(needs, inputs)
        keep = get_method(self.method).base_in(self.dialect) != "unused"
        return oracle.merge(
            self.method,
            base if keep else None,
            inputs,
            dialect=self.dialect,
            **{"masks": KEYS[self.inputs], **self.values, **options},
        )


KEYS = {n: MaskKey(seed=0, experts=("a", "b", "c")[:n], tensor="t") for n in (1, 2, 3)}


def statistics(needs: str, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor] | None:
    """Return random statistics that fit the inputs: positive weights, or Gram matrices of layers."""
    generator = torch.Generator().manual_seed(9)
    if needs == "fisher":
        return [torch.rand(x.shape, generator=generator) + 0.01 for x in inputs]
    if inputs[0].dim() != 2:
        return None
    samples = [torch.randn(2 * x.shape[1] + 1, x.shape[1], generator=generator) for x in inputs]
    return [sample.T @ sample / len(sample) for sample in samples]


def _value(parameter: Parameter, dialect: str, inputs: int) -> Any:
    if parameter.name == "weight":
        return (0.3, 0.9, 0.5)[:inputs]
    if parameter.default_in(dialect) is not None:
        return None
    return 0.4


def cases() -> list[Case]:
    """Return a case for every method and dialect."""
    found = []
    for method in all_methods().values():
        least, most = method.inputs
        models = min(max(2, least), most or 3)
        for dialect in method.dialects:
            inputs = models - 1 if method.base_in(dialect) == "input" else models
            parameters = method.parameters_in(dialect)
            values = {p.name: _value(p, dialect, inputs) for p in parameters}
            known = {p.name for p in parameters}
            values |= {k: v for k, v in OWN_VALUES.get(method.name, {}).items() if k in known}
            given = {
                "lambda_" if name == "lambda" else name: value
                for name, value in values.items()
                if value is not None
            }
            found.append(Case(method.name, dialect, inputs, given))
    return found


def named(case: Case) -> str:
    """Return a case's name in pytest's output."""
    return case.method if case.dialect == "paper" else f"{case.method}-{case.dialect}"


every_case = pytest.mark.parametrize("case", cases(), ids=named)

YEAR = re.compile(r"\b(19|20)\d\d\b")
