"""The recipe: the complete, deterministic description of one merged model."""

from evomerge.output import Output
from evomerge.recipe.reading import (
    expand_home,
    folder_of,
    load_recipe,
    recipe_from,
    resolve_output,
    resolve_source,
)
from evomerge.recipe.schema import DTYPES, Hop, Merge, Recipe, Rule, Source

__all__ = [
    "DTYPES",
    "Hop",
    "Merge",
    "Output",
    "Recipe",
    "Rule",
    "Source",
    "expand_home",
    "folder_of",
    "load_recipe",
    "recipe_from",
    "resolve_output",
    "resolve_source",
]
