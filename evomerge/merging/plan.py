"""From a recipe to a plan: which tensor is computed how, in which order, and the output's config.

The plan is the same for every sink, so that what is scored in memory is what an export writes.
"""

from __future__ import annotations

import copy
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from evomerge.checkpoints import Checkpoint, Position
from evomerge.checkpoints.aligned import AlignedCheckpoint, source_name
from evomerge.checkpoints.canonical import language_prefix, outside_parts, written_name
from evomerge.checkpoints.completeness import output_head
from evomerge.checkpoints.header import MERGEABLE
from evomerge.checkpoints.model_config import set_dtype, set_rows, set_tied
from evomerge.checkpoints.names import is_outside, is_transposed, parse
from evomerge.errors import CheckpointError, UserError, nearest
from evomerge.merging.chat import chosen_templates
from evomerge.merging.layer_config import path_config
from evomerge.merging.paths import UNFOLDED, Fold, check_hops, check_layers, fold_scales, tensors_at
from evomerge.merging.token_ids import follow_tokenizer
from evomerge.merging.vocabulary import OutputVocabulary, donor_of, ends, head_of, output_vocabulary, voters
from evomerge.methods import MaskKey
from evomerge.methods.registry import Needs, Parameter, get_method
from evomerge.recipe import Hop, Merge, Recipe
from evomerge.settings import depth_of
from evomerge.statistics.files import statistics_key, tokenizer_of

JobValue = float | bool | str | tuple[float, ...]


@dataclass(frozen=True)
class TensorJob:
    """How one output tensor is made.

    Attributes:
        name: the output tensor, as it is called on disk.
        shape: its shape, equal to that of every input.
        dtype: its number format; the result is rounded to it once.
        source: the tensor's canonical name in the inputs and the base.
        sources: its name in those inputs where it is neither: (input, name) in a path that takes another
            layer of them.
        inputs: names of the models that are read, in the merge's order.
        method: merge method, or None to take the only input as it is.
        base: name of the base model, or None if the method reads none.
        dialect: the method's variant.
        values: parameters; one number per input for those of expert scope.
        masks: key of the random masks of methods that draw some.
        factor, shift: the result r becomes factor · r + shift before the rounding (folded scales of a layer path).
        view: key of `MergePlan.views` where the models are read in another form than they are stored.
        transposed: whether a layer's matrix is kept as (in, out) instead of (out, in).
        statistics: keys of the statistics of each input that the method needs; none if it needs none.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    source: str
    inputs: tuple[str, ...]
    method: str | None = None
    base: str | None = None
    dialect: str = "paper"
    values: Mapping[str, JobValue] | None = None
    masks: MaskKey | None = None
    factor: float = 1.0
    shift: float = 0.0
    sources: tuple[tuple[str, str], ...] = ()
    view: str = ""
    transposed: bool = False
    statistics: tuple[str, ...] = ()

    def source_in(self, model: str) -> str:
        """Return the tensor's name in one of the models."""
        return dict(self.sources).get(model, self.source)

    @property
    def numel(self) -> int:
        """Number of elements."""
        return torch.Size(self.shape).numel()

    @property
    def nbytes(self) -> int:
        """Size of the output in bytes."""
        return self.numel * self.dtype.itemsize

    @property
    def content(self) -> tuple[Any, ...]:
        """What the tensor depends on, within one plan: all but its name."""
        # A model that stands for itself is a linear merge of itself, with the same bits.
        linear = (
            self.method == "linear" and len(self.inputs) == 1 and (self.values or {}).get("weight") == (1.0,)
        )
        plain = self.method is None or linear
        how = (
            ()
            if plain
            else (self.method, self.base, self.dialect, tuple(sorted((self.values or {}).items())))
        )
        names = tuple(self.source_in(model) for model in self.inputs)
        return (
            *(how, self.inputs, names, self.source, self.shape, self.dtype, self.factor, self.shift),
            *(self.masks, self.view, self.transposed, self.statistics),
        )

    @property
    def key(self) -> str:
        """What the candidate-independent reductions of this tensor are cached under."""
        names = [self.source_in(model) for model in self.inputs] if self.sources else []
        return "\x1f".join([self.source, self.view, self.base or "", *self.inputs, *names, *self.statistics])


