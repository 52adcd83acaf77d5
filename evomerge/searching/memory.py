"""What a search holds where, how long a swap of the weights takes, and the refusal of what cannot fit."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from evomerge.checkpoints.adapted import AdaptedCheckpoint
from evomerge.config import Config
from evomerge.engines.memory import WorkingMemory, working_memory
from evomerge.errors import UserError
from evomerge.evaluation.requests import Generation, Rolling
from evomerge.memory import available_memory, copy_bandwidth
from evomerge.merging import MergePlan, plan_merge
from evomerge.merging.paths import path_room
from evomerge.spaces import PathSpace
from evomerge.workers.executor import times

if TYPE_CHECKING:
    from evomerge.searching.setup import Setup

PROCESS_BYTES = 600 << 20
"""What a worker's process takes before it has a model: Python, torch, transformers, lm-eval."""
CHARACTERS_PER_TOKEN = 3.0


@dataclass(frozen=True)
class Memory:
    """What will be where. All sizes in bytes.

    Attributes:
        parents: size of each model's tensors, by name.
        parent_bytes: of the files that they lie in, each counted once; all workers of a machine share them.
        parents_in: ``page cache``, or ``disk`` where they exceed what is free.
        workers: how many there will be; None on a cluster, which decides that itself.
        live_bytes: of the model that each worker holds.
        live_in: ``host memory`` or ``GPU memory``.
        working: what an engine works in besides, about.
        process_bytes: what else a worker's process takes, about.
        host_available: of this machine; None if unknown.
        gpus: memory of each GPU here.
        workers_per_gpu: how many share one.
        swap_bytes: read and written when a worker goes from one candidate to the next.
        bandwidth: bytes per second that one thread moves here; for a GPU about as many go to it.
        swap_seconds: `swap_bytes` at that rate; a method that computes more than it moves takes longer.
        longest_path: layers of the longest path, where candidates are layer paths; sizes are then the most that there
            can be. Paths share the layers that they have in common; each hop has keys and values of its own.
        measured_swap_seconds, measured_swap_share: of a run that has begun: the mean, and its share in the time
            that workers spent.
    """

    parents: Mapping[str, int]
    parent_bytes: int
    parents_in: str
    workers: int | None
    live_bytes: int
    live_in: str
    working: WorkingMemory
    process_bytes: int
    host_available: int | None
    gpus: tuple[int, ...]
    workers_per_gpu: int
    swap_bytes: int
    bandwidth: float
    swap_seconds: float
    longest_path: int | None = None
    measured_swap_seconds: float | None = None
    measured_swap_share: float | None = None

    @property
    def worker_host_bytes(self) -> int:
        """What a worker takes of the host's memory, about."""
        on_host = self.live_bytes + self.working.total if self.live_in == "host memory" else 0
        return on_host + self.process_bytes

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)

    def lines(self) -> list[str]:
        """Return two lines of text."""
        works = self.working
        cache = "" if works.keys_and_values is None else f"{size(works.keys_and_values)} keys and values, "
        count = "each worker" if self.workers is None else f"{self.workers} x"
        free = ""
        if self.live_in == "host memory" and self.host_available is not None:
            free = f", {size(self.host_available)} available"
        elif self.gpus:
            free = f", {' + '.join(map(size, self.gpus))} there"
        kept = "kept in the page cache" if self.parents_in == "page cache" else "read from disk each time"
        most = "" if self.longest_path is None else "at most "
        swap = f"moves {most}{size(self.swap_bytes)}, about {_seconds(self.swap_seconds)} at {size(self.bandwidth)}/s"
        if self.measured_swap_seconds is not None and self.measured_swap_share is not None:
            swap = (
                f"takes {_seconds(self.measured_swap_seconds)} here, {self.measured_swap_share:.0%} of a "
                "candidate's time so far"
            )
        return [
            f"  memory      {len(self.parents)} parents, {size(self.parent_bytes)} on disk, {kept}; {count} live model "
            f"{most}{size(self.live_bytes)} in {self.live_in}, {self._depth}with about {cache}"
            f"{size(works.logits)} logits, "
            f"{size(works.activations)} activations{self._held}{free}",
            f"  swap        {swap}",
        ]

    @property
    def _depth(self) -> str:
        return "" if self.longest_path is None else f"paths of up to {self.longest_path} layers, "

    @property
    def _held(self) -> str:
        held = {"shared hops": self.working.beginnings, "reordered weights": self.working.reordered}
        return "".join(f", {size(nbytes)} {name}" for name, nbytes in held.items() if nbytes)

    def warnings(self) -> list[str]:
        """Return what may go wrong, one sentence each."""
        said = []
        if self.parents_in == "disk":
            said.append(
                f"the parents' {size(self.parent_bytes)} do not fit into the memory that is left beside the workers: "
                "each swap reads them from disk; lower workers.count, or use a machine with more memory"
            )
        on_host = self.live_in == "host memory"
        needed = (self.workers or 1) * self.worker_host_bytes
        if self.host_available is not None and self.workers and needed > self.host_available:
            said.append(
                f"{self.workers} workers take about {size(needed)} of host memory and {size(self.host_available)} are "
                "available; they may run out of it: lower workers.count"
                + (" or engine.batch_tokens" if on_host else "")
            )
        return said


