"""Running models over texts to compute what a merge weighs its inputs with."""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from evomerge.checkpoints import Checkpoint, open_checkpoint
from evomerge.data_config import Data
from evomerge.errors import CheckpointError, UserError
from evomerge.merging.binding import bind
from evomerge.merging.execute import execute
from evomerge.merging.live import live_model
from evomerge.merging.plan import TensorJob, plan_merge
from evomerge.merging.sinks import LiveSink
from evomerge.methods.registry import Needs
from evomerge.methods.statistics import Statistic
from evomerge.recipe import Recipe
from evomerge.statistics.files import (
    Source,
    Statistics,
    StatisticsWriter,
    cached_folder,
    find_statistics,
    statistics_key,
)
from evomerge.statistics.fisher import add_squared_gradients, log_likelihood
from evomerge.statistics.grams import LayerGrams, check_finite
from evomerge.statistics.layers import NAME, LayeredModel, jobs_at, plan_of
from evomerge.statistics.needed import Report, silent
from evomerge.statistics.texts import Sequence as Tokens
from evomerge.statistics.texts import read_sequences

_log = logging.getLogger(__name__)


def collect_statistics(
    model: Checkpoint | Path | str,
    data: Data | Path | str,
    kind: Literal["fisher", "gram"],
    out: Path | str | None = None,
    *,
    device: str = "cpu",
    report: Report | None = None,
) -> Statistics:
    """Compute one model's statistics on texts, for a look at them or for merges to come.

    Args:
        model: a checkpoint, or its folder or hub id.
        data: the texts: a JSONL file with a ``text`` on each line, or settings.
        kind: ``fisher``: the diagonal Fisher information of every weight; ``gram``: the Gram matrix of the
            inputs of every linear layer inside the decoder layers, a mean over tokens.
        out: the folder to make. None: the cache folder, where merges of this model on these texts find them;
            what is there already is not computed again.
        device: where the model is run.
        report: told how far the computation has got.

    Raises:
        UserError: the texts cannot be used, or `out` exists.
        CheckpointError: the model cannot be run.
    """
    checkpoint = model if isinstance(model, Checkpoint) else open_checkpoint(model)
    settings = (data if isinstance(data, Data) else Data.model_validate(str(data))).pinned()
    name = checkpoint.name
    if out is not None:
        place = Path(out)
        if place.exists():
            raise UserError(f"{out}: exists already; name a new folder")
        with StatisticsWriter(place) as writer:
            about = _collect(checkpoint, settings, name, kind, writer, device, report or silent)
            return writer.commit(about)
    key = statistics_key(kind, checkpoint, settings.settings(name, kind))
    found = find_statistics(key)
    return found or kept_statistics(
        checkpoint, settings, name, kind, key, device=device, report=report or silent
    )


def kept_statistics(
    checkpoint: Checkpoint, data: Data, name: str, kind: Needs, key: str, *, device: str, report: Report
) -> Statistics:
    """Compute one input's statistics and keep them in the cache folder."""
    try:
        with StatisticsWriter(cached_folder(key)) as writer:
            return writer.commit(_collect(checkpoint, data, name, kind, writer, device, report))
    finally:
        # A live model is full of cycles; the next one needs its memory.
        gc.collect()


def _collect(
    checkpoint: Checkpoint,
    data: Data,
    name: str,
    kind: Needs,
    writer: StatisticsWriter,
    device: str,
    report: Report,
) -> dict[str, Any]:
    checkpoint.check_finite()
    sequences = read_sequences(data, name, checkpoint)
    place = data.file_of(name).file
    if kind == "fisher":
        about = _fisher(checkpoint, data, name, sequences, writer, device, report)
    else:
        about = _grams(checkpoint, name, sequences, writer, device, report)
    return {"kind": kind, "model": str(checkpoint.path), "texts": place, **about}


def _fisher(
    checkpoint: Checkpoint,
    data: Data,
    name: str,
    sequences: Sequence[Tokens],
    writer: StatisticsWriter,
    device: str,
    report: Report,
) -> dict[str, Any]:
    """Write F = mean over sequences of (∂ log p / ∂θ)² for every tensor of the checkpoint."""
    place = data.file_of(name).file
    answering = [sequence for sequence in sequences if sequence.ids.shape[1] > sequence.start]
    if not answering:
        raise UserError(f"{place}: its texts have one token each, which leaves nothing to predict")
    plan = plan_of(checkpoint)
    model = live_model(plan.config, torch.float32, device)
    live = bind(model, plan)
    execute(plan, {NAME: checkpoint}, LiveSink(live))

    def examples() -> Iterator[Any]:
        for done, sequence in enumerate(answering):
            report(f"Fisher information of {name}", done, len(answering))
            yield lambda: log_likelihood(model, sequence, sampled=data.labels == "sampled", place=place)  # noqa: B023

    sums, count = add_squared_gradients(model, examples())
    report(f"Fisher information of {name}", count, count)
    parameters = {id(parameter) for parameter in sums}
    with torch.no_grad():
        # The live weights have served: their storage, which the on-disk names are bound to, takes the result.
        for parameter, total in sums.items():
            parameter.copy_(total.div_(count))
        for tensor in live.values():
            owner = tensor if tensor._base is None else tensor._base
            if id(owner) not in parameters:
                tensor.zero_()
    squares = []
    for tensor_name, tensor in live.items():
        information = tensor.detach().cpu().contiguous()
        if not torch.isfinite(information).all():
            raise CheckpointError(f"{place}: the gradient of '{tensor_name}' is not finite on these texts")
        squares.append(float(information.double().square().sum()))
        writer.write({tensor_name: information})
    size = sum(tensor.numel() for tensor in live.values())
    return {
        "sequences": count,
        "unit": math.sqrt(math.fsum(squares) / size),
        "tensors": {tensor_name: tensor_name for tensor_name in live},
    }