@dataclass(frozen=True, kw_only=True)
class ModelPlan:
    """One model, tensor by tensor.

    Attributes:
        config: its Hugging Face config.
        jobs: one for each tensor, in the order in which they are written.
        dtype: number format of most weights; that of the config and of the live model.
        copied: tensors outside the language model.
    """

    config: dict[str, Any]
    jobs: tuple[TensorJob, ...]
    dtype: torch.dtype
    copied: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Size of the tensors in bytes."""
        return sum(job.nbytes for job in self.jobs)


@dataclass(frozen=True, kw_only=True)
class MergePlan(ModelPlan):
    """One output model, and what goes along with its weights.

    Attributes:
        donor: name of the model whose config and other small files go along.
        vocabulary: the output's tokenizer.
        generation: the output's generation defaults where they are not the donor's file as it is.
        chat_templates: by name, or None for the tokenizer's own.
        views: models with other rows of embedding and head than they have on disk, by `TensorJob.view` and name.
        warnings: what the user should know, one sentence each.

    What is `copied` is the donor's.
    """

    donor: str
    vocabulary: OutputVocabulary
    generation: Mapping[str, Any] | None = None
    chat_templates: Mapping[str, str] | None = None
    views: Mapping[str, Mapping[str, Checkpoint]] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def parents(self, job: TensorJob, checkpoints: Mapping[str, Checkpoint]) -> Mapping[str, Checkpoint]:
        """Return the models, by name, in the form in which a job reads them."""
        return self.views[job.view] if job.view else checkpoints


def plan_merge(recipe: Recipe, checkpoints: Mapping[str, Checkpoint]) -> MergePlan:
    """Plan the model that a recipe describes.

    Without `recipe.path` the output has the tensors of the merge's base (without one: of its first input),
    in the order of its files. With it, layer i of the output is hop i; embeddings come from the first hop's
    source, final norm and head from the last one's. The head is tied if both are of one source and all its
    models are tied, byte for byte; else it is a tensor, and a tied model's is its embedding. Embedding and
    head have the rows of the output's tokenizer (`evomerge.merging.vocabulary`).

    Args:
        recipe: what to merge.
        checkpoints: the recipe's models, by name.

    Raises:
        UserError: a hop beyond a model's layers, a missing parameter value, scales that cannot be folded.
        CheckpointError: a model lacks a tensor, has it in another shape, or is quantised.
    """
    for name in recipe.models:
        if name not in checkpoints:
            raise UserError(f"models.{name}: no checkpoint was opened for it{nearest(name, checkpoints)}")
    planner = _Planner(recipe, checkpoints)
    warnings: tuple[str, ...] = ()
    if recipe.path is None:
        name = next(iter(recipe.merges))
        donor = planner.donor(name)
        count = checkpoints[donor].num_layers
        names = list(checkpoints[donor].tensors)
        jobs = [planner.job(name, tensor, depth=_depth(tensor, count)) for tensor in planner.with_head(names)]
        config = copy.deepcopy(checkpoints[donor].config)
    else:
        jobs, config, donor, warnings = _plan_path(recipe, checkpoints, planner)
    set_tied(config, planner.head is None)
    set_rows(config, planner.vocabulary.rows)
    dtype = _main_dtype(jobs)
    set_dtype(config, dtype)
    prefix = language_prefix(checkpoints[donor].tensors)
    jobs = [replace(job, name=written_name(job.name, prefix)) for job in jobs]
    config, generation = follow_tokenizer(config, checkpoints[donor], planner.vocabulary)
    templates, notes = chosen_templates(recipe, checkpoints, planner.vocabulary)
    outside = _outside_copied(donor, checkpoints[donor])
    return MergePlan(
        config=config,
        jobs=tuple(jobs),
        dtype=dtype,
        donor=donor,
        vocabulary=planner.vocabulary,
        generation=generation,
        chat_templates=templates,
        views=planner.views,
        warnings=(*warnings, *planner.vocabulary.warnings, *notes, *outside),
        copied=tuple(job.name for job in jobs if is_outside(job.source)),
    )


def _outside_copied(name: str, donor: Checkpoint) -> list[str]:
    parts = outside_parts(tensor for tensor in donor.tensors if is_outside(tensor))
    if not parts:
        return []
    said = ", ".join(f"{part} ({count})" for part, count in parts.items())
    return [
        f"the {sum(parts.values())} tensors outside the language model are copied from '{name}' as they are: "
        f"{said}"
    ]


def statistics_keys(
    recipe: Recipe, merge: str, needs: Needs, checkpoints: Mapping[str, Checkpoint]
) -> tuple[str, ...]:
    """Return the key of each input's statistics of one kind, for a merge of a recipe."""
    content = recipe.merges[merge]
    assert content.data is not None, "checked with the recipe"
    # Merged layers depend on all models, and through the rows of the embedding on their tokenizers.
    others = [tokenizer_of(checkpoints[model].path) for model in recipe.models]
    context = " ".join([recipe.hash, *others]) if needs == "merged gram" else ""
    return tuple(
        statistics_key(needs, checkpoints[name], content.data.settings(name, needs), context)
        for name in content.inputs
    )


