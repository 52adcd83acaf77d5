"""The vLLM host: merged tensors go straight into one live vLLM model."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from evomerge.checkpoints.model_config import positions
from evomerge.config import Engine as EngineConfig
from evomerge.engines import vllm_options
from evomerge.engines.host import LayerEvaluations
from evomerge.engines.vllm import SPARE_TOKENS, Sentinel, VLLMEngine
from evomerge.engines.vllm_check import Kind, answer_from_disk, write_weights
from evomerge.errors import CandidateFailed, EngineLost, UserError
from evomerge.recipe import Recipe

if TYPE_CHECKING:
    from evomerge.checkpoints import Checkpoint
    from evomerge.merging import MergePlan


_NOT_IN_PLACE = (
    "this version of vLLM does not take weights of this kind of model in place (write engine.type: hf)"
)


class VLLMHost:
    """Materialises recipes inside one live vLLM model; see `Host`.

    The engine is started with the first recipe, on a folder with config and tokenizer but no weights; each
    recipe's tensors are then merged one after another and handed to vLLM's own reload, which writes them
    into the storage that the model has. After each swap a sentinel is asked: the same recipe must answer as
    it did before. The first time that a kind of model is held, its first answer must also be that of a vLLM
    that reads the same weights from disk (`vllm_check`).

    Args:
        settings: `device`, `batch_tokens` and `max_length` already decided.
        checkpoints: the parents, by the names that recipes use.
        tokenizer: of the merged models.
        threads: tensors that are merged at the same time.

    Raises:
        UserError: vLLM is not installed.
    """

    def __init__(
        self,
        settings: EngineConfig,
        checkpoints: Mapping[str, Checkpoint],
        tokenizer: Any,
        *,
        threads: int = 1,
    ) -> None:
        vllm_options.require()
        from evomerge.merging.outflow import Outflow

        self._settings = settings
        self._checkpoints = checkpoints
        self._tokenizer = tokenizer
        self._outflow = Outflow(checkpoints, threads=threads)
        self._engine: VLLMEngine | None = None
        self._shape: tuple[dict[str, Any], torch.dtype] | None = None
        self._held = ""
        self._sentinels: dict[str, Sentinel] = {}

    def hold(self, recipe: Recipe, branches: Collection[int] = ()) -> VLLMEngine:
        """See `Host.hold`; a new engine is started only where the model's shape changes.

        Layer paths share no computation: vLLM runs all layers of a model as one.

        Raises:
            EngineLost: vLLM failed, or answers otherwise than it did before with the same weights.
        """
        if self._engine is not None and self._engine.alive and self._held == recipe.hash:
            return self._engine
        self._held = ""
        plan = self._outflow.plan(recipe)
        if self._engine is None or not self._engine.alive or (plan.config, plan.dtype) != self._shape:
            engine, found = self._start(plan)
        else:
            engine = self._engine
            engine.set_generation(self._generation(plan))
            found = self._swap(engine, plan)
        known = self._sentinels.setdefault(recipe.hash, found)
        if not known.agrees(found, engine.tolerance):
            engine.alive = False
            raise EngineLost("vLLM answers otherwise than it did before with the same weights")
        self._held = recipe.hash
        return engine

    @property
    def layer_evaluations(self) -> LayerEvaluations:
        """See `Host.layer_evaluations`; vLLM does not count them."""
        return LayerEvaluations()

    def close(self) -> None:
        """See `Host.close`."""
        engine, self._engine, self._shape, self._held = self._engine, None, None, ""
        if engine is not None:
            engine.close()

    def _swap(self, engine: VLLMEngine, plan: MergePlan) -> Sentinel:
        """Give the engine a plan's weights; return what it then says."""
        tensors = _Whole(plan, self._outflow.tensors(plan))
        engine.swap(iter(tensors), tied=bool(plan.config.get("tie_word_embeddings")))
        if tensors.failure is not None:
            raise tensors.failure
        return engine.sentinel()

    def _start(self, plan: MergePlan) -> tuple[VLLMEngine, Sentinel]:
        """Start an engine with a plan's weights; the first of its kind is compared with weights from disk.

        Raises:
            UserError: vLLM does not know the model, or does not take its weights in place.
        """
        self.close()
        donor = self._checkpoints[plan.donor].path
        if plan.copied:
            raise UserError(
                f"{donor}: the vllm engine scores text models, and this one has parts outside its language model; "
                "write engine.type: hf"
            )
        kind = Kind(
            config=plan.config,
            dtype=str(plan.dtype).removeprefix("torch."),
            device=self._settings.device,
            batch_tokens=int(self._settings.batch_tokens),
            max_length=_max_length(self._settings, plan.config),
            options=self._settings.options,
        )
        marker = kind.marker
        with tempfile.TemporaryDirectory(prefix="evomerge-vllm-") as place:
            folder = Path(place)
            _write_skeleton(folder, plan, self._tokenizer)
            expected = None
            if not marker.exists():
                write_weights(folder, self._outflow.tensors(plan))
                expected = answer_from_disk(folder, kind)
            engine = VLLMEngine(
                folder,
                self._tokenizer,
                generation_config=self._generation(plan),
                dtype=plan.dtype,
                device=kind.device,
                batch_tokens=kind.batch_tokens,
                max_length=kind.max_length,
                options=kind.options,
            )
        # Theirs to close from here on, also where the swap fails.
        self._engine, self._shape = engine, (plan.config, plan.dtype)
        try:
            found = self._swap(engine, plan)
        except EngineLost as error:
            if expected is None:
                raise
            raise UserError(f"{donor}: {_NOT_IN_PLACE}: {error}") from None
        if expected is not None:
            if not expected.agrees(found, engine.tolerance):
                self.close()
                raise UserError(
                    f"{donor}: {_NOT_IN_PLACE}: it answers otherwise than with the same weights read from disk"
                )
            marker.parent.mkdir(parents=True, exist_ok=True)
            marker.touch()
        return engine, found

    def _generation(self, plan: MergePlan) -> Any:
        from transformers import GenerationConfig

        if plan.generation is not None:
            return GenerationConfig.from_dict(dict(plan.generation))
        folder = self._checkpoints[plan.donor].path
        if (folder / "generation_config.json").is_file():
            return GenerationConfig.from_pretrained(folder)
        return None


