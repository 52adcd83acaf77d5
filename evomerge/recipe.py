"""The recipe: the complete, deterministic description of one merged model."""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from evomerge.checkpoints.names import ROLES, Position, Role, TensorName
from evomerge.data_config import Data
from evomerge.errors import UserError, nearest
from evomerge.methods.expressions import factors
from evomerge.methods.registry import MergeMethod, Needs, Parameter, get_method
from evomerge.output import Output as Output
from evomerge.schema import Frozen, Number, Whole, dump_yaml, read_text, read_yaml, shown, validate
from evomerge.settings import Scalar, Value, canonical, evaluate, scalars

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
        if not isinstance(data, str | dict | Source):
            raise ValueError(
                f"{shown(data)} is not accepted: give a folder, a hub id or {{source: ..., sha256: ...}}"
            )
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
        for name, merge in self.merges.items():
            if name in self.models:
                raise ValueError(f"merges.{name}: a model is called '{name}' too; rename one")
            self._check_merge(name, merge)
        if self.path is not None:
            if not self.path:
                raise ValueError("path: is empty; leave it out for all layers in order")
            for i, hop in enumerate(self.path):
                kind, known, ref = (
                    ("model", self.models, hop.model)
                    if hop.merge is None
                    else ("merge", self.merges, hop.merge)
                )
                if ref not in known:
                    raise ValueError(
                        f"path.{i}.{kind}: no {kind} is called '{ref}'{nearest(str(ref), known)}"
                    )
                if hop.merge is not None:
                    self._check_layers(f"path.{i}.layers", hop, self.merges[hop.merge])
        elif len(self.merges) != 1:
            raise ValueError(f"merges: without a path there is exactly one, here are {len(self.merges)}")
        self.output.check(self.models)
        return self

    def _check_merge(self, name: str, merge: Merge) -> None:
        where = f"merges.{name}"
        for key, ref in (*(("inputs", ref) for ref in merge.inputs), ("base", merge.base)):
            if ref is not None and ref not in self.models:
                raise ValueError(f"{where}.{key}: no model is called '{ref}'{nearest(ref, self.models)}")
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
        if "merged gram" in merge.needs and self.path is not None:
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
            if any(p.default_in(merge.dialect) is None for p in parameters) and not self._always_set(
                merge, key
            ):
                user = next(m.name for m in methods.values() if key in _required(m, merge.dialect))
                raise ValueError(f"{where}.parameters: {user} needs a value for '{key}' for every input")

    @staticmethod
    def _check_layers(where: str, hop: Hop, merge: Merge) -> None:
        donor, others = merge.base or merge.inputs[0], set(merge.inputs)
        for name in hop.layers:
            if name == donor:
                raise ValueError(f"{where}: '{name}' gives the merge its form; write its layer as 'layer'")
            if name not in others:
                raise ValueError(
                    f"{where}: '{name}' is not an input of '{hop.merge}'{nearest(name, merge.inputs)}"
                )

    @staticmethod
    def _always_set(merge: Merge, key: str) -> bool:
        """Whether a required parameter has a value for every input, as far as this can be seen here."""
        places = [merge.parameters, *(rule.parameters for rule in merge.rules)]
        values = [place[key] for place in places if key in place]
        covered = {name for value in values for name in (value if isinstance(value, dict) else merge.inputs)}
        return covered >= set(merge.inputs)

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
        digests = {}
        for name, source in self.models.items():
            if source.sha256 is None:
                raise ValueError(f"models.{name}: the content hash is not known yet; pin the recipe first")
            digests[name] = source.sha256
        if self.path is None:
            used = set(self.merges)
        else:
            used = {hop.merge for hop in self.path if hop.merge is not None}
        merges = {name: _canonical_merge(self.merges[name], digests) for name in used}
        if self.path is None:
            body: Any = next(iter(merges.values()))
        else:
            body = [
                [
                    merges[hop.merge] if hop.merge else digests[str(hop.model)],
                    hop.layer,
                    float(hop.scale),
                    *([self._layers_of_inputs(hop)] if set(hop.layers.values()) - {hop.layer} else []),
                ]
                for hop in self.path
            ]
        random = any(get_method(method).random for name in used for method in self.merges[name].methods)
        canonical = {
            "evomerge": 1,
            "body": body,
            **self.output.canonical(digests),
            "seed": self.seed if random else None,
        }
        return hashlib.sha256(json.dumps(canonical, sort_keys=True).encode()).hexdigest()

    def _layers_of_inputs(self, hop: Hop) -> list[int]:
        return [hop.layers.get(name, hop.layer) for name in self.merges[str(hop.merge)].inputs]

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
        merges = {
            name: merge.model_copy(update={"data": merge.data.pinned()})
            if merge.data and merge.needs
            else merge
            for name, merge in self.merges.items()
        }
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


def load_recipe(path: Path) -> Recipe:
    """Read a recipe file. Relative sources in it are relative to the file."""
    data = read_yaml(path, "recipe")
    if "evomerge" not in data:
        raise UserError(f"{path}: not an evomerge recipe: the first key should be 'evomerge: 1'")
    if data["evomerge"] != 1:
        raise UserError(f"{path}: evomerge: version {data['evomerge']!r} is not known; this is version 1")
    recipe = Recipe.from_dict(data, path)
    folder = path.parent.resolve()

    def place(source: Source) -> Source:
        adapter = None if source.adapter is None else resolve_source(source.adapter, folder)
        return source.model_copy(update={"source": resolve_source(source.source, folder), "adapter": adapter})

    merges = {
        name: merge.model_copy(update={"data": merge.data.placed(folder)}) if merge.data else merge
        for name, merge in recipe.merges.items()
    }
    models = {name: place(source) for name, source in recipe.models.items()}
    output = resolve_output(recipe.output, models, folder)
    return recipe.model_copy(update={"models": models, "merges": merges, "output": output})


def resolve_output(output: Output, models: Iterable[str], folder: Path) -> Output:
    """Return an output with its files found: a tokenizer's folder in full, a chat template's file as text."""
    update: dict[str, Any] = {}
    models = set(models)
    tokenizer, template = output.vocabulary, output.chat_template
    if tokenizer.is_folder(models):
        update["tokenizer"] = tokenizer.model_copy(
            update={"source": resolve_source(tokenizer.source, folder)}
        )
    if template is not None and template.endswith(".jinja") and template not in models:
        update["chat_template"] = read_text(folder / expand_home(template), "chat template")
    return output.model_copy(update=update)


def resolve_source(text: str, folder: Path) -> str:
    """Resolve a model's name: paths relative to `folder`, an existing folder beside it, else a hub id."""
    if text.startswith("~"):
        return str(expand_home(text))
    if text.startswith((".", "/")):
        return str((folder / text).resolve())
    beside = folder / text
    return str(beside.resolve()) if beside.is_dir() else text


def expand_home(text: str) -> Path:
    """Return a path with a leading ``~`` or ``~user`` replaced."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise UserError(f"{text}: there is no such home folder; write the path out") from None


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
