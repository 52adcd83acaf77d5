"""What a recipe holds, and how its values resolve for one tensor."""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from evomerge.checkpoints.names import ROLES, Position, Role, TensorName
from evomerge.data_config import Data
from evomerge.errors import UserError, nearest
from evomerge.methods.expressions import factors
from evomerge.methods.registry import Needs, get_method
from evomerge.output import Output
from evomerge.recipe.checks import check_recipe
from evomerge.recipe.hashing import recipe_hash
from evomerge.schema import Frozen, Number, Whole, dump_yaml, from_text, shown, validate
from evomerge.settings import Scalar, Value, evaluate

DTYPES = ("float32", "bfloat16", "float16")


class Source(Frozen):
    """Where a parent comes from, and what it contained when the recipe was made.

    `source` is a folder or hub id, of a model, or of a LoRA adapter; an adapter lies on the base of the merge
    that it is an input of, else on the model that it was trained on. `adapter` puts one on the model `source`.
    `sha256` is the content hash of the checkpoint (`Checkpoint.sha256`): tensors and architecture, whatever
    the folder is called and however it is sharded; with an adapter, of the two together.
    """

    source: str = Field(min_length=1)
    revision: str | None = None
    adapter: str | None = None
    adapter_revision: str | None = None
    sha256: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, data: Any) -> Any:
        return from_text(cls, data, "source", "a folder, a hub id or {source: ..., sha256: ...}")


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

    @field_validator("layers", mode="before")
    @classmethod
    def _known_layers(cls, layers: Any) -> Any:
        for layer in layers if isinstance(layers, list | tuple) else []:
            whole = isinstance(layer, int) and not isinstance(layer, bool)
            if layer not in ("pre", "post") and not (whole and layer >= 0):
                raise ValueError(f"{shown(layer)} is not accepted: give layer numbers from 0, pre or post")
        return layers

    @field_validator("method")
    @classmethod
    def _known_method(cls, name: str | None) -> str | None:
        return None if name is None else get_method(name).name

    @field_validator("roles", mode="before")
    @classmethod
    def _known_roles(cls, roles: Any) -> Any:
        for role in roles if isinstance(roles, list | tuple) else []:
            if role not in ROLES:
                raise ValueError(
                    f"unknown role '{role}'{nearest(str(role), ROLES)}; roles: {', '.join(ROLES)}"
                )
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

    For each parameter of a tensor, and for each input, the first rule that matches the tensor and sets it
    gives the value; then the merge's own `parameters`, then the method's default. The method is found
    likewise. A value may be a gradient over depth, or depend on the tensor's name (`evomerge.settings`);
    where no filter of a place matches, the next place is asked. A `weight` may be a linear expression of the
    inputs, such as ``c + (b - a)`` ("a is to b as c is to …"); it stands for each input's factor. Methods that
    weigh the inputs with what data says of them need `data`.
    """

    method: str
    base: str | None = None
    inputs: tuple[str, ...] = Field(min_length=1)
    data: Data | None = None
    dialect: Literal["paper", "mergekit"] = "paper"
    parameters: dict[str, Value] = Field(default_factory=dict)
    rules: tuple[Rule, ...] = ()

    @field_validator("method")
    @classmethod
    def _known_method(cls, name: str) -> str:
        return get_method(name).name

    @field_validator("parameters")
    @classmethod
    def _weights(cls, parameters: dict[str, Value], info: ValidationInfo) -> dict[str, Value]:
        return _with_factors(parameters, info.data.get("inputs", ()))

    @field_validator("rules")
    @classmethod
    def _weights_of_rules(cls, rules: tuple[Rule, ...], info: ValidationInfo) -> tuple[Rule, ...]:
        inputs = info.data.get("inputs", ())
        return tuple(
            rule.model_copy(update={"parameters": _with_factors(rule.parameters, inputs)}) for rule in rules
        )

    def resolve(
        self,
        tensor: TensorName,
        depth: float = 0.0,
        *,
        output: str | None = None,
        names: Mapping[str, str] | None = None,
    ) -> tuple[str, dict[str, Scalar | dict[str, Scalar]]]:
        """Return the method's name and every parameter's value for one tensor, defaults included.

        Args:
            tensor: what the rules are matched with.
            depth: place in gradients: 0 at the first layer and outside the layers, 1 at the last layer.
            output: the tensor's name in the merged model, which filters of shared parameters see; the same
                by default.
            names: the tensor's name in each input, which filters of its own parameters see; where it differs.

        Returns:
            For a parameter with a value per input those values by name, or one where all agree. What has
            no value is absent.
        """
        rules = [rule for rule in self.rules if rule.matches(tensor)]
        method = next((rule.method for rule in rules if rule.method), self.method)
        places = [*(rule.parameters for rule in rules), self.parameters]
        values: dict[str, Scalar | dict[str, Scalar]] = {}
        for parameter in get_method(method).parameters_in(self.dialect):
            settings = [place[parameter.name] for place in places if parameter.name in place]
            default = parameter.default_in(self.dialect)
            if parameter.scope == "shared":
                found = _first(settings, "", output or tensor.name, depth, default)
                if found is not None:
                    values[parameter.name] = found
                continue
            each = {
                name: _first(settings, name, (names or {}).get(name, tensor.name), depth, default)
                for name in self.inputs
            }
            known = {name: value for name, value in each.items() if value is not None}
            agreed = len(known) == len(each) and len(set(map(repr, known.values()))) == 1
            if known:
                values[parameter.name] = next(iter(known.values())) if agreed else known
        return method, values

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of all methods in use, the main one first."""
        return tuple(dict.fromkeys([self.method, *(r.method for r in self.rules if r.method)]))

    @property
    def needs(self) -> tuple[Needs, ...]:
        """The kinds of statistics that its methods need."""
        kinds = (get_method(method).needs for method in self.methods)
        return tuple(dict.fromkeys(kind for kind in kinds if kind))