def _grams(
    checkpoint: Checkpoint,
    name: str,
    sequences: Sequence[Tokens],
    writer: StatisticsWriter,
    device: str,
    report: Report,
) -> dict[str, Any]:
    """Write the Gram matrices of every decoder layer's linear layers, one layer after another."""
    plan = plan_of(checkpoint)
    model = LayeredModel(plan, device)
    model.fill(plan, {NAME: checkpoint})
    states = [model.embed(sequence.ids) for sequence in sequences]
    holders: dict[str, str] = {}
    tokens = 0
    steps = len(model.layers) * len(states)
    for index in range(len(model.layers)):
        grams = LayerGrams()
        for i, left in enumerate(model.run(index, states, grams)):
            report(f"Gram matrices of {name}", index * len(states) + i, steps)
            states[i] = left
        check_finite(grams.sums, f"{checkpoint.path}")
        writer.write(grams.means())
        holders |= grams.holders
        tokens = grams.tokens
    model.check(sequences[0].ids, states[0])
    report(f"Gram matrices of {name}", 1, 1)
    return {
        "sequences": len(sequences),
        "tokens": tokens,
        "unit": 1.0,
        "tensors": holders,
    }


@dataclass(frozen=True)
class _InMemory:
    """The statistics of one layer, not yet on disk."""

    grams: LayerGrams
    means: Mapping[str, Tensor]

    def of(self, tensor: str) -> Statistic | None:
        holder = self.grams.holders.get(tensor)
        if holder is None:
            return None
        return Statistic(self.means[holder].reshape(-1))


def merged_grams(
    recipe: Recipe,
    merge: str,
    checkpoints: Mapping[str, Checkpoint],
    keys: Mapping[str, str],
    known: Mapping[str, Source],
    *,
    device: str,
    report: Report,
) -> dict[str, Statistics]:
    """Compute the Gram matrices of RegMean++ and keep them in the cache folder.

    Layer after layer: each input's own layer is run on what the merged layers below make of its texts, which
    gives its Gram matrices; the layer is merged with them; the merged layer makes the next hidden states.
    Embeddings come first, merged too.

    Args:
        recipe: pinned.
        merge: name of the merge.
        checkpoints: its models.
        keys: of each input's statistics.
        known: the other statistics that the merge needs, by key.
        device, report: as for `provide`.
    """
    content = recipe.merges[merge]
    assert content.data is not None, "checked with the recipe"
    inputs = list(keys)
    plan = plan_merge(recipe.model_copy(update={"merges": {merge: content}}), checkpoints)
    with plan.vocabulary.folder() as tokenizer:
        sequences = {
            name: read_sequences(content.data, name, checkpoints[name], tokenizer) for name in inputs
        }
    model = LayeredModel(plan, device)
    known = {**known, **dict.fromkeys(keys.values(), _InMemory(LayerGrams(), {}))}
    model.fill(plan, checkpoints, jobs_at(plan, None), known)
    states = {name: [model.embed(sequence.ids) for sequence in sequences[name]] for name in inputs}
    about: dict[str, dict[str, Any]] = {
        name: {
            "kind": "merged gram",
            "model": str(checkpoints[name].path),
            "texts": content.data.file_of(name).file,
            "sequences": len(sequences[name]),
            "unit": 1.0,
            "tensors": {},
        }
        for name in inputs
    }
    with ExitStack() as stack:
        writers = {name: stack.enter_context(StatisticsWriter(cached_folder(keys[name]))) for name in inputs}
        for index in range(len(model.layers)):
            report("layers of RegMean++", index, len(model.layers))
            jobs = jobs_at(plan, index)
            collected: dict[str, Source] = {}
            for name in inputs:
                model.fill(plan, checkpoints, [_own(job, name) for job in jobs])
                grams = LayerGrams()
                for _ in model.run(index, states[name], grams):
                    pass
                check_finite(grams.sums, f"{checkpoints[name].path}")
                grams = _renamed(grams, {job.name: job.source_in(name) for job in jobs})
                means = grams.means()
                collected[keys[name]] = _InMemory(grams, means)
                writers[name].write(means)
                about[name]["tensors"] |= grams.holders
                about[name]["tokens"] = grams.tokens
            model.fill(plan, checkpoints, jobs, {**known, **collected})
            states = {name: list(model.run(index, states[name])) for name in inputs}
        model.check(sequences[inputs[0]][0].ids, states[inputs[0]][0])
        report("layers of RegMean++", 1, 1)
        return {keys[name]: writers[name].commit(about[name]) for name in inputs}


def _own(job: TensorJob, name: str) -> TensorJob:
    """Return the job that takes an input's own tensor."""
    return TensorJob(job.name, job.shape, torch.float32, job.source_in(name), (name,))


def _renamed(grams: LayerGrams, names: Mapping[str, str]) -> LayerGrams:
    """Return the same under the names that an input has for the tensors."""
    return replace(grams, holders={names[name]: holder for name, holder in grams.holders.items()})
