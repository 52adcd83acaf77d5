"""Whether a recipe's parts agree: names, the parameters of its methods, their values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from evomerge.errors import nearest
from evomerge.methods.expressions import factors
from evomerge.methods.registry import MergeMethod, Parameter, get_method
from evomerge.settings import Value, scalars

if TYPE_CHECKING:
    from evomerge.recipe.schema import Hop, Merge, Recipe


def check_recipe(recipe: Recipe) -> None:
    """Refuse a recipe that contradicts itself.

    Raises:
        ValueError: ``key: `` and what is wrong there.
    """
    for name, merge in recipe.merges.items():
        if name in recipe.models:
            raise ValueError(f"merges.{name}: a model is called '{name}' too; rename one")
        _check_merge(recipe, name, merge)
    if recipe.path is not None:
        if not recipe.path:
            raise ValueError("path: is empty; leave it out for all layers in order")
        for i, hop in enumerate(recipe.path):
            kind, known, ref = (
                ("model", recipe.models, hop.model)
                if hop.merge is None
                else ("merge", recipe.merges, hop.merge)
            )
            if ref not in known:
                raise ValueError(f"path.{i}.{kind}: no {kind} is called '{ref}'{nearest(str(ref), known)}")
            if hop.merge is not None:
                _check_layers(f"path.{i}.layers", hop, recipe.merges[hop.merge])
    elif len(recipe.merges) != 1:
        raise ValueError(f"merges: without a path there is exactly one, here are {len(recipe.merges)}")
    recipe.output.check(recipe.models)


def _check_merge(recipe: Recipe, name: str, merge: Merge) -> None:
    where = f"merges.{name}"
    for key, ref in (*(("inputs", ref) for ref in merge.inputs), ("base", merge.base)):
        if ref is not None and ref not in recipe.models:
            raise ValueError(f"{where}.{key}: no model is called '{ref}'{nearest(ref, recipe.models)}")
    if len(set(merge.inputs)) < len(merge.inputs):
        raise ValueError(f"{where}.inputs: a model is listed twice")
    methods = {method: get_method(method) for method in merge.methods}
    for method in methods.values():
        if merge.dialect not in method.dialects:
            raise ValueError(
                f"{where}.dialect: {method.name} has no dialect '{merge.dialect}' "
                f"(known: {', '.join(method.dialects)})"
            )
        method.check_inputs(merge.base, merge.inputs, where, merge.dialect)
    if merge.data is None and merge.needs:
        user = next(method.name for method in methods.values() if method.needs)
        raise ValueError(
            f"{where}: {user} needs data for every input; add e.g. data: {{texts: ./texts.jsonl}}"
        )
    if merge.data is not None:
        try:
            merge.data.check_inputs(merge.inputs)
        except ValueError as error:
            raise ValueError(f"{where}.data.{error}") from None
        if merge.data.tasks:
            raise ValueError(
                f"{where}.data.texts: a recipe has no tasks, '{merge.data.tasks[0]}' is none of its; name a file"
            )
    if "merged gram" in merge.needs and recipe.path is not None:
        raise ValueError(f"{where}: regmean++ merges all layers in order; leave out 'path'")
    declared: dict[str, list[Parameter]] = {}
    for method in methods.values():
        for parameter in method.parameters_in(merge.dialect):
            declared.setdefault(parameter.name, []).append(parameter)
    for place, values in (
        (f"{where}.parameters", merge.parameters),
        *((f"{where}.rules.{i}.parameters", rule.parameters) for i, rule in enumerate(merge.rules)),
    ):
        for key, value in values.items():
            if key not in declared:
                hint = nearest(key, declared) or f" (known: {', '.join(declared)})"
                users = " and ".join(methods) + (" has" if len(methods) == 1 else " have")
                raise ValueError(f"{place}: {users} no parameter '{key}'{hint}")
            for parameter in declared[key]:
                _check_value(parameter, value, merge.inputs, f"{place}.{key}")
    for key, parameters in declared.items():
        if any(p.default_in(merge.dialect) is None for p in parameters) and not _always_set(merge, key):
            user = next(m.name for m in methods.values() if key in _required(m, merge.dialect))
            raise ValueError(f"{where}.parameters: {user} needs a value for '{key}' for every input")


def _check_layers(where: str, hop: Hop, merge: Merge) -> None:
    donor, others = merge.base or merge.inputs[0], set(merge.inputs)
    for name in hop.layers:
        if name == donor:
            raise ValueError(f"{where}: '{name}' gives the merge its form; write its layer as 'layer'")
        if name not in others:
            raise ValueError(
                f"{where}: '{name}' is not an input of '{hop.merge}'{nearest(name, merge.inputs)}"
            )


def _always_set(merge: Merge, key: str) -> bool:
    """Whether a required parameter has a value for every input, as far as this can be seen here."""
    places = [merge.parameters, *(rule.parameters for rule in merge.rules)]
    values = [place[key] for place in places if key in place]
    covered = {name for value in values for name in (value if isinstance(value, dict) else merge.inputs)}
    return covered >= set(merge.inputs)


def _required(method: MergeMethod, dialect: str) -> list[str]:
    return [p.name for p in method.parameters_in(dialect) if p.default_in(dialect) is None]


def _check_value(parameter: Parameter, value: Value, inputs: Sequence[str], place: str) -> None:
    if parameter.name == "weight" and isinstance(value, str):
        try:
            factors(value, inputs)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
    if not isinstance(value, dict):
        for item in scalars(value):
            parameter.check(item, place)
        return
    if parameter.scope != "expert":
        raise ValueError(f"{place}: has one value for all inputs, not one each")
    if not value:
        raise ValueError(f"{place}: is empty; give one value for all inputs, or one each by name")
    for name, setting in value.items():
        if name not in inputs:
            raise ValueError(f"{place}: '{name}' is not an input of the merge{nearest(name, inputs)}")
        for item in scalars(setting):
            parameter.check(item, f"{place}.{name}")
