"""Carrying out a plan: tensor by tensor, chunk by chunk, into a sink."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import cast

import torch

from evomerge.checkpoints import Checkpoint
from evomerge.errors import CandidateFailed
from evomerge.merging.plan import MergePlan, TensorJob
from evomerge.merging.sinks import Sink
from evomerge.merging.streams import Arena, DeviceTensor, Residents, StreamedTensor
from evomerge.merging.survey import global_thresholds
from evomerge.methods import TensorCache, TensorMerge, get_method
from evomerge.methods.operands import Operands
from evomerge.statistics.files import Source
from evomerge.statistics.jobs import statistics_of
from evomerge.threads import one_thread_per_operation

CHUNK = 1 << 18

Progress = Callable[[int, int], None]
"""Called with (bytes written so far, bytes in all), from any thread but never from two at once."""


class NonFinite(CandidateFailed):
    """A merged weight is NaN or infinite, or too large for the output's number format."""


def execute(
    plan: MergePlan,
    checkpoints: Mapping[str, Checkpoint],
    sink: Sink,
    *,
    jobs: Sequence[TensorJob] | None = None,
    cache: TensorCache | None = None,
    progress: Progress | None = None,
    chunk: int = CHUNK,
    threads: int = 1,
    stream: bool = False,
    statistics: Mapping[str, Source] | None = None,
    device: torch.device | None = None,
    residents: Residents | None = None,
) -> None:
    """Compute the plan's tensors and write them to a sink.

    Each chunk is merged, multiplied by the job's factor and shifted in float32 (float64 if an operand is), rounded
    once to the output's number format, checked and written; a few chunks per thread are all that is held. The
    bytes do not depend on `chunk`, `threads` and `stream`.

    Args:
        plan: from `plan_merge`.
        checkpoints: the plan's models, by name.
        sink: where the tensors go.
        jobs: the plan's jobs to carry out; all by default.
        cache: keeps what does not depend on the candidate, for the next plan over the same parents.
        progress: told after each piece.
        chunk: elements per chunk.
        threads: tensors worked on at the same time.
        stream: read the parents chunk by chunk instead of mapping their files, so that resident memory stays
            bounded whatever the size. For parents that are read once.
        statistics: those that the jobs name, by key.
        device: where the arithmetic is done (of methods that can; the CPU does the others). Results agree with
            the CPU's to rounding.
        residents: parents that stay on the device from one call to the next.

    Raises:
        NonFinite: the first tensor, in the plan's order, with a weight that is not a finite number.
    """
    todo = plan.jobs if jobs is None else jobs
    total = sum(job.nbytes for job in todo)
    done = 0
    lock = threading.Lock()

    arenas = threading.local()
    opened: list[Arena] = []

    def read(checkpoint: Checkpoint, tensor: str) -> torch.Tensor:
        if stream or not checkpoint.mapped(tensor):
            # The methods and the copy below only slice.
            if not hasattr(arenas, "arena"):
                arenas.arena = Arena(pinned=device is not None and device.type == "cuda")
                opened.append(arenas.arena)
            arenas.slot += 1
            return cast(torch.Tensor, StreamedTensor(checkpoint, tensor, arenas.arena, arenas.slot))
        return checkpoint.tensor(tensor).reshape(-1)

    def read_there(checkpoint: Checkpoint, tensor: str) -> torch.Tensor:
        assert device is not None
        flat = read(checkpoint, tensor)
        there = DeviceTensor(flat, device) if residents is None else residents.get(checkpoint, tensor, flat)
        return cast(torch.Tensor, there)

    def work(job: TensorJob) -> None:
        nonlocal done
        arenas.slot = -1
        there = device is not None and job.method is not None and get_method(job.method).on_device
        parents = plan.parents(job, checkpoints)
        write = _writer(
            job, parents, read_there if there else read, cache, thresholds.get(job.name), statistics or {}
        )
        for start, piece in sink.pieces(job.name, job.numel, job.dtype, chunk):
            if not write(start, start + piece.numel(), piece):
                bad = piece[~torch.isfinite(piece)][0].item()
                raise NonFinite(f"{job.name}: the merged weights are not finite ({bad})")
            if progress is not None:
                with lock:
                    done += piece.nbytes
                    progress(done, total)

    def operands_of(job: TensorJob) -> Operands:
        arenas.slot = -1
        parents = plan.parents(job, checkpoints)
        assert job.base is not None, "methods that trim need a base"
        base, *inputs = (read(parents[model], job.source_in(model)) for model in (job.base, *job.inputs))
        return Operands(base, inputs)

    def run(function: Callable[[TensorJob], None], jobs: Iterable[TensorJob]) -> None:
        with torch.no_grad(), one_thread_per_operation():
            if threads <= 1:
                for job in jobs:
                    function(job)
            else:
                _in_threads(function, jobs, threads)

    try:
        thresholds = global_thresholds(plan.jobs, operands_of, run, cache)
        run(work, todo)
    finally:
        for arena in opened:
            arena.close()


