"""A live Hugging Face model whose weights are replaced in place, one candidate after another."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
    PretrainedConfig,
)
from transformers import __version__ as transformers_version
from transformers.initialization import no_init_weights

from evomerge.checkpoints import Checkpoint
from evomerge.errors import CheckpointError
from evomerge.merging.binding import bind
from evomerge.merging.execute import CHUNK, execute
from evomerge.merging.plan import MergePlan, TensorJob, plan_merge
from evomerge.merging.sinks import LiveSink
from evomerge.merging.streams import Residents
from evomerge.methods import TensorCache
from evomerge.recipe import Recipe
from evomerge.statistics.files import Source
from evomerge.statistics.needed import provide


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
    settings = {key: value for key, value in copy.deepcopy(dict(config)).items() if key != "auto_map"}
    kind = settings.pop("model_type", None)
    if kind not in CONFIG_MAPPING:
        raise CheckpointError(
            f"model type '{kind}' cannot be built: this version of transformers ({transformers_version}) does "
            "not know it; such models merge to disk, and cannot be scored in memory"
        )
    try:
        built = AutoConfig.for_model(kind, **settings)
        with no_init_weights(), torch.device(device):
            model = _auto_class(built).from_config(built, dtype=dtype, trust_remote_code=False)
    except (ValueError, KeyError, StrictDataclassError) as error:
        raise CheckpointError(
            f"model type '{kind}' cannot be built as a causal language model: {str(error).splitlines()[0]}"
        ) from None
    model.tie_weights()
    if isinstance(generation, Mapping):
        model.generation_config = GenerationConfig.from_dict(dict(generation))
    elif generation is not None and (generation / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(generation)
    model.requires_grad_(False)
    model.eval()
    return model  # type: ignore[no-any-return]


def _auto_class(config: PretrainedConfig) -> Any:
    """Return the class that builds a model with a causal head: multimodal ones may have a class of their own."""
    if type(config) in AutoModelForCausalLM._model_mapping:
        return AutoModelForCausalLM
    if type(config) in AutoModelForImageTextToText._model_mapping:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


class Materializer:
    """Holds the parents and one live model, and turns recipes into its weights.

    Args:
        checkpoints: the parents, by the names that recipes use.
        device: where the live model is; the parents stay in host memory.
        chunk, threads: as for `evomerge.merging.execute.execute`.
        merge_on: a device that does the arithmetic and holds the parents, as far as they fit; None: the CPU,
            whose bits are those of an export.

    What does not depend on the candidate (reductions over the parents) is computed once. Tensors whose job
    is the same as in the recipe before are left as they are.
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
        self._statistics: dict[str, Source] = {}

    @property
    def model(self) -> nn.Module | None:
        """The live model, or None before the first recipe."""
        return self._model

    def materialize(self, recipe: Recipe) -> nn.Module:
        """Write a recipe's weights into the live model and return it.

        The same module is returned each time while the output's config stays the same; otherwise the old one
        is let go first and a new one built.

        Raises:
            CandidateFailed: merged weights are not finite; the live weights are then undefined until the next
                recipe has been materialised.
            UserError: the recipe does not fit the parents.
        """
        plan = plan_merge(recipe, self._checkpoints)
        if any(key not in self._statistics for job in plan.jobs for key in job.statistics):
            self._statistics |= provide(recipe, self._checkpoints, device=str(self._device))
        model, sink = self._live(plan)
        changed = [job for job in plan.jobs if job.name in sink and self._held.get(job.name) != job]
        self._held = {}
        execute(
            plan,
            self._checkpoints,
            sink,
            jobs=changed,
            cache=self._cache,
            chunk=self._chunk,
            threads=self._threads,
            statistics=self._statistics,
            device=self._merge_on,
            residents=self._residents,
        )
        self._held = {job.name: job for job in plan.jobs}
        return model

    def _live(self, plan: MergePlan) -> tuple[nn.Module, LiveSink]:
        shape = (plan.config, plan.dtype)
        if self._model is not None and self._sink is not None and shape == self._shape:
            return self._model, self._sink
        self._model, self._sink, self._shape, self._held = None, None, None, {}
        generation = plan.generation or self._checkpoints[plan.donor].path
        model = live_model(plan.config, plan.dtype, self._device, generation=generation)
        sink = LiveSink(bind(model, plan))
        self._model, self._sink, self._shape = model, sink, shape
        return model, sink
