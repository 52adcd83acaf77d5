"""What every merge method promises beyond its formula: one entry a method, read by the property tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest

from evomerge.methods import get_method
from tests.methods.cases import Case, named

Values = dict[str, Any]


@dataclass(frozen=True)
class Promise:
    """The promises of a method, or of one of its dialects.

    Attributes:
        equal: number of experts → values with which equal experts give that expert; None where no values do.
        base: values with which the base comes out bit for bit; None where there are none, or no base.
        symmetric: the result does not depend on the experts' order, their values moving along.
        scales: multiplying all task vectors (without a base: all weights) by a positive number multiplies the
            merged one by it.
        variants: values of words and switches that change the formula, each tried beside the defaults.
    """

    equal: Callable[[int], Values] | None
    base: Values | None = None
    symmetric: bool = True
    scales: bool = True
    variants: tuple[Values, ...] = ()


def any_values(count: int) -> Values:
    return {}


def fractions(**others: Any) -> Callable[[int], Values]:
    """Weights that add up to 1, for methods that sum."""
    return lambda count: {"weight": 1.0 / count, **others}


def constant(**values: Any) -> Callable[[int], Values]:
    return lambda count: values


NO_LAMBDA = {"lambda_": 0.0}

PROMISES: dict[str, Promise] = {
    "arcee_fusion": Promise(None, scales=False),
    "breadcrumbs": Promise(fractions(density=1.0), NO_LAMBDA, variants=({"density": 0.5, "gamma": 0.2},)),
    "breadcrumbs_ties": Promise(constant(weight=1.0, density=1.0), NO_LAMBDA),
    "breadcrumbs_ties-mergekit": Promise(
        fractions(density=1.0), NO_LAMBDA, variants=({"density": 0.4, "rescale": True},)
    ),
    "dare_linear": Promise(fractions(density=1.0), NO_LAMBDA),
    "dare_ties": Promise(constant(weight=1.0, density=1.0), NO_LAMBDA),
    "dare_ties-mergekit": Promise(fractions(density=1.0), NO_LAMBDA, variants=({"density": 0.4},)),
    "della": Promise(constant(weight=1.0, density=1.0), NO_LAMBDA),
    "della-mergekit": Promise(constant(weight=1.0, density=1.0), NO_LAMBDA, variants=({"density": 0.4},)),
    "della_linear": Promise(fractions(density=1.0), NO_LAMBDA, variants=({"density": 0.4},)),
    "fisher": Promise(any_values),
    "iso_c": Promise(None, NO_LAMBDA),
    "iso_cts": Promise(None, NO_LAMBDA, variants=({"common_space_fraction": 0.3},)),
    "karcher": Promise(any_values),
    "knots": Promise(
        constant(weight=1.0, density=1.0),
        NO_LAMBDA,
        variants=({"inner": "dare_ties", "density": 0.4},),
    ),
    "linear": Promise(any_values),
    "magmax": Promise(constant(weight=1.0, lambda_=1.0), NO_LAMBDA),
    "model_stock": Promise(any_values, variants=({"filter_wise": True},)),
    "multislerp": Promise(any_values),
    "nearswap": Promise(constant(t=10.0), {"t": 0.0}, scales=False),
    "nuslerp": Promise(any_values, variants=({"axis": "out"}, {"axis": "in"})),
    "nuslerp-mergekit": Promise(
        any_values,
        variants=({"nuslerp_flatten": False}, {"nuslerp_flatten": False, "nuslerp_row_wise": True}),
    ),
    "passthrough": Promise(any_values),
    "ram": Promise(constant(epsilon=0.0), {"epsilon": 10.0}, scales=False),
    "ramplus_tl": Promise(constant(epsilon=0.0), {"epsilon": 10.0}, scales=False),
    "regmean": Promise(any_values),
    "regmean++": Promise(any_values),
    "sce": Promise(any_values, variants=({"select_topk": 0.5},)),
    "sce-mergekit": Promise(
        constant(select_topk=1.0), {"select_topk": 0.0}, variants=({"select_topk": 0.5},)
    ),
    "slerp": Promise(any_values, symmetric=False),
    "slerp-mergekit": Promise(any_values, base={"t": 0.0}, symmetric=False),
    "task_arithmetic": Promise(fractions(), NO_LAMBDA),
    "ties": Promise(
        constant(weight=1.0, density=1.0),
        NO_LAMBDA,
        variants=({"elect": "count"}, {"elect": "max", "merge": "max"}),
    ),
    "ties-mergekit": Promise(
        constant(weight=1.0, density=1.0), NO_LAMBDA, variants=({"rescale": True, "density": 0.4},)
    ),
    "tsv_m": Promise(lambda count: {"weight": 1.0, "rank": float(count)}, NO_LAMBDA),
    "wudi": Promise(
        constant(weight=1.0, solver="closed_form", ridge=0.0),
        NO_LAMBDA,
        scales=False,
        variants=({"solver": "closed_form"}, {"solver": "closed_form", "ridge": 0.1}),
    ),
}
"""By method, or by ``method-dialect`` where a dialect promises something else."""


def promise_of(case: Case) -> Promise:
    """Return a case's entry; values that its dialect does not have are left out."""
    found = PROMISES.get(f"{case.method}-{case.dialect}") or PROMISES.get(case.method)
    assert found is not None, (
        f"tests/methods/promises.py has no entry for '{case.method}': say there what the method promises"
    )
    known = {p.name for p in get_method(case.method).parameters_in(case.dialect)}

    def only_known(values: Values) -> Values:
        return {name: value for name, value in values.items() if name.rstrip("_") in known}

    equal = found.equal
    return replace(
        found,
        equal=None if equal is None else lambda count: only_known(equal(count)),
        base=None if found.base is None else only_known(found.base),
    )


def varied(cases: Sequence[Case]) -> list[Any]:
    """Return the cases and their variants as pytest's parameters."""
    found = []
    for case in cases:
        entry = PROMISES.get(f"{case.method}-{case.dialect}") or PROMISES.get(case.method)
        found.append(pytest.param(case, id=named(case)))
        for values in entry.variants if entry is not None else ():
            name = "-".join(f"{key}={value}" for key, value in values.items())
            found.append(
                pytest.param(replace(case, values={**case.values, **values}), id=f"{named(case)}-{name}")
            )
    return found
