"""Who is validated, and who wins. The winner is never simply the best-scored candidate."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from evomerge.errors import UserError
from evomerge.evaluation.statistics import one_standard_error_choice, suite_mean
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
    first: int = 0,
) -> list[tuple[str, Recipe, int | None]]:
    """Return the recipes to validate, simplest first: (name, recipe, candidate id).

    Parents, uniform, initial, the last mean, earlier means, and those candidates with the best shrunk scores that
    are none of them. A recipe that occurs twice is kept where it is simplest.

    Args:
        baselines: by name.
        means: the distribution's after each generation.
        decode: of the space that was searched.
        shrunk: candidate → score, of each recipe once.
        recipe_of: gives a candidate's recipe.
        first: number of the first generation, from 0.
    """
    entries: list[tuple[str, Recipe, int | None]] = [
        (name, recipe, None) for name, recipe in baselines.items() if name not in ("initial", "uniform")
    ]
    entries += [(name, baselines[name], None) for name in ("uniform", "initial") if name in baselines]
    if means:
        entries.append(("mean", decode(means[-1]), None))
        for share in sorted(SNAPSHOTS, reverse=True):
            generation = max(0, round(share * len(means)) - 1)
            name = f"mean after generation {first + generation + 1}"
            entries.append((name, decode(means[generation]), None))
    unique: dict[str, tuple[str, Recipe, int | None]] = {}
    for entry in entries:
        unique.setdefault(entry[1].hash, entry)
    room = len(unique) + ARCHIVE
    for candidate in sorted(shrunk, key=lambda candidate: (-shrunk[candidate], candidate)):
        if len(unique) == room:
            break
        recipe = recipe_of(candidate)
        unique.setdefault(recipe.hash, (f"candidate {candidate}", recipe, candidate))
    return list(unique.values())


def choose(
    entries: Sequence[tuple[str, Recipe]],
    baselines: Collection[str],
    table: Callable[[Recipe], ScoreTable | str],
    weights: Mapping[str, float],
) -> tuple[str, Recipe]:
    """Return the winner on the validation items.

    Among what the search found, the steadiest (the mean before a single candidate) within one standard error of
    the best stands for the search, since the best of several noisy scores is partly luck. It then meets the
    baselines on plain validation scores: whoever is better wins, and a tie goes to the simpler one.

    Args:
        entries: the short list, simplest first.
        baselines: names of the entries that are baselines.
        table: gives a recipe's scores, or the reason why there are none.
        weights: of the tasks.

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
    found = {name: scores for name, scores in tables.items() if name not in baselines}
    finalists = [name for name in tables if name in baselines]
    if found:
        finalists.append(one_standard_error_choice(found, weights))
    chosen = max(finalists, key=lambda name: suite_mean(tables[name], weights))
    return next((name, recipe) for name, recipe in entries if name == chosen)