def _plan_path(
    recipe: Recipe, checkpoints: Mapping[str, Checkpoint], planner: _Planner
) -> tuple[list[TensorJob], dict[str, Any], str, tuple[str, ...]]:
    path = recipe.path or ()
    sources = [str(hop.model or hop.merge) for hop in path]
    donors = [checkpoints[planner.donor(source)] for source in sources]
    check_hops(path, donors)
    config = path_config(path, donors)
    check_layers(path, donors, config)
    folding, warnings = fold_scales(path, donors)
    first, last = donors[0], donors[-1]
    counts = Counter(sources)
    seen: Counter[str] = Counter()

    jobs = [planner.job(sources[0], name) for name in _at(first, "pre")]
    for index, (hop, source, donor) in enumerate(zip(path, sources, donors, strict=True)):
        _check_layers(index, hop, checkpoints)
        depth = depth_of(seen[source], counts[source])
        seen[source] += 1
        for name in _at(donor, hop.layer):
            tensor = parse(name)
            jobs.append(
                planner.job(
                    source,
                    name,
                    output=tensor.at_layer(index),
                    fold=folding.layers[index].get(tensor.stem, UNFOLDED),
                    depth=depth,
                    layers=hop.layers,
                )
            )
    jobs += [
        planner.job(sources[-1], name, fold=folding.final_norm if _is_norm_weight(name) else UNFOLDED)
        for name in planner.with_head(_at(last, "post"))
    ]
    return jobs, config, planner.donor(sources[0]), warnings


def _check_layers(index: int, hop: Hop, checkpoints: Mapping[str, Checkpoint]) -> None:
    for model, layer in hop.layers.items():
        count = checkpoints[model].num_layers
        if layer >= count:
            raise UserError(
                f"'{model}' has the layers 0 to {count - 1}, not {layer}", key=f"path.{index}.layers.{model}"
            )


def _depth(tensor: str, count: int) -> float:
    """Return the place of a tensor of the model in gradients over depth; 0 outside the layers."""
    position = parse(tensor).position
    return depth_of(position, count) if isinstance(position, int) else 0.0


def _at(checkpoint: Checkpoint, position: Position) -> Sequence[str]:
    return tensors_at(checkpoint).get(position, ())


def _is_norm_weight(name: str) -> bool:
    return parse(name).role == "norm" and name.endswith("weight")


