"""What is compared: models that need no search, a grid, and searches of one budget."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from evomerge.recipe import Merge

EXPERTS = ("maths", "french", "ordering")

GRID = ((0.0, 0.4, 0.8, 1.2, 1.6), (0.0, 0.4, 0.8), (0.0, 0.4, 0.8))
"""Each expert's weights in the grid: 45 merges, as many as a search proposes."""


def task_arithmetic(*weights: float) -> Merge:
    """Return the base plus the weighted sum of the experts' task vectors."""
    return Merge(
        method="task_arithmetic",
        base="base",
        inputs=EXPERTS,
        parameters={"weight": dict(zip(EXPERTS, weights, strict=True))},
    )


DEFAULTS: dict[str, Merge] = {
    "task arithmetic, 0.4 each": task_arithmetic(0.4, 0.4, 0.4),
    "TIES, density 0.2": Merge(
        method="ties", base="base", inputs=EXPERTS, parameters={"weight": 1.0, "density": 0.2}
    ),
    "DARE-TIES, density 0.5": Merge(
        method="dare_ties", base="base", inputs=EXPERTS, parameters={"weight": 1.0, "density": 0.5}
    ),
}
"""Merges at their papers' customary settings (`linear` is the plain average, which every search scores anyway)."""


def grid() -> dict[str, Merge]:
    """Return the grid's merges by name."""
    return {
        "grid " + " ".join(f"{w:g}" for w in weights): task_arithmetic(*weights)
        for weights in itertools.product(*GRID)
    }


@dataclass(frozen=True)
class Arm:
    """One way of searching.

    Attributes:
        name: in the table.
        change: turns the config of configs/smollm2_crosslingual.yaml, as plain data, into that of this arm.
    """

    name: str
    change: Callable[[dict[str, Any]], None]


def _method(method: str, parameters: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
    def change(config: dict[str, Any]) -> None:
        weight = config["space"]["parameters"]["weight"]
        config["space"] = {
            "type": "coefficients",
            "method": method,
            "parameters": {"weight": weight, **parameters},
        }
        config["optimizer"]["population"] = 9

    return change


FULL = {"candidates": 8, "population": 4}
"""The smallest search of CMA-ES with more than one generation: it answers a quarter more items than the others."""


def _full_evaluation(config: dict[str, Any]) -> None:
    """Every candidate answers all search items; there are so many fewer candidates."""
    config["suite"]["items_per_candidate"] = 100_000
    config["budget"]["candidates"] = FULL["candidates"]
    config["optimizer"]["population"] = FULL["population"]


EDITS = {"type": "edits", "population": 9}
"""Generations as large as those of the coefficients: the budget is too small for those that edits has by default."""
LAYERS = {"pool": list(EXPERTS), "repeats": 2, "scale": {"range": [0.8, 1.25]}}


def _layers(config: dict[str, Any]) -> None:
    config["space"] = {"type": "layers", **LAYERS}
    config["optimizer"] = EDITS


def _both(config: dict[str, Any]) -> None:
    coefficients = {key: value for key, value in config["space"].items() if key != "type"}
    config["space"] = {
        "type": "coefficients+layers",
        "coefficients": coefficients,
        "layers": {**LAYERS, "pool": ["merged", *EXPERTS]},
    }
    config["optimizer"] = {**config["optimizer"], "layers": EDITS}


DENSITY = {"range": [0.2, 1.0], "initial": 0.6, "per": "expert"}

ARMS = (
    Arm("task_arithmetic", lambda config: None),
    Arm("ties", _method("ties", {"density": DENSITY})),
    Arm("dare_ties", _method("dare_ties", {"density": DENSITY})),
    Arm("plain CMA-ES", _full_evaluation),
    Arm("layer paths", _layers),
    Arm("coefficients, then layer paths", _both),
)
