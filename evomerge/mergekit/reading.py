"""From a mergekit YAML to a recipe in the dialect ``mergekit``, with a note for every difference."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from evomerge.errors import UserError, at, in_file, nearest
from evomerge.mergekit.differences import of_method
from evomerge.mergekit.document import KEYS, Document, Model, Module, Reference, Slice
from evomerge.mergekit.naming import Names
from evomerge.mergekit.output_form import output_form
from evomerge.mergekit.parameters import PARAMETERS, converted, stacked
from evomerge.methods.registry import MergeMethod, Parameter, all_methods, get_method
from evomerge.recipe import Hop, Merge, Recipe, Rule, folder_of, recipe_from
from evomerge.schema import read_yaml, validate
from evomerge.settings import Setting, Value

DIALECT: Literal["mergekit"] = "mergekit"


@dataclass(frozen=True)
class Reading:
    """What a mergekit YAML means.

    Attributes:
        recipe: the same merge as a recipe.
        notes: where the result differs from mergekit's, or a key does nothing; one sentence each.
        file: where it was read.
        keys: what keys of the recipe are called in the file, where they have other names.
    """

    recipe: Recipe
    notes: tuple[str, ...] = ()
    file: Path | str | None = None
    keys: Mapping[str, str] = field(default_factory=dict)

    def in_file(self) -> AbstractContextManager[None]:
        """Name the file, and the key as it is called there, in errors about the recipe that are raised inside."""
        return in_file(self.file, self._key)

    def _key(self, key: str) -> str:
        above = [known for known in self.keys if f"{key}.".startswith(f"{known}.")]
        if not above:
            return key
        nearest_above = max(above, key=len)
        return f"{self.keys[nearest_above]}{key[len(nearest_above) :]}".removeprefix(".")


def is_mergekit(data: Mapping[str, Any]) -> bool:
    """Whether a YAML mapping is meant for mergekit."""
    return "evomerge" not in data and any(key in data for key in KEYS)


def open_recipe(path: Path | str) -> Reading:
    """Read a recipe file of ours (without notes) or a mergekit YAML; their keys tell them apart.

    ``-`` is standard input; paths in what is piped in are relative to the working directory.
    """
    path = Path("/dev/stdin") if str(path) == "-" else Path(path)
    data = read_yaml(path, "recipe")
    if is_mergekit(data):
        return from_mergekit(data, path, folder_of(path))
    return Reading(recipe_from(data, path), file=path)


def read_mergekit(path: Path | str) -> Reading:
    """Read a mergekit YAML.

    Folders are looked up as mergekit does, in the working directory, and then beside the file; what is found
    in neither is a hub id.

    Raises:
        UserError: file, key, value and fix. Unknown keys and parameters are refused, mergekit ignores them.
    """
    path = Path(path)
    return from_mergekit(read_yaml(path, "recipe"), path, folder_of(path))


def from_mergekit(
    data: Mapping[str, Any], file: Path | str | None = None, folder: Path | None = None
) -> Reading:
    """Do what `read_mergekit` does with plain data; `file` is named in errors."""
    document = validate(Document, data, file)
    try:
        with in_file(file):
            reader = _Reader(document, folder or Path())
            recipe = reader.recipe()
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
        raise UserError(f"{at(file)}{problem}") from None
    except ValueError as error:
        raise UserError(f"{at(file)}{error}") from None
    return Reading(recipe, tuple(dict.fromkeys(reader.notes)), file, reader.keys)


@dataclass(frozen=True)
class _Part:
    """A merge of whole models or of a slice's layers.

    Attributes:
        place: the key of its list of sources, for messages.
        sources: models with their first layer and own parameters.
        places: the parameters of the slice, the module and the document, the most specific first, with keys.
        base: the reference that is the base here.
        layers: how many of each model; None: all.
    """

    place: str
    sources: tuple[tuple[Reference, int, Mapping[str, Setting]], ...]
    places: tuple[tuple[str, Mapping[str, Setting]], ...]
    base: Reference | None
    layers: int | None


class _Reader:
    def __init__(self, document: Document, folder: Path) -> None:
        self.notes: list[str] = []
        self.keys = {"output.tokenizer": "tokenizer", "output.chat_template": "chat_template"}
        self._document = document
        self._names = Names(folder, self.notes)
        self._method = _known_method(document.merge_method)

    def recipe(self) -> Recipe:
        parts = self._parts()
        for part in parts:
            for reference, _, _ in part.sources:
                self._names.of(reference)
        form = output_form(self._document, self._names, self.notes)
        whole = parts[0].layers is None
        merges: dict[str, Merge] = {}
        path: list[Hop] = []
        for index, part in enumerate(parts):
            merge = self._merge(part)
            if not whole and self._copies(merge):
                hops = [Hop(model=merge.inputs[0], layer=layer) for layer in self._range(part, 0)]
                self._note_keys(part, len(path), hops)
                path += hops
                continue
            name = self._names.free(merges, "merged" if len(parts) == 1 else f"slice{index}")
            merges[name] = merge
            self.keys[f"merges.{name}"] = part.place.removesuffix(".sources")
            if not whole:
                hops = self._hops(part, name, merge)
                self._note_keys(part, len(path), hops)
                path += hops
        self._note_whole(parts)
        self.keys |= {f"models.{name}": "" for name in self._names.models}
        return Recipe(
            models=self._names.models,
            merges=merges,
            path=None if whole else tuple(path),
            output=form,
        )

    def _parts(self) -> list[_Part]:
        document = self._document
        top = ("parameters", document.parameters)
        if document.models is not None:
            return [self._whole("models", document.models, (top,))]
        if document.slices is not None:
            return self._sliced("slices", document.slices, (top,))
        modules = document.modules or {}
        if len(modules) > 1:
            raise ValueError(
                f"modules: {', '.join(modules)} are several; models with more than one module are not read from "
                "a mergekit YAML; merge a model with an image or audio part by a recipe, which copies that part "
                "from the base"
            )
        name, module = next(iter(modules.items()))
        return self._module(f"modules.{name}", module, top)

    def _module(self, place: str, module: Module, top: tuple[str, Mapping[str, Setting]]) -> list[_Part]:
        places = ((f"{place}.parameters", module.parameters), top)
        if module.models is not None:
            return [self._whole(f"{place}.models", module.models, places)]
        return self._sliced(f"{place}.slices", module.slices or (), places)

    def _whole(self, place: str, models: Sequence[Model], places: Any) -> _Part:
        base = self._document.base_model
        sources = [(model.model, 0, model.parameters) for model in models]
        if base is not None and base not in [reference for reference, _, _ in sources]:
            sources.append((base, 0, {}))
        return self._checked(_Part(place, tuple(sources), places, base, None))

    def _sliced(self, place: str, slices: Sequence[Slice], places: Any) -> list[_Part]:
        parts = []
        for index, piece in enumerate(slices):
            where = f"{place}.{index}"
            if piece.residual_weight is not None:
                self.notes.append(f"{where}.residual_weight: does nothing, as in mergekit")
            start, end = piece.sources[0].layer_range
            part = _Part(
                f"{where}.sources",
                tuple((source.model, source.layer_range[0], source.parameters) for source in piece.sources),
                ((f"{where}.parameters", piece.parameters), *places),
                piece.base_model or self._document.base_model,
                end - start,
            )
            parts.append(self._checked(part))
        return parts

    def _checked(self, part: _Part) -> _Part:
        method, references = self._method, [reference for reference, _, _ in part.sources]
        for index, reference in enumerate(references):
            if reference in references[:index]:
                raise ValueError(f"{part.place}.{index}.model: '{reference}' is listed twice")
        role = method.base_in(DIALECT)
        if role in ("origin", "input") and part.base is None:
            raise ValueError(f"base_model: this key is required; {method.name} needs a base")
        if role.endswith("origin") and part.base is not None and part.base not in references:
            raise ValueError(
                f"{part.place}: the base_model '{part.base}' is missing; list it with the layers that the others "
                "are compared with"
            )
        return part

    def _merge(self, part: _Part) -> Merge:
        method, role = self._method, self._method.base_in(DIALECT)
        names = [self._names.of(reference) for reference, _, _ in part.sources]
        base = None if part.base is None else self._names.of(part.base)
        merged = base if base in names else None
        inputs = tuple(name for name in names if role == "unused" or name != merged)
        method.check_inputs(merged, inputs, part.place, DIALECT)
        own: dict[str, Value] = {}
        for (reference, _, parameters), name in zip(part.sources, names, strict=True):
            index = names.index(name)
            place = f"{part.place}.{index}.parameters"
            for key, parameter, setting in self._settings(place, parameters):
                if parameter.scope == "shared":
                    self.notes.append(
                        f"{place}.{key}: does nothing, as in mergekit: it is one value for all models; "
                        "write it under 'parameters' at the top or of the slice"
                    )
                elif name not in inputs:
                    self.notes.append(f"{place}.{key}: does nothing: '{reference}' is the base")
                else:
                    values = own.setdefault(parameter.name, {})
                    assert isinstance(values, dict)
                    values[name] = setting
        places: list[dict[str, Value]] = [own]
        for place, parameters in part.places:
            places.append({p.name: setting for _, p, setting in self._settings(place, parameters)})
        *rules, last = stacked(places, inputs)
        self._check_given(part, method, [*rules, last], inputs)
        return Merge(
            method=method.name,
            base=merged,
            inputs=inputs,
            dialect=DIALECT,
            parameters=last,
            rules=tuple(Rule(parameters=rule) for rule in rules),
        )

    def _settings(
        self, place: str, parameters: Mapping[str, Setting]
    ) -> Iterable[tuple[str, Parameter, Setting]]:
        """Yield the parameters that have an effect, as the registry knows them."""
        known = {p.name: p for p in self._method.parameters_in(DIALECT)}
        for key, setting in parameters.items():
            if key in known:
                yield key, known[key], converted(known[key], setting, f"{place}.{key}")
            elif key in PARAMETERS:
                self.notes.append(f"{place}.{key}: does nothing in {self._method.name}")
            else:
                hint = nearest(key, known) or nearest(key, PARAMETERS)
                hint = hint or (f" (known: {', '.join(known)})" if known else "")
                raise ValueError(f"{place}: {self._method.name} has no parameter '{key}'{hint}")

    def _check_given(
        self, part: _Part, method: MergeMethod, places: Sequence[Mapping[str, Value]], inputs: Sequence[str]
    ) -> None:
        for parameter in method.parameters_in(DIALECT):
            if parameter.default_in(DIALECT) is not None:
                continue
            values = [place[parameter.name] for place in places if parameter.name in place]
            given = {name for value in values for name in (value if isinstance(value, dict) else inputs)}
            missing = [name for name in inputs if name not in given]
            if not missing:
                continue
            if parameter.scope == "shared":
                raise ValueError(f"parameters: {method.name} needs a value for '{parameter.name}'")
            references = {self._names.of(reference): str(reference) for reference, _, _ in part.sources}
            added = part.base is not None and self._names.of(part.base) == missing[0]
            why = (
                "; it is the base_model, which this method counts as a model like the others" if added else ""
            )
            raise ValueError(
                f"{part.place}: '{references[missing[0]]}' has no {parameter.name}, which {method.name} needs{why}"
            )

    def _copies(self, merge: Merge) -> bool:
        """Whether a merge of layers takes the layers of one model as they are."""
        return merge.method == "passthrough" and not merge.parameters and not merge.rules

    def _range(self, part: _Part, index: int) -> range:
        start = part.sources[index][1]
        return range(start, start + (part.layers or 0))

    def _note_keys(self, part: _Part, first: int, hops: Sequence[Hop]) -> None:
        """Remember where the layers of a slice's hops come from."""
        names = [self._names.of(reference) for reference, _, _ in part.sources]
        donor = (
            0
            if part.base is None or self._names.of(part.base) not in names
            else names.index(self._names.of(part.base))
        )
        for index, hop in enumerate(hops, first):
            self.keys[f"path.{index}"] = part.place.removesuffix(".sources")
            self.keys[f"path.{index}.layer"] = f"{part.place}.{donor}.layer_range"
            for name in hop.layers:
                self.keys[f"path.{index}.layers.{name}"] = f"{part.place}.{names.index(name)}.layer_range"

    def _hops(self, part: _Part, name: str, merge: Merge) -> list[Hop]:
        starts = {self._names.of(reference): start for reference, start, _ in part.sources}
        donor = merge.base or merge.inputs[0]
        offsets = {model: starts[model] - starts[donor] for model in merge.inputs if model != donor}
        return [
            Hop(
                merge=name,
                layer=layer,
                layers={model: layer + offset for model, offset in offsets.items() if offset},
            )
            for layer in range(starts[donor], starts[donor] + (part.layers or 0))
        ]

    def _note_whole(self, parts: Sequence[_Part]) -> None:
        self.notes[:0] = of_method(self._method.name)
        if len(parts[0].sources) < len(parts[-1].sources):
            self.notes.append(
                f"{parts[-1].place}: all models take part in the final norm and the head; mergekit leaves out those "
                "beyond the number of sources of the first slice"
            )
        document = self._document
        first = parts[0].sources[0][0]
        if document.base_model is None and len(self._names.models) > 1:
            self.notes.append(
                f"no base_model: config and tokenizer come from '{first}'; mergekit takes those of any of the models"
            )
        base = document.base_model
        if base is not None and all(base != reference for reference, _, _ in parts[0].sources):
            self.notes.append(
                f"base_model: the config comes from '{first}', whose layers come first; mergekit takes that of '{base}'"
            )


def _known_method(name: str) -> MergeMethod:
    methods = {key: method for key, method in all_methods().items() if DIALECT in method.dialects}
    if name not in methods:
        raise ValueError(
            f"merge_method: no method is called '{name}'{nearest(name, methods)}; known: {', '.join(methods)}"
        )
    return get_method(name)