def _in_threads(work: Callable[[TensorJob], None], jobs: Iterable[TensorJob], threads: int) -> None:
    """Run the jobs in a pool; of several failures the first in the plan's order is raised."""

    def quiet(job: TensorJob) -> None:
        with torch.no_grad():
            work(job)

    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(quiet, job) for job in jobs]
        try:
            for future in futures:
                future.result()
        finally:
            for future in futures:
                future.cancel()


def _writer(
    job: TensorJob,
    parents: Mapping[str, Checkpoint],
    read: Callable[[Checkpoint, str], torch.Tensor],
    cache: TensorCache | None,
    thresholds: Sequence[float] | None,
    statistics: Mapping[str, Source],
) -> Callable[[int, int, torch.Tensor], bool]:
    """Return a function that writes a range of the job's elements and tells whether all are finite."""
    if job.method is None:
        return _copier(job, parents[job.inputs[0]], read)
    inputs = [read(parents[model], job.source_in(model)) for model in job.inputs]
    base = None if job.base is None else read(parents[job.base], job.source_in(job.base))
    merge = TensorMerge(
        job.method,
        base,
        inputs,
        job.values or {},
        masks=job.masks,
        cache=cache,
        key=job.key,
        dialect=job.dialect,
        shape=job.shape,
        transposed=job.transposed,
        thresholds=thresholds,
        factor=job.factor,
        statistics=statistics_of(job, parents, statistics),
    )
    return merge.write if job.shift == 0.0 else _shifted(merge.write, job.shift)


def _shifted(
    write: Callable[[int, int, torch.Tensor], bool], shift: float
) -> Callable[[int, int, torch.Tensor], bool]:
    """Return a writer that adds a number before the only rounding."""

    def add(start: int, stop: int, out: torch.Tensor) -> bool:
        values = torch.empty_like(out, dtype=torch.promote_types(out.dtype, torch.float32))
        finite = write(start, stop, values)
        out.copy_(values.add_(shift))
        return finite and bool(torch.isfinite(out).all())

    return add


def _copier(
    job: TensorJob, parent: Checkpoint, read: Callable[[Checkpoint, str], torch.Tensor]
) -> Callable[[int, int, torch.Tensor], bool]:
    name = job.source_in(job.inputs[0])
    if job.factor == 1.0 and parent.read_dtype(name) == job.dtype:

        def copy(start: int, stop: int, out: torch.Tensor) -> bool:
            if out.device.type == "cpu":
                parent.read_into(name, start, out)
            else:
                out.copy_(parent.read_into(name, start, torch.empty(out.numel(), dtype=out.dtype)))
            return True

        return copy
    flat = read(parent, name)

    def convert(start: int, stop: int, out: torch.Tensor) -> bool:
        finite = True
        for begin in range(start, stop, CHUNK):
            end = min(begin + CHUNK, stop)
            values = flat[begin:end]
            if job.factor != 1.0:
                values = values.to(torch.promote_types(values.dtype, torch.float32)).mul(job.factor)
            if job.shift != 0.0:
                values.add_(job.shift)
            part = out[begin - start : end - start].copy_(values)
            finite = finite and bool(torch.isfinite(part).all())
        return finite

    return convert