class _Whole:
    """All of a plan's tensors, whatever becomes of the merge.

    A layer of which vLLM has got a part would wait for the rest through every later reload. Once a merge has
    failed, zeros stand in for what is missing, and `failure` says why.
    """

    def __init__(self, plan: MergePlan, merged: Iterator[tuple[str, torch.Tensor]]) -> None:
        self._plan = plan
        self._merged = merged
        self.failure: CandidateFailed | None = None

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        given = set()
        try:
            for name, tensor in self._merged:
                given.add(name)
                yield name, tensor
        except CandidateFailed as failure:
            self.failure = failure
        for job in self._plan.jobs:
            if job.name not in given:
                yield job.name, torch.zeros(job.shape, dtype=job.dtype)


def _write_skeleton(folder: Path, plan: MergePlan, tokenizer: Any) -> None:
    """Write a model folder without weights."""
    config = {key: value for key, value in plan.config.items() if key != "auto_map"}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer.save_pretrained(folder)


def _max_length(settings: EngineConfig, config: Mapping[str, Any]) -> int:
    """Return the longest input: vLLM needs `SPARE_TOKENS` of the model's positions behind it."""
    most = positions(config)
    wanted = settings.max_length or most or 2048
    length = wanted if most is None else min(wanted, most - SPARE_TOKENS)
    if length < 1:
        raise UserError(f"engine.max_length: a model of {most} positions is too short for vLLM")
    return length
