"""The recipes that every search is compared with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from evomerge.config import Config
from evomerge.layers_config import MERGED
from evomerge.recipe import Merge, Recipe, Source


def baseline_recipes(config: Config, sources: Mapping[str, Source]) -> dict[str, Recipe]:
    """Return ``base``, every expert by name, and ``uniform`` where it is defined.

    ``uniform`` is the plain average of all experts. ``initial`` is the search space's to decode.
    """
    names = ("base", *config.models.experts)
    recipes = {name: whole_model(config, sources, name) for name in names}
    if "uniform" not in undefined_baselines(config):
        recipes["uniform"] = _linear(config, sources, tuple(config.models.experts))
    return recipes


def undefined_baselines(config: Config) -> dict[str, str]:
    """Return the baselines that a config does not have, each with the reason."""
    if config.coefficients is None:
        return {"uniform": "a search over layer paths averages nothing"}
    if len(config.models.experts) == 1:
        return {"uniform": "there is only one expert, its average is the expert itself"}
    return {}


def whole_model(config: Config, sources: Mapping[str, Source], name: str) -> Recipe:
    """Return the recipe of one model as it is.

    It is a linear merge of the model with weight 1: a copy, bit for bit, written like the search's own output.
    """
    return _linear(config, sources, (name,))


def recipe_models(config: Config, sources: Mapping[str, Source], used: Iterable[str]) -> dict[str, Source]:
    """Return what a recipe that is made of some models has to name: these, the base, and whose tokenizer it has."""
    # A tokenizer or chat template of its own choosing may be made of any of the models.
    chosen = config.output.tokenizer is not None or config.output.chat_template is not None
    names = sources if chosen else {"base": None, **dict.fromkeys(used)}
    tokenizer = config.form.vocabulary.source
    return {name: source for name, source in sources.items() if name in names or name == tokenizer}


def _linear(config: Config, sources: Mapping[str, Source], inputs: tuple[str, ...]) -> Recipe:
    merge = Merge(method="linear", inputs=inputs, parameters={"weight": 1.0 / len(inputs)})
    return Recipe(
        models=recipe_models(config, sources, inputs),
        merges={MERGED: merge},
        output=config.form,
        seed=config.seed,
    )
