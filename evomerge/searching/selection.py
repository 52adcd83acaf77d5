"""Who is validated, and who wins. The winner is never simply the best-scored candidate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from evomerge.errors import UserError
from evomerge.evaluation.statistics import one_standard_error_choice
from evomerge.recipe import Recipe
from evomerge.searching.ranking import ScoreTable, values_of
from evomerge.spaces.genotype import Genotype

SNAPSHOTS = (0.5, 0.75)
"""At which shares of the search the distribution's mean is kept for the short list, beside the last one."""

ARCHIVE = 2
"""How many candidates with the best shrunk scores enter the short list."""


def short_list(
    *,
    baselines: Mapping[str, Recipe],
    means: Sequence[Genotype],
    decode: Callable[[Genotype], Recipe],
    shrunk: Mapping[int, float],
    recipe_of: Callable[[int], Recipe],
) -> list[tuple[str, Recipe, int | None]]:
    """Return the recipes to validate, simplest first: (name, recipe, candidate id).

    Parents, uniform, initial, the last mean, earlier means, and the candidates with the best shrunk scores.
    A recipe that occurs twice is kept where it is simplest.
    """
    entries: list[tuple[str, Recipe, int | None]] = [
        (name, recipe, None) for name, recipe in baselines.items() if name not in ("initial", "uniform")
    ]
    entries += [(name, baselines[name], None) for name in ("uniform", "initial") if name in baselines]
    if means:
        entries.append(("mean", decode(means[-1]), None))
        for share in sorted(SNAPSHOTS, reverse=True):
            generation = max(0, round(share * len(means)) - 1)
            entries.append((f"mean after generation {generation + 1}", decode(means[generation]), None))
    best = sorted(shrunk, key=lambda candidate: (-shrunk[candidate], candidate))[:ARCHIVE]
    entries += [(f"candidate {candidate}", recipe_of(candidate), candidate) for candidate in best]
    unique: dict[str, tuple[str, Recipe, int | None]] = {}
    for entry in entries:
        unique.setdefault(entry[1].hash, entry)
    return list(unique.values())


def choose(
    entries: Sequence[tuple[str, Recipe]],
    table: Callable[[Recipe], ScoreTable | str],
    weights: Mapping[str, float],
) -> tuple[str, Recipe]:
    """Return the winner on the validation items: the simplest within one standard error of the best.

    Raises:
        UserError: no entry could be scored at all.
    """
    tables = {}
    for name, recipe in entries:
        scores = table(recipe)
        if not isinstance(scores, str):
            tables[name] = values_of(scores)
    if not tables:
        raise UserError(
            "no recipe of the short list can be scored on the validation items, not even the parents"
        )
    chosen = one_standard_error_choice(tables, weights)
    return next((name, recipe) for name, recipe in entries if name == chosen)
