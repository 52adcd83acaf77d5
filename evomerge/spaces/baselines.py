"""The recipes that every search is compared with."""

from __future__ import annotations

from collections.abc import Mapping

from evomerge.config import Config
from evomerge.recipe import Merge, Recipe, Source
from evomerge.spaces.coefficients import MERGE


def baseline_recipes(config: Config, sources: Mapping[str, Source]) -> dict[str, Recipe]:
    """Return ``base``, every expert by name, and ``uniform`` where it is defined.

    A single model is a linear merge of itself with weight 1: a copy, bit for bit, written like the search's
    own output. ``uniform`` is the plain average of all experts. ``initial`` is the search space's to decode.
    """
    names = ("base", *config.models.experts)
    recipes = {name: _linear(config, sources, (name,)) for name in names}
    if "uniform" not in undefined_baselines(config):
        recipes["uniform"] = _linear(config, sources, tuple(config.models.experts))
    return recipes


def undefined_baselines(config: Config) -> dict[str, str]:
    """Return the baselines that a config does not have, each with the reason."""
    if len(config.models.experts) == 1:
        return {"uniform": "there is only one expert, its average is the expert itself"}
    return {}


def _linear(config: Config, sources: Mapping[str, Source], inputs: tuple[str, ...]) -> Recipe:
    merge = Merge(method="linear", inputs=inputs, parameters={"weight": 1.0 / len(inputs)})
    # A tokenizer or chat template of its own choosing may be made of any of the models.
    chosen = config.output.tokenizer is not None or config.output.chat_template is not None
    names = sources if chosen else dict.fromkeys(("base", *inputs))
    return Recipe(
        models={name: sources[name] for name in names},
        merges={MERGE: merge},
        output=config.output.form,
        seed=config.seed,
    )
