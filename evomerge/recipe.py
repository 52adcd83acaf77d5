"""The recipe: the complete, deterministic description of one merged model."""

from __future__ import annotations

import fnmatch
import hashlib
import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from evomerge.checkpoints.names import ROLES, Position, Role, TensorName
from evomerge.errors import UserError, nearest
from evomerge.methods.registry import get_method
from evomerge.schema import Frozen, dump_yaml, read_yaml, validate

Scalar = bool | float | str
Value = Scalar | dict[str, Scalar]
"""A parameter's value: one for all, or one for each input by name."""

DTYPES = ("float32", "bfloat16", "float16")


class Source(Frozen):
    """Where a parent comes from, and what it contained when the recipe was made.

    `sha256` is the content hash of the checkpoint (`Checkpoint.sha256`): tensors and architecture, whatever
    the folder is called and however it is sharded.
    """

    source: str
    revision: str | None = None
    adapter: str | None = None
    sha256: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, data: Any) -> Any:
        return {"source": data} if isinstance(data, str) else data


class Rule(Frozen):
    """Parameters (and a method) for the tensors that a filter selects; an absent filter selects all.

    Attributes:
        layers: layer indices, and ``pre`` / ``post`` for the tensors before and after the layers.
        roles: see `evomerge.checkpoints.names.ROLES`.
        tensors: shell-style pattern on the tensor's full name.
    """

    layers: tuple[Position, ...] | None = None
    roles: tuple[Role, ...] | None = None
    tensors: str | None = None
    method: str | None = None
    parameters: dict[str, Value] = Field(default_factory=dict)

    @field_validator("roles", mode="before")
    @classmethod
    def _known_roles(cls, roles: Any) -> Any:
        for role in roles if isinstance(roles, list | tuple) else []:
            if role not in ROLES:
                raise ValueError(f"unknown role '{role}'{nearest(str(role), ROLES)}; roles: {', '.join(ROLES)}")
        return roles

    def matches(self, tensor: TensorName) -> bool:
        """Whether the rule applies to a tensor."""
        return (
            (self.layers is None or tensor.position in self.layers)
            and (self.roles is None or tensor.role in self.roles)
            and (self.tensors is None or fnmatch.fnmatchcase(tensor.name, self.tensors))
        )