class _Planner:
    """Makes the job of one tensor of a source (a model's or a merge's name)."""

    def __init__(self, recipe: Recipe, checkpoints: Mapping[str, Checkpoint]) -> None:
        self._recipe = recipe
        self._checkpoints = checkpoints
        dtype = recipe.output.dtype
        self._dtype: torch.dtype | None = getattr(torch, dtype) if dtype else None
        self._identity: dict[tuple[str, ...], tuple[str, ...]] = {}
        self._keys: dict[tuple[str, Needs], tuple[str, ...]] = {}
        self.head = head_of(recipe, checkpoints)
        self.vocabulary = output_vocabulary(recipe, checkpoints)
        self.views: dict[str, Mapping[str, Checkpoint]] = {}
        self._view_of: dict[str, str] = {}
        for source in ends(recipe):
            self._add_view(source)

    def _add_view(self, source: str) -> None:
        who = voters(self._recipe, source, self.vocabulary)
        view = self.vocabulary.view(who, self.head)
        if view:
            key = hashlib.sha256(repr((self.vocabulary.source, who, self.head)).encode()).hexdigest()[:16]
            self.views[key] = view
            self._view_of[source] = key

    def with_head(self, names: Sequence[str]) -> list[str]:
        """Return the tensors with the output's head among them if it has one, and without any other."""
        kept = [name for name in names if name == self.head or output_head([name]) is None]
        return kept if self.head is None or self.head in kept else [*kept, self.head]

    def _view(self, source: str, tensor: str) -> str:
        """Return the key of the view that changes a tensor of a source, or an empty string."""
        key = self._view_of.get(source, "")
        changed = key and any(
            isinstance(model, AlignedCheckpoint) and tensor in model.tensors and model.changes(tensor)
            for model in self.views[key].values()
        )
        return key if changed else ""

    def donor(self, source: str) -> str:
        return donor_of(self._recipe, source)

    def job(
        self,
        source: str,
        tensor: str,
        *,
        output: str = "",
        fold: Fold = UNFOLDED,
        depth: float = 0.0,
        layers: Mapping[str, int] | None = None,
    ) -> TensorJob:
        donor = self._checkpoints[self.donor(source)]
        info = donor.tensors[source_name(donor, tensor)]
        view = self._view(source, tensor)
        read = next(iter(self.views[view].values())).tensors[tensor] if view else info
        copied = TensorJob(
            name=output or tensor,
            shape=tuple(read.shape),
            dtype=info.dtype if is_outside(tensor) else self._dtype or info.dtype,
            source=tensor,
            inputs=(self.donor(source),),
            factor=fold.factor,
            shift=fold.shift,
            view=view,
            transposed=is_transposed(self._checkpoints[self.donor(source)].config, tensor),
        )
        if source in self._recipe.models or is_outside(tensor):
            job = copied
        else:
            name = parse(tensor)
            names = {model: name.at_layer(layer) for model, layer in (layers or {}).items()}
            job = self._merged(copied, source, depth, names)
        self._check(job)
        return job

    def _merged(self, job: TensorJob, source: str, depth: float, names: Mapping[str, str]) -> TensorJob:
        merge = self._recipe.merges[source]
        name, resolved = merge.resolve(parse(job.source), depth, output=job.name, names=names)
        method = get_method(name)
        role = method.base_in(merge.dialect)
        others = tuple(model for model in merge.inputs if model != merge.base)
        return replace(
            job,
            inputs=others if role.endswith("input") else merge.inputs,
            method=name,
            base=None if role == "unused" else merge.base,
            dialect=merge.dialect,
            values=_values(source, merge, name, resolved, job.source),
            masks=self._masks(merge.inputs, job.source) if method.random else None,
            sources=tuple(names.items()),
            statistics=self._statistics(source, method.needs) if method.needs else (),
        )

    def _statistics(self, source: str, needs: Needs) -> tuple[str, ...]:
        if (source, needs) not in self._keys:
            self._keys[source, needs] = statistics_keys(self._recipe, source, needs, self._checkpoints)
        return self._keys[source, needs]

    def _masks(self, inputs: tuple[str, ...], tensor: str) -> MaskKey:
        if inputs not in self._identity:
            self._identity[inputs] = tuple(
                self._recipe.models[name].sha256 or self._checkpoints[name].sha256 for name in inputs
            )
        return MaskKey(seed=self._recipe.seed, experts=self._identity[inputs], tensor=tensor)

    def _check(self, job: TensorJob) -> None:
        parents = self.views[job.view] if job.view else self._checkpoints
        for model in (*job.inputs, *([job.base] if job.base else [])):
            checkpoint = parents[model]
            name = job.source_in(model)
            info = checkpoint.tensors.get(name)
            if info is None:
                raise CheckpointError(
                    f"{checkpoint.path}: tensor '{name}' is missing, the other models have it"
                )
            if tuple(info.shape) != job.shape:
                raise CheckpointError(
                    f"{checkpoint.path}: tensor '{name}' has shape {tuple(info.shape)}, "
                    f"the output's is {job.shape}"
                )
            if info.dtype not in MERGEABLE and not is_outside(name):
                raise CheckpointError(
                    f"{checkpoint.path}: tensor '{name}' is {str(info.dtype).removeprefix('torch.')}; "
                    "quantised checkpoints cannot be merged, give the original weights"
                )


def _values(
    name: str, merge: Merge, method: str, resolved: Mapping[str, Any], tensor: str
) -> dict[str, JobValue]:
    """Order per-input values as the inputs are, and refuse gaps."""
    values: dict[str, JobValue] = {}
    for parameter in get_method(method).parameters_in(merge.dialect):
        value = resolved.get(parameter.name)
        if value is None:
            raise UserError(
                f"tensor '{tensor}' has no value for '{parameter.name}' of {method}", key=f"merges.{name}"
            )
        each = value if isinstance(value, dict) else dict.fromkeys(merge.inputs, value)
        missing = [model for model in merge.inputs if model not in each]
        if missing:
            raise UserError(
                f"tensor '{tensor}' has no value for '{parameter.name}' of input '{missing[0]}'",
                key=f"merges.{name}",
            )
        if parameter.kind == "int":
            # A gradient between whole numbers need not meet one.
            for model in merge.inputs:
                _check_whole(parameter, each[model], f"tensor '{tensor}': {parameter.name}", f"merges.{name}")
        if parameter.scope == "shared":
            values[parameter.name] = each[merge.inputs[0]]
        else:
            values[parameter.name] = tuple(each[model] for model in merge.inputs)
    return values


def _check_whole(parameter: Parameter, value: Any, place: str, key: str) -> None:
    try:
        parameter.check(value, place)
    except ValueError as error:
        raise UserError(str(error), key=key) from None


def _main_dtype(jobs: Sequence[TensorJob]) -> torch.dtype:
    sizes: Counter[torch.dtype] = Counter()
    for job in jobs:
        sizes[job.dtype] += job.numel
    return sizes.most_common(1)[0][0]
