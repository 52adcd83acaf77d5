"""Which recipes answer alike, whatever they call their models and whoever wrote them down."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from evomerge.checkpoints import Checkpoint
from evomerge.checkpoints.tokenizer import has_tokenizer, vocabulary_digest
from evomerge.errors import UserError
from evomerge.merging.plan import MergePlan, plan_merge
from evomerge.output import Output
from evomerge.recipe import Recipe

_GENERATION = "generation_config.json"


class Identities:
    """Tells what decides a model's answers, besides engine and prompts, as one hash.

    It is the recipe's hash where the output is of the form that it has by itself: a model's own number format
    and tokenizer may be written out or not, and a tokenizer may be anybody's who has the same one. So a single
    model is the same thing to a search that compares with it and to whoever scores it alone. To it comes what
    recipes do not hash: the generation defaults, and the token ids where rows are matched by token.

    Args:
        checkpoints: the models of all recipes, by name.
    """

    def __init__(self, checkpoints: Mapping[str, Checkpoint]) -> None:
        self._checkpoints = checkpoints
        self._known: dict[str, tuple[Output | None, Any]] = {}

    def of(self, recipe: Recipe) -> str:
        """Return the hash of a pinned recipe of these models."""
        shape = _shape(recipe)
        if shape not in self._known:
            self._known[shape] = self._examine(recipe)
        output, further = self._known[shape]
        same = recipe if output is None else recipe.model_copy(update={"output": output})
        return hashlib.sha256(json.dumps([same.hash, further], sort_keys=True).encode()).hexdigest()

    def _examine(self, recipe: Recipe) -> tuple[Output | None, Any]:
        """Return the plainest output of the same form, if there is one, and what else matters."""
        plan = plan_merge(recipe, self._checkpoints)
        wanted = self._form(plan)
        generation = self._generation(plan)
        for output in (Output(), Output(dtype=recipe.output.dtype)):
            try:
                plain = plan_merge(recipe.model_copy(update={"output": output}), self._checkpoints)
            except UserError:
                continue
            if self._form(plain) == wanted:
                return output, generation
        ids = {
            str(recipe.models[name].sha256): vocabulary_digest(self._checkpoints[name].path)
            for name in recipe.models
            if has_tokenizer(self._checkpoints[name].path)
        }
        return None, [generation, ids]

    def _form(self, plan: MergePlan) -> Any:
        return plan.config, self._generation(plan), plan.donor, plan.jobs, plan.copied, bool(plan.views)

    def _generation(self, plan: MergePlan) -> Any:
        if plan.generation is not None:
            return dict(plan.generation)
        path = self._checkpoints[plan.donor].path / _GENERATION
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _shape(recipe: Recipe) -> str:
    """Return what of a recipe decides the form of its output: all but the parameters of its merges."""
    merges = {
        name: [merge.base, merge.inputs, merge.methods, merge.dialect]
        for name, merge in recipe.merges.items()
    }
    models = {name: source.sha256 for name, source in recipe.models.items()}
    path = None if recipe.path is None else [hop.model_dump(mode="json") for hop in recipe.path]
    return json.dumps([models, merges, path, recipe.output.model_dump(mode="json")], sort_keys=True)