class Merge(Frozen):
    """One merge of whole models.

    For each parameter of a tensor the first rule that matches the tensor and sets the parameter gives its
    value; then the merge's own `parameters`, then the method's default. The method is found likewise.
    """

    method: str
    base: str | None = None
    inputs: tuple[str, ...] = Field(min_length=1)
    dialect: Literal["paper", "mergekit"] = "paper"
    parameters: dict[str, Value] = Field(default_factory=dict)
    rules: tuple[Rule, ...] = ()

    def resolve(self, tensor: TensorName) -> tuple[str, dict[str, Value]]:
        """Return the method's name and every parameter's value for one tensor, defaults included."""
        rules = [rule for rule in self.rules if rule.matches(tensor)]
        method = next((rule.method for rule in rules if rule.method), self.method)
        values: dict[str, Value] = {}
        for layer in (*(rule.parameters for rule in rules), self.parameters, get_method(method).defaults()):
            for name, value in layer.items():
                values.setdefault(name, value)
        known = {parameter.name for parameter in get_method(method).parameters}
        return method, {name: value for name, value in values.items() if name in known}

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of all methods in use, the main one first."""
        return tuple(dict.fromkeys([self.method, *(r.method for r in self.rules if r.method)]))


class Hop(Frozen):
    """One layer of a path: a model's or a merge's layer, entered by a scaled residual stream."""

    model: str | None = None
    merge: str | None = None
    layer: int = Field(ge=0)
    scale: float = 1.0

    @model_validator(mode="after")
    def _one_source(self) -> Hop:
        if (self.model is None) == (self.merge is None):
            raise ValueError("a hop names either a 'model' or a 'merge'")
        if self.scale == 0:
            raise ValueError("scale 0 wipes out the residual stream; give a number other than 0")
        return self


class Output(Frozen):
    """What is written: number format, and whose tokenizer and chat template go along (a model's name)."""

    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    tokenizer: str | None = None
    chat_template: str | None = None


class Recipe(Frozen):
    """A merged model: parents, merges, optionally a path through their layers, and the output's form.

    Without `path` the output is the only merge, all layers in order. With it, layer i of the output is hop
    i; embeddings come from the first hop's source, final norm and head from the last one's.
    """

    evomerge: Literal[1] = 1
    models: dict[str, Source] = Field(min_length=1)
    merges: dict[str, Merge] = Field(default_factory=dict)
    path: tuple[Hop, ...] | None = None
    output: Output = Output()
    seed: int = 0

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        for name, merge in self.merges.items():
            if name in self.models:
                raise ValueError(f"'{name}' names both a model and a merge; rename one")
            self._check_merge(name, merge)
        if self.path is not None:
            if not self.path:
                raise ValueError("path is empty; leave it out for all layers in order")
            for hop in self.path:
                known, ref = (self.models, hop.model) if hop.model else (self.merges, hop.merge)
                if ref not in known:
                    kind = "model" if hop.model else "merge"
                    raise ValueError(f"path names the {kind} '{ref}', which is not listed{nearest(str(ref), known)}")
        elif len(self.merges) != 1:
            raise ValueError(f"without a path there must be exactly one merge, here are {len(self.merges)}")
        for key, ref in (("tokenizer", self.output.tokenizer), ("chat_template", self.output.chat_template)):
            if ref is not None and ref not in self.models:
                raise ValueError(f"output.{key}: no model is called '{ref}'{nearest(ref, self.models)}")
        return self

    def _check_merge(self, name: str, merge: Merge) -> None:
        where = f"merges.{name}"
        for ref in (*merge.inputs, *([merge.base] if merge.base else [])):
            if ref not in self.models:
                raise ValueError(f"{where}: no model is called '{ref}'{nearest(ref, self.models)}")
        if len(set(merge.inputs)) < len(merge.inputs):
            raise ValueError(f"{where}.inputs: a model is listed twice")
        methods = {method: get_method(method) for method in merge.methods}
        for method in methods.values():
            method.check_inputs(merge.base, merge.inputs, where)
            if merge.dialect not in method.dialects:
                raise ValueError(
                    f"{where}.dialect: {method.name} has no dialect '{merge.dialect}' "
                    f"(known: {', '.join(method.dialects)})"
                )
        known = {parameter.name: parameter for method in methods.values() for parameter in method.parameters}
        for place, parameters in (
            (f"{where}.parameters", merge.parameters),
            *((f"{where}.rules.{i}.parameters", rule.parameters) for i, rule in enumerate(merge.rules)),
        ):
            for key, value in parameters.items():
                if key not in known:
                    raise ValueError(
                        f"{place}: {merge.method} has no parameter '{key}'{nearest(key, known)}"
                        f" (known: {', '.join(known)})"
                    )
                if isinstance(value, dict):
                    for ref in value:
                        if ref not in merge.inputs:
                            raise ValueError(f"{place}.{key}: '{ref}' is not an input of the merge")
                    if known[key].scope != "expert":
                        raise ValueError(f"{place}.{key}: has one value for all inputs, not one each")
                for item in value.values() if isinstance(value, dict) else [value]:
                    known[key].check(item, f"{place}.{key}")
        for key, parameter in known.items():
            if parameter.default is None and not self._always_set(merge, key):
                raise ValueError(f"{where}.parameters: {merge.method} needs a value for '{key}' for every input")

    @staticmethod
    def _always_set(merge: Merge, key: str) -> bool:
        """Whether a required parameter has a value for every input, as far as this can be seen here."""
        places = [merge.parameters, *(rule.parameters for rule in merge.rules)]
        values = [place[key] for place in places if key in place]
        return any(not isinstance(value, dict) or set(value) == set(merge.inputs) for value in values)

    @property
    def main(self) -> Merge:
        """The only merge of a recipe without a path."""
        return next(iter(self.merges.values()))

    @cached_property
    def hash(self) -> str:
        """sha256 of the canonical content: independent of names, file locations and written-out defaults."""
        digests = {}
        for name, source in self.models.items():
            if source.sha256 is None:
                raise ValueError(f"models.{name}: the content hash is not known yet; pin the recipe first")
            digests[name] = source.sha256 + (f"+{source.adapter}" if source.adapter else "")
        merges = {name: _canonical_merge(merge, digests) for name, merge in self.merges.items()}
        if self.path is None:
            body: Any = next(iter(merges.values()))
        else:
            body = [
                [digests[hop.model] if hop.model else merges[str(hop.merge)], hop.layer, float(hop.scale)]
                for hop in self.path
            ]
        random = any(get_method(m).random for merge in self.merges.values() for m in merge.methods)
        canonical = {
            "evomerge": 1,
            "body": body,
            "dtype": self.output.dtype,
            "tokenizer": digests.get(self.output.tokenizer or ""),
            "chat_template": digests.get(self.output.chat_template or ""),
            "seed": self.seed if random else None,
        }
        return hashlib.sha256(json.dumps(canonical, sort_keys=True).encode()).hexdigest()

    def pinned(self, hashes: Mapping[str, str]) -> Recipe:
        """Return the recipe with the content hash of every model filled in."""
        models = {
            name: source.model_copy(update={"sha256": hashes[name]}) for name, source in self.models.items()
        }
        return self.model_copy(update={"models": models})

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, ready for YAML or JSON, without absent keys."""
        return self.model_dump(mode="json", exclude_none=True, exclude_defaults=False)

    def to_yaml(self) -> str:
        """Return the recipe as YAML."""
        return dump_yaml(_tidy(self.to_dict()))

    @classmethod
    def from_dict(cls, data: Any, file: Path | str | None = None) -> Recipe:
        """Validate plain data; `file` is named in errors."""
        return validate(cls, data, file)


def load_recipe(path: Path) -> Recipe:
    """Read a recipe file. Relative sources in it are relative to the file."""
    data = read_yaml(path, "recipe")
    if "evomerge" not in data:
        raise UserError(f"{path}: not an evomerge recipe: the first key should be 'evomerge: 1'")
    if data["evomerge"] != 1:
        raise UserError(f"{path}: evomerge: version {data['evomerge']!r} is not known; this is version 1")
    recipe = Recipe.from_dict(data, path)
    models = {
        name: source.model_copy(update={"source": resolve_source(source.source, path.parent)})
        for name, source in recipe.models.items()
    }
    return recipe.model_copy(update={"models": models})


def resolve_source(text: str, folder: Path) -> str:
    """Resolve a model's name: paths relative to `folder`, an existing folder beside it, else a hub id."""
    if text.startswith("~"):
        return str(Path(text).expanduser())
    if text.startswith((".", "/")):
        return str((folder / text).resolve())
    beside = folder / text
    return str(beside.resolve()) if beside.is_dir() else text


def _canonical_merge(merge: Merge, digests: Mapping[str, str]) -> dict[str, Any]:
    method = get_method(merge.method)
    parameters = {**method.defaults(), **merge.parameters}
    return {
        "method": merge.method,
        "base": digests[merge.base] if merge.base and method.base != "unused" else None,
        "inputs": [digests[name] for name in merge.inputs],
        "dialect": merge.dialect,
        "parameters": _canonical_values(parameters, merge, digests),
        "rules": [
            {
                "layers": None if rule.layers is None else sorted(map(str, rule.layers)),
                "roles": None if rule.roles is None else sorted(rule.roles),
                "tensors": rule.tensors,
                "method": rule.method,
                "parameters": _canonical_values(rule.parameters, merge, digests),
            }
            for rule in merge.rules
        ],
    }


def _canonical_values(values: Mapping[str, Value], merge: Merge, digests: Mapping[str, str]) -> Any:
    """Write each value once per input where all inputs have one, numbers as floats, inputs by content."""
    canonical: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            named = {digests[ref]: _plain(item) for ref, item in value.items()}
            same = len(set(named.values())) == 1 and set(value) == set(merge.inputs)
            canonical[name] = next(iter(named.values())) if same else named
        else:
            canonical[name] = _plain(value)
    return canonical


def _plain(value: Scalar) -> Scalar:
    return value if isinstance(value, bool | str) else float(value)


def _tidy(data: dict[str, Any]) -> dict[str, Any]:
    """Drop empty containers and default scales, which only lengthen the file."""
    for merge in data.get("merges", {}).values():
        for rule in merge.get("rules", []):
            if not rule.get("parameters"):
                rule.pop("parameters", None)
        for key in ("rules", "parameters"):
            if not merge.get(key):
                merge.pop(key, None)
    for key in ("merges", "output"):
        if not data.get(key):
            data.pop(key, None)
    return data