class Hop(Frozen):
    """One layer of a path: a model's or a merge's layer, entered by a scaled residual stream.

    Attributes:
        model, merge: name of the source, one of the two.
        layer: which layer of it; rules that name layers mean this number.
        layers: for models of a merge that give another of their layers, which one, by name. The model that
            gives the merge its tensor set (the base, else the first input) always gives `layer`.
        scale: factor of the residual stream that enters the layer.
    """

    model: str | None = None
    merge: str | None = None
    layer: Whole = Field(ge=0)
    layers: dict[str, Annotated[Whole, Field(ge=0)]] = Field(default_factory=dict)
    scale: Number = 1.0

    @model_validator(mode="after")
    def _one_source(self) -> Hop:
        if (self.model is None) == (self.merge is None):
            given = "both" if self.model is not None else "neither"
            raise ValueError(f"a hop names either a 'model' or a 'merge', this one {given}")
        if self.layers and self.merge is None:
            raise ValueError(
                "layers: a model has one layer here, 'layer'; layers of their own are for merges"
            )
        if self.scale == 0:
            raise ValueError("scale: 0 wipes out the residual stream; give another number")
        return self


class Recipe(Frozen):
    """A merged model: parents, merges, optionally a path through their layers, and the output's form.

    Without `path` the output is the only merge, all layers in order. With it, layer i of the output is hop
    i; embeddings come from the first hop's source, final norm and head from the last one's. Gradients of a
    merge span all layers, or the hops of the path that are layers of the merge.
    """

    evomerge: Literal[1] = 1
    models: dict[str, Source] = Field(min_length=1)
    merges: dict[str, Merge] = Field(default_factory=dict)
    path: tuple[Hop, ...] | None = None
    output: Output = Output()
    seed: Whole = 0

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        check_recipe(self)
        return self

    @property
    def uses_hub(self) -> bool:
        """Whether a model or an adapter is no folder here, so that the network may be needed."""
        places = [place for source in self.models.values() for place in (source.source, source.adapter)]
        return any(place is not None and not Path(place).expanduser().exists() for place in places)

    @property
    def main(self) -> Merge:
        """The only merge of a recipe without a path."""
        return next(iter(self.merges.values()))

    @cached_property
    def hash(self) -> str:
        """sha256 of the canonical content: independent of names, file locations and written-out defaults."""
        return recipe_hash(self)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return a copy with changed fields, which has a hash of its own."""
        copy = super().model_copy(update=update, deep=deep)
        copy.__dict__.pop("hash", None)
        return copy

    def pinned(self, hashes: Mapping[str, str]) -> Recipe:
        """Return the recipe with the content hash of every model and of every file of texts filled in."""
        models = {
            name: source.model_copy(update={"sha256": hashes[name]}) for name, source in self.models.items()
        }
        merges = {name: _with_pinned_data(name, merge) for name, merge in self.merges.items()}
        return self.model_copy(update={"models": models, "merges": merges})

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


def _with_pinned_data(name: str, merge: Merge) -> Merge:
    if merge.data is None or not merge.needs:
        return merge
    try:
        return merge.model_copy(update={"data": merge.data.pinned()})
    except UserError as error:
        raise UserError(str(error), key=f"merges.{name}.data.texts") from None


def _with_factors(parameters: dict[str, Value], inputs: Sequence[str]) -> dict[str, Value]:
    """Replace a weight that is an expression of the inputs by each input's factor; keep one that is wrong."""
    weight = parameters.get("weight")
    if isinstance(weight, str):
        with contextlib.suppress(ValueError):
            return {**parameters, "weight": dict(factors(weight, inputs))}
    return parameters


def _first(
    values: Sequence[Value], model: str, tensor: str, depth: float, default: Scalar | None
) -> Scalar | None:
    """Return what the first place that says something gives one input (`model`) for one tensor."""
    for value in values:
        setting = value.get(model) if isinstance(value, dict) else value
        found = None if setting is None else evaluate(setting, tensor, depth)
        if found is not None:
            return found
    return default


def _tidy(data: dict[str, Any]) -> dict[str, Any]:
    """Drop empty containers and default scales, which only lengthen the file."""
    for hop in data.get("path", []):
        if hop["scale"] == 1:
            del hop["scale"]
        if not hop["layers"]:
            del hop["layers"]
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
