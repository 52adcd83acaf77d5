"""Merging: a recipe and its checkpoints become one plan, and the plan is streamed to a sink.

`merge` writes a checkpoint folder; `Materializer`, which imports transformers, fills a live model.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from evomerge.checkpoints import (
    Checkpoint,
    CheckpointWriter,
    commits,
    parse_size,
)
from evomerge.checkpoints.compact import description
from evomerge.checkpoints.names import parse
from evomerge.checkpoints.tokenizer import load_tokenizer, tokenizer_sha256, write_chat_templates
from evomerge.environment import prepare
from evomerge.errors import CandidateFailed, CheckpointError, UserError
from evomerge.mergekit import Reading, open_recipe
from evomerge.merging.chat import chosen_templates
from evomerge.merging.execute import NonFinite, Progress, execute
from evomerge.merging.parents import adapter_doubts, open_parents, open_sources
from evomerge.merging.plan import MergePlan, TensorJob, plan_merge
from evomerge.merging.sinks import FileSink, HashSink, LiveSink, Sink
from evomerge.merging.vocabulary import donor_of, output_vocabulary
from evomerge.output import Output
from evomerge.recipe import Recipe
from evomerge.statistics.jobs import without_statistics

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from evomerge.merging.live import Materializer, live_model
    from evomerge.statistics.files import Statistics
    from evomerge.statistics.needed import Report

__all__ = [
    "FileSink",
    "HashSink",
    "LiveSink",
    "Materializer",
    "MergePlan",
    "NonFinite",
    "Progress",
    "Sink",
    "TensorJob",
    "adapter_doubts",
    "execute",
    "live_model",
    "merge",
    "open_parents",
    "open_sources",
    "pin",
    "plan_merge",
    "verify_sources",
    "write_merge",
]

RECIPE_FILE = "evomerge_recipe.yaml"
COPIED_FILE = "evomerge_copied_tensors.txt"

_log = logging.getLogger(__name__)


def __getattr__(name: str) -> Any:
    # Merging to disk does without transformers, whose import takes longer than many a merge.
    if name in ("Materializer", "live_model"):
        from evomerge.merging import live

        return getattr(live, name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def merge(
    recipe: Recipe | Reading | Path | str,
    out: Path | str,
    *,
    max_shard_size: int | str = "5GB",
    progress: Progress | None = None,
    threads: int | None = None,
    report: Report | None = None,
    device: str | None = None,
    compact: bool = False,
) -> Path:
    """Merge checkpoints as a recipe says and write the result as a Hugging Face checkpoint folder.

    The folder also gets `evomerge_recipe.yaml`, the recipe with the content hash of every parent: it makes
    the same bytes again. Of a multimodal model the language model is merged and the rest copied from the
    base; `evomerge_copied_tensors.txt` lists it. Memory stays bounded by a few chunks per thread.

    Args:
        recipe: a recipe, or the path of its YAML file, or that file as it was read; a mergekit YAML is read in
            mergekit's dialect.
        out: a folder that does not exist yet or is empty.
        max_shard_size: largest safetensors file, in bytes or as ``5GB``, ``500MB``, ``2GiB``.
        progress: called with (bytes written, bytes in all).
        threads: tensors worked on at the same time; None: one per CPU. The bytes do not depend on it.
        report: called with (what is done, steps done, steps in all) while the models are run for a method
            that needs statistics which are not kept from before.
        device: where the arithmetic is done, e.g. ``cuda``; None: on the CPU.
        compact: write equal tensors once, such as those of a layer that a path repeats. The folder is no ordinary
            checkpoint: `evomerge.load_compact` loads it, `evomerge.convert` writes the ordinary one.

    Returns:
        `out` as a path.

    Raises:
        UserError: the recipe does not fit its models, a model is not the one that the recipe pins, or `out`
            is in use.
        CheckpointError: a model cannot be used, or the merged weights are not finite.
    """
    if isinstance(recipe, Path | str):
        recipe = open_recipe(recipe)
        for note in recipe.notes:
            _log.warning("%s", note)
    reading = Reading(recipe) if isinstance(recipe, Recipe) else recipe
    with nullcontext() if reading is not recipe else reading.in_file():
        prepare(offline=not reading.recipe.uses_hub)
        checkpoints = open_parents(reading.recipe)
        try:
            return write_merge(
                reading.recipe,
                checkpoints,
                out,
                max_shard_size=max_shard_size,
                progress=progress,
                threads=threads,
                report=report,
                device=device,
                compact=compact,
                name_idle=reading is recipe,
            )
        finally:
            for checkpoint in checkpoints.values():
                checkpoint.close()


def write_merge(
    recipe: Recipe,
    checkpoints: Mapping[str, Checkpoint],
    out: Path | str,
    *,
    max_shard_size: int | str = "5GB",
    progress: Progress | None = None,
    threads: int | None = None,
    report: Report | None = None,
    device: str | None = None,
    compact: bool = False,
    name_idle: bool = False,
) -> Path:
    """Do what `merge` does with parents that are open already.

    Args:
        name_idle: warn of rules that select no tensor, which in a recipe written by hand are slips of the pen.
    """
    out = Path(out)
    place = _device(device)
    shard_bytes = parse_size(max_shard_size)
    _check_out(out, checkpoints)
    verify_sources(recipe, checkpoints)
    recipe = pin(recipe, checkpoints)
    plan = plan_merge(recipe, checkpoints)
    statistics = _statistics(recipe, checkpoints, report)
    notes = (*plan.warnings, *(_idle_rules(recipe, checkpoints) if name_idle else ()))
    for warning in (*notes, *without_statistics(plan, checkpoints, statistics)):
        _log.warning("%s", warning)
    same = _equal_tensors(plan) if compact else {job.name: job.name for job in plan.jobs}
    jobs = [job for job in plan.jobs if same[job.name] == job.name]
    try:
        with (
            plan.vocabulary.folder() as tokenizer,
            _templates(plan) as template,
            CheckpointWriter(
                out,
                [(job.name, job.shape, job.dtype) for job in jobs],
                config=plan.config,
                donor=checkpoints[plan.donor].path,
                tokenizer_donor=tokenizer,
                chat_template_donor=template,
                generation=plan.generation,
                max_shard_size=shard_bytes,
                compact=description(same, plan.copied) if compact else None,
            ) as writer,
        ):
            execute(
                plan,
                checkpoints,
                FileSink(writer),
                jobs=jobs,
                progress=progress,
                threads=threads or _cpus(),
                stream=True,
                statistics=statistics,
                device=place,
            )
            writer.commit({RECIPE_FILE: recipe.to_yaml(), **_copied_list(plan)})
    except CandidateFailed as failure:
        why = "; a parent is damaged or a parameter too large" if isinstance(failure, NonFinite) else ""
        raise CheckpointError(f"{out}: not written: {failure}{why}") from None
    return out


def _equal_tensors(plan: MergePlan) -> dict[str, str]:
    """Return for each tensor, in order, the first one that is the same."""
    first: dict[Any, str] = {}
    return {job.name: first.setdefault(job.content, job.name) for job in plan.jobs}


def _idle_rules(recipe: Recipe, checkpoints: Mapping[str, Checkpoint]) -> list[str]:
    """Name the rules that select no tensor of their merge: a slip of the pen more often than not."""
    said = []
    for name, merge in recipe.merges.items():
        tensors = (
            [parse(tensor) for tensor in checkpoints[donor_of(recipe, name)].tensors] if merge.rules else []
        )
        said += [
            f"merges.{name}.rules.{i}: no tensor is selected by it, so it changes nothing"
            for i, rule in enumerate(merge.rules)
            if not any(map(rule.matches, tensors))
        ]
    return said


def _copied_list(plan: MergePlan) -> dict[str, str]:
    if not plan.copied:
        return {}
    lines = [f"# Outside the language model; copied from '{plan.donor}' as they are.", *plan.copied]
    return {COPIED_FILE: "\n".join(lines) + "\n"}


@contextmanager
def _templates(plan: MergePlan) -> Iterator[Path | None]:
    """Give a folder with the plan's chat templates, or None for the tokenizer's own."""
    if plan.chat_templates is None:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="evomerge-templates-") as place:
        write_chat_templates(Path(place), plan.chat_templates)
        yield Path(place)


def _statistics(
    recipe: Recipe, checkpoints: Mapping[str, Checkpoint], report: Report | None
) -> dict[str, Statistics]:
    if not any(merge.needs for merge in recipe.merges.values()):
        return {}
    from evomerge.statistics.needed import provide

    return provide(recipe, checkpoints, report=report)


def verify_sources(recipe: Recipe, checkpoints: Mapping[str, Checkpoint]) -> None:
    """Refuse a parent whose content is not the one that the recipe pins."""
    hashes = _hashes({name: checkpoints[name] for name, source in recipe.models.items() if source.sha256})
    for name, found in hashes.items():
        expected = recipe.models[name].sha256
        if found != expected:
            raise UserError(
                f"the recipe expects {expected}, {checkpoints[name].path} has {found}; name the original "
                "checkpoint, or remove the line to merge this one",
                key=f"models.{name}.sha256",
            )
    tokenizer = recipe.output.vocabulary
    if tokenizer.is_folder(recipe.models) and tokenizer.sha256 is not None:
        found = tokenizer_sha256(Path(tokenizer.source))
        if found != tokenizer.sha256:
            raise UserError(
                f"the recipe expects {tokenizer.sha256}, {tokenizer.source} has {found}; name the original "
                "folder, or remove the line to use this one",
                key="output.tokenizer.sha256",
            )


def pin(recipe: Recipe, checkpoints: Mapping[str, Checkpoint]) -> Recipe:
    """Return the recipe with the content hash of every model, and the commit of every one from the hub."""
    missing = {name: checkpoints[name] for name, source in recipe.models.items() if source.sha256 is None}
    known = {name: source.sha256 for name, source in recipe.models.items() if source.sha256 is not None}
    recipe = recipe.pinned({**known, **_hashes(missing)})
    models = {
        name: source.model_copy(update=commits(checkpoints[name], source.source, source.adapter))
        for name, source in recipe.models.items()
    }
    output = pin_output(recipe.output, recipe.models)
    return recipe.model_copy(update={"models": models, "output": output})


def pin_output(output: Output, models: Iterable[str]) -> Output:
    """Return the output with the content hash of a tokenizer that is a folder."""
    tokenizer = output.vocabulary
    if not tokenizer.is_folder(models) or tokenizer.sha256 is not None:
        return output
    pinned = tokenizer.model_copy(update={"sha256": tokenizer_sha256(Path(tokenizer.source))})
    return output.model_copy(update={"tokenizer": pinned})


def output_tokenizer(recipe: Recipe, checkpoints: Mapping[str, Checkpoint]) -> PreTrainedTokenizerBase:
    """Load the tokenizer, with its chat template, that a recipe's output has."""
    vocabulary = output_vocabulary(recipe, checkpoints)
    templates, _ = chosen_templates(recipe, checkpoints, vocabulary)
    with vocabulary.folder() as folder:
        tokenizer = load_tokenizer(folder)
    if templates is not None:
        only = templates.get("default") if len(templates) <= 1 else None
        tokenizer.chat_template = only or dict(templates) or None
    return tokenizer


def _check_out(out: Path, checkpoints: Mapping[str, Checkpoint]) -> None:
    place = out.resolve()
    for name, checkpoint in checkpoints.items():
        parent = Path(checkpoint.path).resolve()
        if place == parent or parent in place.parents:
            raise UserError(f"{out}: lies in the folder of the model '{name}'; name another output folder")
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UserError(f"{out}: exists already and is not an empty folder; name a new one")


def _hashes(checkpoints: Mapping[str, Checkpoint]) -> dict[str, str]:
    with ThreadPoolExecutor(max(1, min(len(checkpoints), _cpus()))) as pool:
        return dict(zip(checkpoints, pool.map(lambda c: c.sha256, checkpoints.values()), strict=True))


def _device(name: str | None) -> torch.device | None:
    """Return the device that a user names, or None for the CPU."""
    if name in (None, "cpu"):
        return None
    try:
        device = torch.device(str(name))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"--device {name}: cannot be used here: {reason}; use cpu, cuda or cuda:N") from None
    return device


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
