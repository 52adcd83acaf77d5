"""Which methods are compared, with the settings that are customary and the ranges that are searched."""

from __future__ import annotations

from dataclasses import dataclass, field

Range = tuple[float, float, float]
"""Lowest and highest value, and the customary one, where the search starts."""

EXPERTS = ("arithmetic", "text", "ordering")
PAIR = ("arithmetic", "text")
"""For methods that take two models: the two best experts."""


@dataclass(frozen=True)
class Entry:
    """One row of the table.

    Attributes:
        name: of the row.
        method: registered name.
        each: parameters with one value per input.
        shared: parameters with one value.
        fixed: parameters that are not searched.
        inputs: the models that are merged.
        base: where task vectors start.
    """

    name: str
    method: str
    each: dict[str, Range] = field(default_factory=dict)
    shared: dict[str, Range] = field(default_factory=dict)
    fixed: dict[str, float | bool | str] = field(default_factory=dict)
    inputs: tuple[str, ...] = EXPERTS
    base: str | None = "base"


SHARE = (0.0, 1.0, 1 / 3)
SUM = (-0.2, 1.5, 0.4)
MEAN = (-0.2, 2.0, 1.0)

ENTRIES = (
    Entry("linear", "linear", {"weight": SHARE}, base=None),
    Entry("multislerp", "multislerp", {"weight": SHARE}, base=None),
    Entry("multislerp of deltas", "multislerp", {"weight": SHARE}),
    Entry("karcher", "karcher", {"weight": SHARE}, base=None),
    Entry("model_stock", "model_stock"),
    Entry("model_stock by row", "model_stock", fixed={"filter_wise": True}),
    Entry("slerp", "slerp", shared={"t": (0.0, 1.0, 0.5)}, inputs=PAIR, base=None),
    Entry("nuslerp of deltas", "nuslerp", {"weight": (0.0, 1.0, 0.5)}, inputs=PAIR),
    Entry(
        "nuslerp of deltas by row", "nuslerp", {"weight": (0.0, 1.0, 0.5)}, fixed={"axis": "out"}, inputs=PAIR
    ),
    Entry("task_arithmetic", "task_arithmetic", {"weight": SUM}),
    Entry("ties", "ties", {"weight": MEAN}, {"density": (0.05, 1.0, 0.2)}),
    Entry("dare_linear", "dare_linear", {"weight": SUM}, {"density": (0.1, 1.0, 0.5)}),
    Entry("dare_ties", "dare_ties", {"weight": MEAN}, {"density": (0.1, 1.0, 0.5)}),
    Entry("della_linear", "della_linear", {"weight": SUM}, {"density": (0.15, 0.85, 0.5)}, {"epsilon": 0.1}),
    Entry("della", "della", {"weight": MEAN}, {"density": (0.15, 0.85, 0.5)}, {"epsilon": 0.1}),
    Entry(
        "breadcrumbs", "breadcrumbs", {"weight": SUM}, {"density": (0.05, 1.0, 0.2), "gamma": (0.0, 0.3, 0.1)}
    ),
    Entry(
        "breadcrumbs_ties",
        "breadcrumbs_ties",
        {"weight": MEAN},
        {"density": (0.05, 1.0, 0.2), "gamma": (0.0, 0.3, 0.1)},
    ),
    Entry("sce", "sce", shared={"select_topk": (0.01, 1.0, 0.1)}),
    Entry("magmax", "magmax", {"weight": (-0.2, 1.5, 0.5)}, fixed={"lambda": 1.0}),
    Entry("ram", "ram", shared={"epsilon": (0.0, 0.01, 1e-5)}),
    Entry("ramplus_tl", "ramplus_tl", shared={"r": (0.0, 1.0, 0.1), "alpha": (0.0, 1.0, 0.2)}),
    Entry("nearswap", "nearswap", shared={"t": (0.0, 0.02, 1e-4)}, inputs=("arithmetic",), base="text"),
    Entry("arcee_fusion", "arcee_fusion", inputs=("arithmetic",), base="text"),
    Entry("fisher", "fisher", {"weight": (0.0, 2.0, 1.0)}, base=None),
    Entry("regmean", "regmean", {"weight": (0.0, 2.0, 1.0)}, {"alpha": (0.0, 1.0, 0.9)}, base=None),
    Entry("regmean++", "regmean++", {"weight": (0.0, 2.0, 1.0)}, {"alpha": (0.0, 1.0, 0.9)}, base=None),
    Entry("tsv_m", "tsv_m", {"weight": MEAN}),
    Entry("iso_c", "iso_c", {"weight": MEAN}),
    Entry("iso_cts", "iso_cts", {"weight": MEAN}),
    Entry("knots", "knots", {"weight": MEAN}, {"density": (0.05, 1.0, 0.2)}),
    Entry("wudi", "wudi"),
    Entry(
        "wudi in closed form",
        "wudi",
        {"weight": MEAN},
        {"ridge": (0.0, 1.0, 0.0)},
        {"solver": "closed_form"},
    ),
)
