"""From a recipe to a mergekit YAML that says the same, with a note for every difference."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from evomerge.checkpoints import Checkpoint, is_adapter
from evomerge.checkpoints.names import parse
from evomerge.errors import UserError
from evomerge.mergekit.compact import compact
from evomerge.mergekit.translation import Peer, translated
from evomerge.merging.plan import MergePlan, TensorJob, plan_merge
from evomerge.methods.registry import get_method
from evomerge.output import BASE, UNION, TokenRow
from evomerge.recipe import Hop, Recipe
from evomerge.schema import dump_yaml


@dataclass(frozen=True)
class Written:
    """A recipe in mergekit's words.

    Attributes:
        document: plain data.
        notes: where mergekit's result differs from the recipe's, one sentence each; none: it is the same up to
            mergekit's rounding.
    """

    document: dict[str, Any]
    notes: tuple[str, ...]

    def to_yaml(self) -> str:
        """Return the YAML, the notes as comments before it."""
        lines = [
            line
            for note in self.notes
            for line in textwrap.wrap(
                note, 108, initial_indent="# - ", subsequent_indent="#   ", break_long_words=False
            )
        ]
        head = ["# What mergekit makes of this differs from the recipe:", *lines] if lines else []
        return "\n".join([*head, dump_yaml(self.document)])


def to_mergekit(recipe: Recipe, checkpoints: Mapping[str, Checkpoint]) -> Written:
    """Write a recipe as a mergekit YAML: float32 arithmetic, every value explicit.

    Args:
        recipe: what to write.
        checkpoints: the recipe's models, opened, by name.

    Raises:
        UserError: mergekit cannot do it: several methods, one that it lacks, layers of merges and of models in
            one path, scales of merged layers.
    """
    return _Writer(recipe, checkpoints).written()


@dataclass(frozen=True)
class _Segment:
    """Consecutive layers of the output that are consecutive layers of each model too.

    Attributes:
        source: name of the model or merge.
        starts: first layer, by model.
        count: number of layers.
        first: the first layer's place in the output; 0 without a path.
    """

    source: str
    starts: Mapping[str, int]
    count: int
    first: int


class _Writer:
    def __init__(self, recipe: Recipe, checkpoints: Mapping[str, Checkpoint]) -> None:
        self._recipe = recipe
        self._checkpoints = checkpoints
        self._plan: MergePlan = plan_merge(recipe, checkpoints)
        self._notes: list[str] = []
        if self._plan.copied:
            raise UserError(
                f"tensor '{self._plan.copied[0]}' lies outside the language model; models with other parts are not "
                "written for mergekit"
            )
        self._peers = {job.name: self._peer(job) for job in self._plan.jobs}
        self._method = self._one_method()

    def written(self) -> Written:
        base = self._base
        document = self._body()
        document["merge_method"] = self._method
        if base is not None:
            document["base_model"] = self._reference(base)
        out = str(self._plan.dtype).removeprefix("torch.")
        document |= {"dtype": "float32", "out_dtype": out}
        if any(job.dtype != self._plan.dtype for job in self._plan.jobs):
            self._notes.append(
                f"mergekit writes all tensors as {out}; the recipe keeps each in its number format"
            )
        self._describe_files(document, base)
        for peer in self._peers.values():
            self._notes += peer.notes
        return Written(document, tuple(dict.fromkeys(self._notes)))

    def _peer(self, job: TensorJob) -> Peer:
        if job.shift != 0:
            raise UserError(
                f"tensor '{job.name}': a scale of this architecture shifts the weights of norms, which mergekit "
                "cannot; use scale 1"
            )
        if job.method is None:
            return Peer("passthrough", own={"scale": (job.factor,)})
        if job.factor != 1:
            raise UserError(
                f"tensor '{job.name}': scales of merged layers have no counterpart in mergekit; use scale 1"
            )
        return translated(job.method, job.dialect, job.values or {}, transposed=job.transposed)

    def _one_method(self) -> str:
        examples: dict[str, str] = {}
        for name, peer in self._peers.items():
            examples.setdefault(peer.method, name)
        if set(examples) == {"passthrough", "linear"}:
            for name, peer in self._peers.items():
                if peer.method == "passthrough":
                    self._peers[name] = _as_linear(peer, name)
            return "linear"
        if len(examples) > 1:
            shown = " and ".join(f"{method} for '{name}'" for method, name in examples.items())
            raise UserError(f"mergekit has one method for the whole model, the recipe has {shown}")
        return next(iter(examples))

    # What is merged with what.

    def _body(self) -> dict[str, Any]:
        path = self._recipe.path
        if path is None:
            source = next(iter(self._recipe.merges))
            count = self._checkpoints[self._plan.donor].num_layers
            segment = _Segment(source, dict.fromkeys(self._models(source), 0), count, 0)
            parameters, own = self._parameters(segment, list(self._plan.jobs))
            models = [self._entry(model, own) for model in segment.starts]
            return {"models": models, **({"parameters": parameters} if parameters else {})}
        segments = self._segments(path)
        slices = []
        for segment in segments:
            jobs = [job for job in self._plan.jobs if self._lies_in(job, segment, len(path))]
            parameters, own = self._parameters(segment, jobs)
            sources = []
            for model, start in segment.starts.items():
                entry = self._entry(model, own)
                ranged = {"model": entry["model"], "layer_range": [start, start + segment.count]}
                sources.append(ranged | entry)
            base = self._origin(segment.source)
            own_base = base is not None and base != self._base
            slices.append(
                {
                    "sources": sources,
                    **({"base_model": self._reference(base)} if base and own_base else {}),
                    **({"parameters": parameters} if parameters else {}),
                }
            )
        counts = [len(segment.starts) for segment in segments]
        if counts[0] < counts[-1]:
            self._notes.append(
                f"final norm and head: mergekit reads {counts[0]} of the last slice's {counts[-1]} models, as many "
                "as the first slice has"
            )
        return {"slices": slices}

    def _segments(self, path: Sequence[Hop]) -> list[_Segment]:
        segments: list[_Segment] = []
        for index, hop in enumerate(path):
            source = str(hop.model or hop.merge)
            starts = {model: hop.layers.get(model, hop.layer) for model in self._models(source)}
            if segments and segments[-1].source == source:
                last = segments[-1]
                if starts == {model: start + last.count for model, start in last.starts.items()}:
                    segments[-1] = _Segment(source, last.starts, last.count + 1, last.first)
                    continue
            segments.append(_Segment(source, starts, 1, index))
        return segments

    def _lies_in(self, job: TensorJob, segment: _Segment, length: int) -> bool:
        position = parse(job.name).position
        if position == "pre":
            return segment.first == 0
        if position == "post":
            return segment.first + segment.count == length
        return segment.first <= int(position) < segment.first + segment.count

    def _models(self, source: str) -> list[str]:
        """The models of a source in mergekit's order: the base, if the method reads it, and the inputs."""
        if source in self._recipe.models:
            return [source]
        merge = self._recipe.merges[source]
        read = merge.base if get_method(merge.method).base_in(merge.dialect) != "unused" else None
        models = list(dict.fromkeys([*([read] if read else []), *merge.inputs]))
        references = [repr(self._reference(model)) for model in models]
        for model, reference in zip(models, references, strict=True):
            if references.count(reference) > 1:
                raise UserError(f"models.{model}: mergekit refuses to merge a model with itself")
        return models

    @cached_property
    def _base(self) -> str | None:
        """The model that mergekit is told as base: where it can be, the one that gives the recipe its config."""
        sources = [str(hop.model or hop.merge) for hop in self._recipe.path or ()] or list(
            self._recipe.merges
        )
        merges = [source for source in sources if source in self._recipe.merges]
        base = self._origin(merges[0]) if merges else None
        donor = self._plan.donor
        if get_method(self._method).base_in("mergekit") == "optional origin" and base is None:
            self._notes.append(
                f"config and tokenizer: mergekit takes those of any model, the recipe '{donor}'s"
            )
            return None
        if base is not None and self._recipe.path is None and base not in self._models(sources[0]):
            # mergekit would count it as one more model.
            self._notes.append(
                f"config and tokenizer: mergekit takes those of '{self._recipe.merges[sources[0]].inputs[0]}', the "
                f"recipe '{donor}'s"
            )
            return self._recipe.merges[sources[0]].inputs[0]
        if base is not None and self._recipe.path is None and base != donor:
            self._notes.append(
                f"config and tokenizer: mergekit takes those of '{base}', the recipe '{donor}'s"
            )
        return base or donor

    def _origin(self, source: str) -> str | None:
        """The model that mergekit needs as base of a source; its slerp goes from the base to the other model."""
        merge = self._recipe.merges.get(source)
        if merge is None:
            return None
        from_first = merge.method == "slerp" and get_method("slerp").base_in(merge.dialect) == "unused"
        return merge.inputs[0] if from_first else merge.base

    # Parameters.

    def _parameters(
        self, segment: _Segment, jobs: Sequence[TensorJob]
    ) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
        """Return the shared parameters, and each model's own, of the tensors of a segment."""
        shared: dict[str, dict[str, Any]] = {}
        own: dict[str, dict[str, dict[str, Any]]] = {}
        places: dict[str, int] = {}
        own_places: dict[str, dict[str, int]] = {}
        inputs = self._inputs(segment.source)
        for job in jobs:
            peer = self._peers[job.name]
            position = parse(job.name).position
            for name, value in peer.shared.items():
                shared.setdefault(name, {})[job.name] = value
            if isinstance(position, int):
                places[job.name] = position - segment.first
            for name, values in peer.own.items():
                for model, value in zip(inputs, values, strict=True):
                    source = job.source_in(model)
                    own.setdefault(model, {}).setdefault(name, {})[source] = value
                    if isinstance(position, int):
                        own_places.setdefault(model, {})[source] = position - segment.first
        return (
            {name: compact(values, places, segment.count) for name, values in shared.items()},
            {
                model: {
                    name: compact(values, own_places.get(model, {}), segment.count)
                    for name, values in each.items()
                    if name != "scale" or set(values.values()) != {1.0}
                }
                for model, each in own.items()
            },
        )

    def _inputs(self, source: str) -> Sequence[str]:
        return (source,) if source in self._recipe.models else self._recipe.merges[source].inputs

    def _entry(self, model: str, own: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        parameters = own.get(model)
        return {"model": self._reference(model), **({"parameters": dict(parameters)} if parameters else {})}

    # Models and files.

    def _reference(self, model: str) -> Any:
        """Write a model as text where mergekit reads it as meant, else as a mapping."""
        source = self._recipe.models[model]
        path, lora, revision = source.source, source.adapter, source.adapter_revision
        if lora is None and is_adapter(Path(path).expanduser()):
            lora, path = path, self._under(model)
        places = [(path, source.revision if lora != source.source else None)]
        places += [(lora, revision)] if lora is not None else []
        if all(not set("@+") & set(place) for place, _ in places):
            return "+".join(place + (f"@{at}" if at else "") for place, at in places)
        parts = [{"path": place, **({"revision": at} if at else {})} for place, at in places]
        return {"model": parts[0], **({"lora": parts[1]} if len(parts) > 1 else {})}

    def _under(self, model: str) -> str:
        """The model that an adapter, given as a source of its own, lies on."""
        merge = next((m for m in self._recipe.merges.values() if model in m.inputs and m.base), None)
        if merge is None or merge.base is None:
            raise UserError(
                f"models.{model}: is an adapter without a base in the recipe; write {{source: MODEL, adapter: ...}}"
            )
        return self._recipe.models[merge.base].source

    def _describe_files(self, document: dict[str, Any], base: str | None) -> None:
        settings, models = self._recipe.output.vocabulary, self._recipe.models
        owner = self._plan.donor if settings.source == BASE else settings.source
        if settings.is_folder(models):
            self._notes.append(
                f"tokenizer: mergekit takes a model's, not that of the folder {settings.source}"
            )
        elif self._plan.vocabulary.has_tokenizer and (
            owner != base or self._plan.views or settings.pad_to_multiple_of or settings.tokens
        ):
            self._describe_tokenizer(document, UNION if owner == UNION else self._reference(owner))
        templates = self._plan.chat_templates
        if templates is not None:
            if "default" in templates:
                document["chat_template"] = templates["default"]
            if set(templates) != {"default"}:
                self._notes.append("chat template: mergekit writes the main one only, and cannot remove one")

    def _describe_tokenizer(self, document: dict[str, Any], source: Any) -> None:
        settings, vocabulary = self._recipe.output.vocabulary, self._plan.vocabulary
        tokens = {
            token: {"source": self._row(rule.source), **({"force": True} if rule.force else {})}
            for token, rule in settings.tokens.items()
        }
        multiple = settings.pad_to_multiple_of
        if multiple is None and vocabulary.has_tokenizer and vocabulary.rows > len(vocabulary.ids):
            self._notes.append("tokenizer: mergekit leaves out the rows that belong to no token")
        full = {
            "source": source,
            **({"tokens": tokens} if tokens else {}),
            **({"pad_to_multiple_of": multiple} if multiple not in (None, 1) else {}),
        }
        document |= {"tokenizer_source": source} if len(full) == 1 else {"tokenizer": full}

    def _row(self, row: TokenRow) -> Any:
        if row.model is None:
            return {"kind": "zero"}
        if row.token is None and row.token_id is None:
            return self._reference(row.model)
        other = {"token": row.token} if row.token is not None else {"token_id": row.token_id}
        return {"kind": "model_token", "model": self._reference(row.model), **other}


def _as_linear(peer: Peer, name: str) -> Peer:
    if peer.own["scale"] != (1.0,):
        raise UserError(f"tensor '{name}': mergekit has no scale for layers that stand beside merged ones")
    return Peer("linear", own={"weight": (1.0,)}, shared={"normalize": True})