def plan_memory(setup: Setup, *, measured: tuple[float, float] | None = None) -> Memory:
    """Work out what a search holds where.

    Args:
        setup: of the search.
        measured: mean seconds of a swap and its share of the workers' time, where the run knows them.
    """
    config = setup.config
    space = setup.paths or setup.space
    if isinstance(space, PathSpace):
        assert config.layers is not None, "the config searches layer paths"
        searched, longest = config.layers, space.longest
        plan = plan_merge(space.probe(scale=1.0 if searched.scale == 1.0 else 0.5), setup.checkpoints)
        layers = len(searched.pool) * setup.checkpoints[plan.donor].num_layers
        live = path_room(plan, layers, hops=longest)
    else:
        longest = None
        plan = plan_merge(setup.baselines["initial"], setup.checkpoints)
        live = plan.nbytes
    working = _working(setup, plan, longest)
    gpus = _gpus() if config.engine.device == "cuda" else ()
    per_gpu = max(1, int(1 / _gpus_per_worker(config))) if gpus else 1
    available = available_memory() if config.workers.address is None else None
    on_gpu = config.engine.device == "cuda"
    process = 0 if config.workers.type == "local" else PROCESS_BYTES
    on_host = process + (0 if on_gpu else live + working.total)
    workers = _workers(config, gpus, on_host, available)
    parents = _file_bytes(setup)
    left = None if available is None else available - (workers or 1) * on_host
    moved = sum(_moved(plan, setup))
    bandwidth = copy_bandwidth()
    return Memory(
        parents={name: checkpoint.nbytes for name, checkpoint in setup.checkpoints.items()},
        parent_bytes=parents,
        parents_in="disk" if left is not None and parents > left else "page cache",
        workers=workers,
        live_bytes=live,
        live_in="GPU memory" if on_gpu else "host memory",
        working=working,
        process_bytes=process,
        host_available=available,
        gpus=gpus,
        workers_per_gpu=per_gpu,
        swap_bytes=moved,
        bandwidth=bandwidth,
        swap_seconds=(moved + (2 * plan.nbytes if on_gpu else 0)) / bandwidth,
        longest_path=longest,
        measured_swap_seconds=None if measured is None else measured[0],
        measured_swap_share=None if measured is None else measured[1],
    )


def check_fits(memory: Memory) -> None:
    """Refuse live models that exceed the memory they are to be in, be it only with the texts that they read.

    Raises:
        UserError: with what to change.
    """
    gpu = memory.live_in == "GPU memory"
    together = memory.workers_per_gpu if gpu else memory.workers or 1
    room = min(memory.gpus, default=None) if gpu else memory.host_available
    least = memory.live_bytes + memory.working.one_text
    if room is None or together * least <= room:
        return
    models = f"{together} live model{'s' if together > 1 else ''} of {size(memory.live_bytes)}"
    if together * memory.live_bytes <= room:
        depth = "" if memory.longest_path is None else f" in a path of {memory.longest_path} layers"
        each = "each with" if together > 1 else "with"
        models += f", {each} {size(memory.working.one_text)} of keys and values of the longest text{depth},"
    fit = room // least
    if gpu:
        raise UserError(
            f"workers.gpus: {models} cannot fit into a GPU of {size(room)}; "
            + ("give each worker a larger share of it" if fit else _smaller(memory, room))
        )
    raise UserError(
        f"workers.count: {models} cannot fit into the {size(room)} of host memory that are available; "
        + (f"lower it to {fit} or less" if fit else _smaller(memory, room))
    )


