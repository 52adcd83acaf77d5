"""The statistics that a recipe needs: those that are kept are opened, the others computed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from evomerge.checkpoints import Checkpoint
from evomerge.merging.plan import statistics_keys
from evomerge.recipe import Recipe
from evomerge.statistics.files import Statistics, find_statistics

Report = Callable[[str, int, int], None]
"""Called with (what is computed, steps done, steps in all)."""


def silent(what: str, done: int, total: int) -> None:
    """Report to nobody."""


def in_lines(say: Callable[[str], None], seconds: float = 5.0) -> Report:
    """Return a report that says how far a computation has got, in a line every few seconds."""
    last, told = "", 0.0

    def report(what: str, done: int, total: int) -> None:
        nonlocal last, told
        now = time.monotonic()
        if what != last or now - told >= seconds or done == total:
            say(f"{what}: {100 * done // max(1, total)} %")
            last, told = what, now

    return report


def provide(
    recipe: Recipe,
    checkpoints: Mapping[str, Checkpoint],
    *,
    device: str = "cpu",
    report: Report | None = None,
) -> dict[str, Statistics]:
    """Return the statistics that a pinned recipe's merges need, by key.

    Args:
        recipe: with the hash of every model.
        checkpoints: its models, by name.
        device: where models are run, if one has to be.
        report: told how long computations get on.

    Raises:
        UserError: texts are not what the recipe says.
        CheckpointError: a model cannot be run.
    """
    found: dict[str, Statistics] = {}
    for name, merge in recipe.merges.items():
        # Last those that need a merge, to which the others belong.
        for needs in sorted(merge.needs, key=lambda kind: kind == "merged gram"):
            keys = dict(zip(merge.inputs, statistics_keys(recipe, name, needs, checkpoints), strict=True))
            kept = {key: find_statistics(key) for key in keys.values()}
            missing = {model: key for model, key in keys.items() if kept[key] is None}
            found |= {key: statistics for key, statistics in kept.items() if statistics is not None}
            if not missing:
                continue
            from evomerge.statistics import collect

            if needs == "merged gram":
                found |= collect.merged_grams(
                    recipe, name, checkpoints, keys, found, device=device, report=report or silent
                )
                continue
            assert merge.data is not None, "checked with the recipe"
            for model, key in missing.items():
                if key not in found:
                    found[key] = collect.kept_statistics(
                        checkpoints[model],
                        merge.data,
                        model,
                        needs,
                        key,
                        device=device,
                        report=report or silent,
                    )
    return found
