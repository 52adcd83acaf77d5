"""From a mergekit YAML to a recipe in the dialect ``mergekit``, with a note for every difference."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import ValidationError

from evomerge.checkpoints.chat_templates import BUILT_IN
from evomerge.errors import UserError, at, in_file, nearest
from evomerge.mergekit.differences import of_method
from evomerge.mergekit.document import (
    KEYS,
    Document,
    Model,
    Module,
    Place,
    Reference,
    Slice,
    Tokenizer,
    TokenRule,
)
from evomerge.methods.registry import MergeMethod, Parameter, all_methods, get_method
from evomerge.output import AUTO, UNION
from evomerge.output import Tokenizer as OutputTokenizer
from evomerge.output import TokenRule as OutputTokenRule
from evomerge.recipe import (
    DTYPES,
    Hop,
    Merge,
    Output,
    Recipe,
    Rule,
    Source,
    expand_home,
    folder_of,
    recipe_from,
)
from evomerge.schema import read_yaml, shown, validate
from evomerge.settings import Filtered, Scalar, Setting, Value

DIALECT: Literal["mergekit"] = "mergekit"

PARAMETERS = frozenset(
    {
        *(
            "weight",
            "density",
            "normalize",
            "lambda",
            "rescale",
            "int8_mask",
            "epsilon",
            "gamma",
            "t",
            "scale",
        ),
        *("normalize_weights", "eps", "nuslerp_flatten", "nuslerp_row_wise", "max_iter", "tol"),
        *("filter_wise", "select_topk", "r", "alpha"),
    }
)
"""Every parameter that some method of mergekit has."""


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
        self._folder = folder
        self._names: dict[str, str] = {}
        self._models: dict[str, Source] = {}
        self._method = _known_method(document.merge_method)

    def recipe(self) -> Recipe:
        parts = self._parts()
        for part in parts:
            for reference, _, _ in part.sources:
                self._name(reference)
        form = self._output()
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
            name = self._free(merges, "merged" if len(parts) == 1 else f"slice{index}")
            merges[name] = merge
            self.keys[f"merges.{name}"] = part.place.removesuffix(".sources")
            if not whole:
                hops = self._hops(part, name, merge)
                self._note_keys(part, len(path), hops)
                path += hops
        self._note_whole(parts)
        return Recipe(
            models=self._models,
            merges=merges,
            path=None if whole else tuple(path),
            output=form,
        )

    # What is merged with what.

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

    # One merge.

    def _merge(self, part: _Part) -> Merge:
        method, role = self._method, self._method.base_in(DIALECT)
        names = [self._name(reference) for reference, _, _ in part.sources]
        base = None if part.base is None else self._name(part.base)
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
        *rules, last = _stacked(places, inputs)
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
                yield key, known[key], _converted(known[key], setting, f"{place}.{key}")
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
            references = {self._name(reference): str(reference) for reference, _, _ in part.sources}
            added = part.base is not None and self._name(part.base) == missing[0]
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
        names = [self._name(reference) for reference, _, _ in part.sources]
        donor = (
            0
            if part.base is None or self._name(part.base) not in names
            else names.index(self._name(part.base))
        )
        for index, hop in enumerate(hops, first):
            self.keys[f"path.{index}"] = part.place.removesuffix(".sources")
            self.keys[f"path.{index}.layer"] = f"{part.place}.{donor}.layer_range"
            for name in hop.layers:
                self.keys[f"path.{index}.layers.{name}"] = f"{part.place}.{names.index(name)}.layer_range"

    def _hops(self, part: _Part, name: str, merge: Merge) -> list[Hop]:
        starts = {self._name(reference): start for reference, start, _ in part.sources}
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

    # Models and output.

    def _name(self, reference: Reference) -> str:
        """Return the name of a model in the recipe, which is that of its folder."""
        key = repr(reference)
        if key not in self._names:
            if reference.override_architecture is not None:
                self.notes.append(
                    f"override_architecture of '{reference}': does nothing: tensors are known by their names"
                )
            stem = Path(reference.model.path).name or reference.model.path
            if reference.lora is not None:
                stem += f"+{Path(reference.lora.path).name}"
            self._names[key] = name = self._free(self._models, stem)
            self._models[name] = self._source(reference)
            self.keys[f"models.{name}"] = ""
        return self._names[key]

    def _source(self, reference: Reference) -> Source:
        lora: dict[str, Any] = {}
        if reference.lora is not None:
            lora["adapter"] = self._located(reference.lora)
            if reference.lora.revision is not None:
                lora["adapter_revision"] = reference.lora.revision
        return Source(source=self._located(reference.model), revision=reference.model.revision, **lora)

    def _located(self, place: Place) -> str:
        path = expand_home(place.path)
        candidates = [path.absolute()] if path.is_absolute() else [Path.cwd() / path, self._folder / path]
        found = next((candidate for candidate in candidates if candidate.is_dir()), None)
        if found is not None:
            return str(found.resolve())
        if place.path.startswith((".", "/", "~")):
            return str(candidates[-1].resolve())
        return place.path

    def _free(self, taken: Iterable[str], name: str) -> str:
        # A model's name must not mean something else where the output names models.
        used = {*taken, *self._models, UNION, AUTO, *BUILT_IN}
        return next(n for n in (name, *(f"{name}-{i}" for i in range(2, 1000))) if n not in used)

    def _output(self) -> Output:
        document = self._document
        dtype = _dtype("dtype", document.dtype)
        written = _dtype("out_dtype", document.out_dtype) or dtype
        if written not in (None, *DTYPES):
            key = "dtype" if document.out_dtype is None else "out_dtype"
            raise ValueError(f"{key}: '{written}' cannot be written; give {', '.join(DTYPES)}")
        if dtype in ("bfloat16", "float16"):
            self.notes.append(
                f"dtype: {dtype} would be mergekit's arithmetic; here it is float32, rounded once at the end"
            )
        elif dtype == "float64":
            self.notes.append("dtype: float64 would be mergekit's arithmetic; here it is float32")
        if written is None:
            self.notes.append(
                "no dtype: tensors keep the number format of the model that gives the output its config; "
                "mergekit takes the widest of the models'"
            )
        tokenizer = self._tokenizer(document.tokenizer)
        base = document.base_model
        if tokenizer is None and base is not None:
            tokenizer = self._name(base)
        return Output(dtype=cast(Any, written), tokenizer=tokenizer, chat_template=self._chat_template())

    def _tokenizer(self, tokenizer: Tokenizer | None) -> str | OutputTokenizer | None:
        document = self._document
        key = "tokenizer_source" if tokenizer is None else "tokenizer.source"
        source = document.tokenizer_source if tokenizer is None else tokenizer.source
        if source is None:
            return None
        if source == "base":
            if document.base_model is None:
                raise ValueError(f"{key}: base is given, but there is no base_model")
            source = self._name(document.base_model)
        elif source != "union":
            source = self._name(_reference(source, key))
        rules = {} if tokenizer is None else tokenizer.tokens or {}
        multiple = None if tokenizer is None else tokenizer.pad_to_multiple_of
        # mergekit gives the output a row for each token, and none of the padding that a model has.
        return OutputTokenizer(
            source=source,
            pad_to_multiple_of=multiple or 1,
            tokens={
                token: self._token_rule(f"tokenizer.tokens.{token}", rule) for token, rule in rules.items()
            },
        )

    def _token_rule(self, key: str, rule: TokenRule) -> OutputTokenRule:
        source = rule.source
        if source is None:
            raise ValueError(f"{key}.source: is missing; give a model, or {{kind: ...}}")
        if isinstance(source, dict) and "kind" in source:
            row = dict(source)
            if "model" in row:
                row["model"] = self._name(_reference(row["model"], f"{key}.source.model"))
        else:
            row = {"model": self._name(_reference(source, f"{key}.source"))}
        try:
            return validate(OutputTokenRule, {"source": row, "force": rule.force}, None)
        except UserError as error:
            raise ValueError(f"{key}: {error}") from None

    def _chat_template(self) -> str | None:
        template = self._document.chat_template
        if template is None or template == AUTO or "{" in template:
            return template
        if template not in BUILT_IN:
            raise ValueError(
                f"chat_template: no template is called '{template}'{nearest(template, BUILT_IN)}; give auto, "
                f"{', '.join(BUILT_IN)}, or the text of a Jinja template"
            )
        self.notes.append(
            f"chat_template: {template} is the format's, written out anew; mergekit's text may differ"
        )
        return template

    def _note_whole(self, parts: Sequence[_Part]) -> None:
        self.notes[:0] = of_method(self._method.name)
        if len(parts[0].sources) < len(parts[-1].sources):
            self.notes.append(
                f"{parts[-1].place}: all models take part in the final norm and the head; mergekit leaves out those "
                "beyond the number of sources of the first slice"
            )
        document = self._document
        first = parts[0].sources[0][0]
        if document.base_model is None and len(self._models) > 1:
            self.notes.append(
                f"no base_model: config and tokenizer come from '{first}'; mergekit takes those of any of the models"
            )


def _known_method(name: str) -> MergeMethod:
    methods = {key: method for key, method in all_methods().items() if DIALECT in method.dialects}
    if name not in methods:
        raise ValueError(
            f"merge_method: no method is called '{name}'{nearest(name, methods)}; known: {', '.join(methods)}"
        )
    return get_method(name)


def _reference(data: Any, key: str) -> Reference:
    try:
        return validate(Reference, data, None)
    except UserError as error:
        raise ValueError(f"{key}: {error}") from None


def _dtype(key: str, name: str | None) -> str | None:
    known = ("bfloat16", "float16", "float32", "float64")
    short = None if name is None else name.removeprefix("torch.")
    if short is not None and short not in known:
        raise ValueError(f"{key}: '{name}' is not accepted{nearest(short, known)}: give {', '.join(known)}")
    return short


def _stacked(places: Sequence[Mapping[str, Value]], inputs: Sequence[str]) -> list[dict[str, Value]]:
    """Move each parameter to the last place that nothing below it asks for; the last place is the merge's own.

    Keeps which setting is asked before which, with as few rules as can be.
    """
    stacks: dict[str, list[Value]] = {}
    for place in places:
        for name, value in place.items():
            stacks.setdefault(name, []).append(value)
    depth = max((len(stack) for stack in stacks.values()), default=1)
    stacked: list[dict[str, Value]] = [{} for _ in range(depth)]
    for name, stack in stacks.items():
        for level, value in zip(stacked[depth - len(stack) :], stack, strict=True):
            level[name] = _joined(value, inputs)
    return stacked


def _joined(value: Value, inputs: Sequence[str]) -> Value:
    """Write one value for all inputs where they agree."""
    if not isinstance(value, dict) or set(value) != set(inputs):
        return value
    settings = list(value.values())
    return settings[0] if all(repr(setting) == repr(settings[0]) for setting in settings) else value


def _converted(parameter: Parameter, setting: Setting, place: str) -> Setting:
    """Read words as numbers or truth values where the parameter wants such, as mergekit does; check them."""
    if isinstance(setting, tuple):
        if isinstance(setting[0], Filtered):
            return tuple(
                entry.model_copy(update={"value": _converted(parameter, entry.value, place)})
                for entry in setting
                if isinstance(entry, Filtered)
            )
        return tuple(_scalar(parameter, v, place) for v in setting if not isinstance(v, Filtered))
    return _scalar(parameter, setting, place)


_TRUTH = {
    "true": True,
    "yes": True,
    "on": True,
    "1": True,
    "false": False,
    "no": False,
    "off": False,
    "0": False,
}


def _scalar(parameter: Parameter, value: Scalar, place: str) -> Scalar:
    wanted: Scalar = value
    if parameter.kind == "bool" and not isinstance(value, bool):
        wanted = _TRUTH.get(shown(value).strip("'").lower(), value)
    elif parameter.kind in ("float", "int") and isinstance(value, bool | str):
        try:
            wanted = float(value)
        except ValueError:
            wanted = value
    parameter.check(wanted, place)
    return wanted
