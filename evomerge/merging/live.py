"""A live Hugging Face model whose weights are replaced in place, one candidate after another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import GenerationConfig

from evomerge.checkpoints import Checkpoint
from evomerge.checkpoints.auto import build_model
from evomerge.merging.binding import bind
from evomerge.merging.execute import CHUNK, execute
from evomerge.merging.layer_config import with_kinds
from evomerge.merging.paths import path_room
from evomerge.merging.plan import MergePlan, TensorJob, plan_merge
from evomerge.merging.sinks import LiveSink
from evomerge.merging.streams import Residents
from evomerge.merging.vocabulary import donor_of
from evomerge.methods import TensorCache
from evomerge.recipe import Recipe
from evomerge.statistics.files import Source
from evomerge.statistics.needed import provide

if TYPE_CHECKING:
    from evomerge.merging.live_paths import LivePath, SharedLayers


def live_model(
    config: Mapping[str, Any],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    *,
    generation: Path | Mapping[str, Any] | None = None,
) -> nn.Module:
    """Build a causal language model with uninitialised weights, ready to be written to.

    Args:
        config: a Hugging Face config as plain data.
        dtype: number format of the weights.
        device: where the model lives.
        generation: the generation defaults, or a folder whose `generation_config.json`, if there is one, gives
            them.

    Returns:
        The model in eval mode without gradients; buffers such as rotary frequencies are computed, tied
        weights are tied.
    """
    model = build_model(config, dtype, device)
    model.tie_weights()
    if generation is not None:
        set_generation(model, generation)
    model.requires_grad_(False)
    model.eval()
    return model  # type: ignore[no-any-return]


def set_generation(model: nn.Module, generation: Path | Mapping[str, Any]) -> None:
    """Set a model's generation defaults, given as data or by a folder whose file, if there is one, has them."""
    if isinstance(generation, Mapping):
        model.generation_config = GenerationConfig.from_dict(dict(generation))
    elif (generation / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(generation)
    else:
        model.generation_config = GenerationConfig.from_model_config(model.config)


class Materializer:
    """Holds the parents and one live model, and turns recipes into its weights.

    Args:
        checkpoints: the parents, by the names that recipes use.
        device: where the live model is; the parents stay in host memory.
        chunk, threads: as for `evomerge.merging.execute.execute`.
        merge_on: a device that does the arithmetic and holds the parents, as far as they fit; None: the CPU,
            whose bits are those of an export.

    What does not depend on the candidate (reductions over the parents) is computed once. Tensors whose job
    is the same as in the recipe before are left as they are. From the first layer path on, models share the
    tensors of their layers (`evomerge.merging.live_paths`), so that a layer that was there before is not written
    again.
    """

    def __init__(
        self,
        checkpoints: Mapping[str, Checkpoint],
        *,
        device: torch.device | str = "cpu",
        chunk: int = CHUNK,
        threads: int = 1,
        merge_on: torch.device | None = None,
    ) -> None:
        self._checkpoints = checkpoints
        self._merge_on = merge_on
        self._residents = None if merge_on is None else Residents(merge_on)
        self._device = torch.device(device)
        self._chunk = chunk
        self._threads = threads
        self._cache = TensorCache()
        self._model: nn.Module | None = None
        self._shape: tuple[dict[str, Any], torch.dtype] | None = None
        self._sink: LiveSink | None = None
        self._held: dict[str, TensorJob] = {}
        self._shared: SharedLayers | None = None
        self._statistics: dict[str, Source] = {}

    @property
    def model(self) -> nn.Module | None:
        """The live model, or None before the first recipe."""
        return self._model

    @property
    def shared_bytes(self) -> int:
        """Size of the tensors that layer paths share, in bytes."""
        return 0 if self._shared is None else self._shared.nbytes

    @property
    def path(self) -> LivePath | None:
        """The live model's layers, if they are shared."""
        return None if self._shared is None else self._shared.path

    def materialize(self, recipe: Recipe) -> nn.Module:
        """Write a recipe's weights into the live model and return it.

        The same module is returned each time while the output's config stays the same; of layer paths also where
        order and number of the layers change. Otherwise the old one is let go first and a new one built.

        Raises:
            CandidateFailed: merged weights are not finite; the live weights are then undefined until the next
                recipe has been materialised.
            UserError: the recipe does not fit the parents.
        """
        plan = plan_merge(recipe, self._checkpoints)
        if any(key not in self._statistics for job in plan.jobs for key in job.statistics):
            self._statistics |= provide(recipe, self._checkpoints, device=str(self._device))
        if recipe.path is not None or self._shared is not None:
            shared = plan
            if recipe.path is None:
                # As a path through it would have them: it is of the same shape, then.
                layers = self._checkpoints[plan.donor].num_layers
                shared = replace(plan, config=with_kinds(plan.config, layers))
            if self._can_share(shared):
                return self._from_shared(recipe, shared)
        self._shared = None
        model, sink = self._live(plan)
        changed = {job.name for job in plan.jobs if self._held.get(job.name) != job}
        if _ranked(plan.jobs) != _ranked(self._held.values()):
            changed |= _ranked(plan.jobs).keys()
        self._held = {}
        self._execute(plan, sink, [job for job in plan.jobs if job.name in changed and job.name in sink])
        self._held = {job.name: job for job in plan.jobs}
        return model

    def _execute(self, plan: MergePlan, sink: LiveSink, jobs: Sequence[TensorJob]) -> None:
        execute(
            plan,
            self._checkpoints,
            sink,
            jobs=jobs,
            cache=self._cache,
            chunk=self._chunk,
            threads=self._threads,
            statistics=self._statistics,
            device=self._merge_on,
            residents=self._residents,
        )

    def _can_share(self, plan: MergePlan) -> bool:
        from evomerge.merging.live_paths import SharedLayers

        return SharedLayers.can_hold(plan)

    def _from_shared(self, recipe: Recipe, plan: MergePlan) -> nn.Module:
        from evomerge.merging.live_paths import SharedLayers

        self._sink, self._shape, self._held = None, None, {}
        if self._shared is None:
            self._model = None
            self._shared = SharedLayers(self._device)
        self._model = self._shared.model(
            plan,
            lambda sink, jobs: self._execute(plan, sink, jobs),
            generation=plan.generation or self._checkpoints[plan.donor].path,
            room=path_room(plan, _layers_of_sources(recipe, self._checkpoints)),
        )
        return self._model

    def _live(self, plan: MergePlan) -> tuple[nn.Module, LiveSink]:
        shape = (plan.config, plan.dtype)
        generation = plan.generation or self._checkpoints[plan.donor].path
        if self._model is not None and self._sink is not None and shape == self._shape:
            set_generation(self._model, generation)
            return self._model, self._sink
        self._model, self._sink, self._shape, self._held = None, None, None, {}
        model = live_model(plan.config, plan.dtype, self._device, generation=generation)
        sink = LiveSink(bind(model, plan))
        self._model, self._sink, self._shape = model, sink, shape
        return model, sink


def _ranked(jobs: Iterable[TensorJob]) -> dict[str, TensorJob]:
    """Return the jobs whose thresholds are those of all of them together, by name."""
    return {job.name: job for job in jobs if (job.values or {}).get("trim") == "global"}


def _layers_of_sources(recipe: Recipe, checkpoints: Mapping[str, Checkpoint]) -> int:
    sources = dict.fromkeys(str(hop.model or hop.merge) for hop in recipe.path or ()) or recipe.merges
    return sum(checkpoints[donor_of(recipe, source)].num_layers for source in sources)
