"""A live model whose decoder layers are run one at a time, over all sequences."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from evomerge.checkpoints import Checkpoint
from evomerge.checkpoints.model_config import DEPTH_KEYS, text_config
from evomerge.checkpoints.names import parse
from evomerge.errors import CheckpointError
from evomerge.merging.binding import bind
from evomerge.merging.execute import execute
from evomerge.merging.live import live_model
from evomerge.merging.plan import MergePlan, TensorJob, plan_merge
from evomerge.merging.sinks import LiveSink
from evomerge.recipe import Recipe
from evomerge.statistics.files import Source
from evomerge.statistics.grams import Captured, LayerGrams, capturing
from evomerge.threads import one_thread_per_operation

NAME = "model"

BATCH = 8
"""Sequences whose layer inputs are held, and added to the Gram matrices, together."""


def plan_of(checkpoint: Checkpoint) -> MergePlan:
    """Plan the model that a checkpoint is, in float32."""
    recipe = Recipe.from_dict(
        {
            "models": {NAME: str(checkpoint.path)},
            "merges": {"copy": {"method": "linear", "inputs": [NAME], "parameters": {"weight": 1.0}}},
            "output": {"dtype": "float32"},
        }
    )
    return plan_merge(recipe, {NAME: checkpoint})


class LayeredModel:
    """A live float32 model that can be filled and run layer by layer.

    Sequences are run one at a time and unpadded. What layers are given besides hidden states (masks, rotary
    embeddings) depends on a sequence's length alone; it is recorded once per length, from the model's own
    forward pass with its layers left out.

    Args:
        config: a Hugging Face config.
        plan: names and shapes of its tensors.
        device: where it lives.

    Attributes:
        model: the live model.
        tensors: its weights by on-disk name: views of the live storage.
        layers: its decoder layers.
    """

    def __init__(self, plan: MergePlan, device: torch.device | str = "cpu") -> None:
        self.model = live_model(plan.config, torch.float32, device)
        self.tensors = bind(self.model, plan)
        self.layers = _decoder_layers(self.model, plan.config)
        self._device = torch.device(device)
        self._sink = LiveSink(self.tensors)
        self._extras: dict[int, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}

    def fill(
        self,
        plan: MergePlan,
        checkpoints: Mapping[str, Checkpoint],
        jobs: Sequence[TensorJob] | None = None,
        statistics: Mapping[str, Source] | None = None,
    ) -> None:
        """Write a plan's tensors, or some of them, into the live model."""
        execute(plan, checkpoints, self._sink, jobs=jobs, statistics=statistics)

    @torch.no_grad()
    def embed(self, ids: Tensor) -> Tensor:
        """Return the hidden states that enter the first layer, ``(1, T, d)``, on the CPU."""
        entered: list[Tensor] = []
        extras: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def recorder(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            entered.append(hidden)
            extras.append((args, kwargs))
            return hidden

        with _replaced(self.layers, recorder):
            self.model(input_ids=ids.to(self._device), use_cache=False)
        if len(entered) != len(self.layers):
            raise _unknown(self.model)
        self._extras.setdefault(ids.shape[1], extras)
        return entered[0].cpu()

    @torch.no_grad()
    def step(self, index: int, hidden: Tensor) -> Tensor:
        """Run one layer on one sequence's hidden states ``(1, T, d)``; returns those that leave it."""
        args, kwargs = self._extras[hidden.shape[1]][index]
        out = self.layers[index](hidden.to(self._device), *args, **kwargs)
        if not isinstance(out, Tensor) or out.shape != hidden.shape:
            raise _unknown(self.model)
        return out.cpu()

    def run(self, index: int, states: Sequence[Tensor], grams: LayerGrams | None = None) -> Iterator[Tensor]:
        """Run one layer on all sequences' hidden states; yields those that leave it, in order.

        On a CPU several sequences are run at a time, each by one thread; the bits do not depend on how many.

        Args:
            index: of the layer.
            states: ``(1, T, d)`` each.
            grams: takes the Gram matrices of the inputs of the layer's linear layers.
        """
        with ExitStack() as stack:
            pool = stack.enter_context(_threads()) if self._device.type == "cpu" else None
            captured = None
            if grams is not None:
                captured = stack.enter_context(capturing(self.layers[index], self.tensors))

            def work(hidden: Tensor) -> tuple[Tensor, Captured | None]:
                out = self.step(index, hidden)
                return out, None if captured is None else captured()

            for start in range(0, len(states), BATCH):
                batch = states[start : start + BATCH]
                done = list(map(work, batch) if pool is None else pool.map(work, batch))
                if grams is not None:
                    grams.add([given for _, given in done if given is not None], pool)
                yield from (out for out, _ in done)

    @torch.no_grad()
    def check(self, ids: Tensor, hidden: Tensor) -> None:
        """Raise CheckpointError unless a whole forward pass gives what the steps have given.

        Args:
            ids: a sequence.
            hidden: what the last layer gave for it.
        """
        left: list[Tensor] = []
        handle = self.layers[-1].register_forward_hook(lambda module, inputs, output: left.append(output))
        try:
            self.model(input_ids=ids.to(self._device), use_cache=False)
        finally:
            handle.remove()
        whole = left[0].cpu() if isinstance(left[0], Tensor) else torch.empty(0)
        if whole.shape != hidden.shape or not (whole - hidden).norm() <= 1e-3 * whole.norm():
            raise _unknown(self.model)


def jobs_at(plan: MergePlan, layer: int | None) -> list[TensorJob]:
    """Return a plan's jobs for one layer; None: for all that is in no layer."""
    wanted = [job for job in plan.jobs if isinstance(parse(job.name).position, int) == (layer is not None)]
    return [job for job in wanted if layer is None or parse(job.name).position == layer]


@contextmanager
def _threads() -> Iterator[Executor]:
    """Give a pool with a thread for each CPU, in which every operation keeps to its thread."""
    with one_thread_per_operation(), ThreadPoolExecutor(_cpus()) as pool:
        yield pool


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _replaced(layers: Sequence[nn.Module], forward: Any) -> Iterator[None]:
    """Let modules do something else for a while."""
    for layer in layers:
        layer.forward = forward
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _decoder_layers(model: Any, config: Mapping[str, Any]) -> list[nn.Module]:
    text = text_config(config)
    count = next((text[key] for key in DEPTH_KEYS if key in text), None)
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    lists = [
        module
        for module in decoder.modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and isinstance(module[0], nn.Module)
    ]
    if not lists:
        raise _unknown(model)
    return list(lists[0])


def _unknown(model: Any) -> CheckpointError:
    return CheckpointError(
        f"the layers of {type(model).__name__} cannot be run one after another, so that the Gram matrices of "
        "their inputs are out of reach; use another merge method"
    )
