"""A recipe's identity: the hash of what its output depends on, written in one way."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from evomerge.methods.registry import MergeMethod, get_method
from evomerge.settings import Scalar, Value, canonical

if TYPE_CHECKING:
    from evomerge.recipe.schema import Hop, Merge, Recipe


def recipe_hash(recipe: Recipe) -> str:
    """Return the sha256 of the canonical content: independent of names, file locations and written-out defaults.

    Raises:
        ValueError: a model or a file of texts is not pinned yet.
    """
    digests = {}
    for name, source in recipe.models.items():
        if source.sha256 is None:
            raise ValueError(f"models.{name}: the content hash is not known yet; pin the recipe first")
        digests[name] = source.sha256
    if recipe.path is None:
        used = set(recipe.merges)
    else:
        used = {hop.merge for hop in recipe.path if hop.merge is not None}
    merges = {name: _canonical_merge(recipe.merges[name], digests) for name in used}
    if recipe.path is None:
        body: Any = next(iter(merges.values()))
    else:
        body = [
            [
                merges[hop.merge] if hop.merge else digests[str(hop.model)],
                hop.layer,
                float(hop.scale),
                *([_layers_of_inputs(recipe, hop)] if set(hop.layers.values()) - {hop.layer} else []),
            ]
            for hop in recipe.path
        ]
    random = any(get_method(method).random for name in used for method in recipe.merges[name].methods)
    content = {
        "evomerge": 1,
        "body": body,
        **recipe.output.canonical(digests),
        "seed": recipe.seed if random else None,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _layers_of_inputs(recipe: Recipe, hop: Hop) -> list[int]:
    return [hop.layers.get(name, hop.layer) for name in recipe.merges[str(hop.merge)].inputs]


def _canonical_merge(merge: Merge, digests: Mapping[str, str]) -> dict[str, Any]:
    methods = [get_method(name) for name in merge.methods]
    return {
        "method": merge.method,
        # Also where no method reads it: the base gives the output its config and number format.
        "base": digests[merge.base] if merge.base else None,
        "inputs": [digests[name] for name in merge.inputs],
        "dialect": merge.dialect,
        "parameters": {method.name: _fallbacks(method, merge) for method in methods},
        "rules": [
            {
                "layers": None if rule.layers is None else sorted(set(map(str, rule.layers))),
                "roles": None if rule.roles is None else sorted(set(rule.roles)),
                "tensors": rule.tensors,
                "method": rule.method,
                "parameters": {name: _plain(value, merge.inputs) for name, value in rule.parameters.items()},
            }
            for rule in merge.rules
        ],
        **({"data": _canonical_data(merge)} if merge.needs else {}),
    }


def _canonical_data(merge: Merge) -> list[Any]:
    assert merge.data is not None, "checked with the recipe"
    for name in merge.inputs:
        if merge.data.file_of(name).sha256 is None:
            raise ValueError(
                f"data.texts: the sha256 of the texts of '{name}' is not known yet; pin the recipe first"
            )
    return [[merge.data.settings(name, needs) for name in merge.inputs] for needs in merge.needs]


def _fallbacks(method: MergeMethod, merge: Merge) -> dict[str, Any]:
    """Return the value of each of a method's parameters where no rule sets it."""
    values: dict[str, Any] = {}
    for parameter in method.parameters_in(merge.dialect):
        default = parameter.default_in(merge.dialect)
        value = merge.parameters.get(parameter.name, default)
        if value is not None:
            values[parameter.name] = _plain(value, merge.inputs, default)
    return values


def _plain(value: Value, inputs: Sequence[str], gap: Scalar | None = None) -> Any:
    """Return numbers as floats, and values by name as one for each input in order, or one where all agree."""
    if not isinstance(value, dict):
        return canonical(value)
    settings = [value.get(name, gap) for name in inputs]
    each = [None if setting is None else canonical(setting) for setting in settings]
    return each[0] if all(item == each[0] for item in each) else each