def workers_that_fit(setup: Setup) -> int | None:
    """Return how many workers ``count: auto`` means on this machine; None on a cluster."""
    return plan_memory(setup).workers


def size(number: float) -> str:
    """Return a number of bytes in words, in decimal units."""
    for unit in ("B", "KB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"


def _smaller(memory: Memory, room: int) -> str:
    if memory.live_bytes > room:
        shorter = ""
    elif memory.longest_path is None:
        shorter = "set a shorter engine.max_length, "
    else:
        shorter = "lower max_layers of the space, set a shorter engine.max_length, "
    return (
        f"{shorter}write a shorter number format (output.dtype: bfloat16), merge smaller models, or use a machine with "
        f"more {memory.live_in}"
    )


def _seconds(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 100 else f"{seconds:.0f} s"


def _working(setup: Setup, plan: MergePlan, layers: int | None) -> WorkingMemory:
    prompts = [0]
    grown = [0]
    for request in setup.suite.requests():
        text = request.text if isinstance(request, Rolling) else request.context
        prompts.append(len(text))
        if isinstance(request, Generation):
            grown.append(math.ceil(len(text) / CHARACTERS_PER_TOKEN) + request.max_tokens)
    longest = int(setup.config.engine.max_length or 2048)
    read = sum(min(longest, math.ceil(length / CHARACTERS_PER_TOKEN)) for length in prompts)
    share = setup.items_per_candidate / max(1, len(setup.items))
    return working_memory(
        setup.config.engine,
        setup.checkpoints[plan.donor].text_config,
        plan.dtype,
        growing_tokens=min(longest, max(grown)),
        prefix_tokens=min(longest, math.ceil(max(prompts) / CHARACTERS_PER_TOKEN)),
        layers=layers,
        shared_tokens=0 if layers is None else math.ceil(read * share),
    )


def _file_bytes(setup: Setup) -> int:
    """Return the size of all files that parents' tensors lie in, shared ones once."""
    tensors: dict[tuple[str, int], int] = {}
    for checkpoint in setup.checkpoints.values():
        infos = list(checkpoint.tensors.values())
        if isinstance(checkpoint, AdaptedCheckpoint):
            infos += checkpoint.adapter.tensors.values()
        for info in infos:
            tensors[str(info.file), info.offset] = info.nbytes
    return sum(tensors.values())


def _moved(plan: MergePlan, setup: Setup) -> list[int]:
    """Return what is read and written for each tensor of the initial merge."""
    moved = []
    for job in plan.jobs:
        parents = plan.parents(job, setup.checkpoints)
        read = dict.fromkeys([*([job.base] if job.base else []), *job.inputs])
        sizes = (parents[name].tensors[job.source_in(name)].nbytes for name in read)
        moved.append(sum(sizes) + job.nbytes)
    return moved


def _workers(config: Config, gpus: tuple[int, ...], on_host: int, available: int | None) -> int | None:
    settings = config.workers
    if settings.type == "local":
        return 1
    if settings.address is not None:
        return None
    if settings.count != "auto":
        return int(settings.count)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = times(settings.cpus, cores)
    if gpus:
        count = min(count, times(_gpus_per_worker(config), len(gpus)))
    if available is not None:
        count = min(count, available // max(1, on_host))
    return max(1, count)


def _gpus_per_worker(config: Config) -> float:
    share = config.workers.gpus
    return 1.0 if share == "auto" or not share else float(share)


def _gpus() -> tuple[int, ...]:
    import torch

    count = torch.cuda.device_count()
    return tuple(int(torch.cuda.get_device_properties(i).total_memory) for i in range(count))
