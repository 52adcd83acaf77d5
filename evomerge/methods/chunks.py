"""Running a merge method over one tensor, chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from evomerge.errors import nearest
from evomerge.methods.cache import TensorCache
from evomerge.methods.kernels import Kernel, Values
from evomerge.methods.masks import MaskKey
from evomerge.methods.operands import STRIP, Operands
from evomerge.methods.registry import MergeMethod, get_method
from evomerge.methods.statistics import Statistic


def merge_chunks(
    method: str,
    base: Tensor | None,
    inputs: Sequence[Tensor],
    values: Mapping[str, float | bool | str | tuple[float, ...]],
    *,
    masks: MaskKey | None = None,
    cache: TensorCache | None = None,
    key: str = "",
    chunk: int = 1 << 18,
    dialect: str = "paper",
    shape: Sequence[int] | None = None,
    statistics: Sequence[Statistic | Tensor] | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Merge one tensor; yield ``(start element, flat chunk)`` in order.

    Chunks are float32 (float64 if an operand is) and not yet rounded to an output dtype. The buffer is
    reused: a chunk is valid until the next one is asked for. The bits depend neither on `chunk` nor on the
    number of threads nor on `cache`.

    Args:
        method: registered name.
        base: the base's tensor; None where the method does not use one. A base that counts as an input is
            given here alone.
        inputs: each input's tensor, of the base's shape; float64, float32, bfloat16 or float16. Only read.
        values: the method's parameters. Expert-scope ones are tuples, one number per input (a scalar serves
            all); those that are absent take their defaults.
        masks: what the masks of a random method depend on.
        cache: keeps reductions that do not depend on `values`.
        key: names this tensor and these operands in the cache.
        chunk: elements per chunk.
        dialect: the method's variant.
        shape: of the tensor, for methods that see rows or matrices; by default that of the first input.
        statistics: one per input, which the method weighs the inputs with; a bare tensor (a diagonal Fisher
            information, a Gram matrix of a layer's inputs) counts as the whole model's. None where there is none.

    Raises:
        ValueError: the arguments do not fit the method.
        CandidateFailed: these values have no merge (weights that cannot be normalised).
    """
    chosen = get_method(method)
    if dialect not in chosen.kernels:
        raise ValueError(f"{method} has no dialect '{dialect}' (known: {', '.join(chosen.dialects)})")
    names = tuple(str(k) for k in range(len(inputs)))
    chosen.check_inputs(None if base is None else "base", names, method, dialect)
    complete = _complete(chosen, values, len(inputs), dialect)
    kernel = chosen.kernels[dialect]
    role = chosen.base_in(dialect)
    operands = Operands(
        base if role.endswith("origin") else None,
        inputs if base is None or not role.endswith("input") else [base, *inputs],
        masks,
        cache,
        key,
        shape=shape,
        statistics=statistics,
    )
    return _run(kernel, operands, complete, chunk)


def _run(kernel: Kernel, operands: Operands, values: Values, size: int) -> Iterator[tuple[int, Tensor]]:
    if operands.size == 0:
        return
    plan = kernel.prepare(operands, values)
    buffer = torch.empty(min(size, operands.size), dtype=operands.dtype)
    for start in range(0, operands.size, size):
        for strip in operands.chunks(STRIP, start, start + size):
            kernel.apply(plan, strip, buffer[strip.start - start : strip.stop - start])
        yield start, buffer[: operands.size - start]


def _complete(
    method: MergeMethod,
    values: Mapping[str, float | bool | str | tuple[float, ...]],
    count: int,
    dialect: str,
) -> Values:
    """Fill in the dialect's defaults, and one value per input where the scope is expert."""
    parameters = method.parameters_in(dialect)
    known = {parameter.name for parameter in parameters}
    for name in values:
        if name not in known:
            raise ValueError(f"{method.name} has no parameter '{name}'{nearest(name, known)}")
    complete: dict[str, Any] = {}
    for parameter in parameters:
        value: Any = values.get(parameter.name, parameter.default_in(dialect))
        if value is None:
            raise ValueError(f"{method.name} needs a value for '{parameter.name}'")
        if parameter.scope == "expert" and not isinstance(value, tuple):
            value = (value,) * count
        if parameter.scope == "expert" and len(value) != count:
            raise ValueError(f"{method.name}: {len(value)} values of '{parameter.name}' for {count} inputs")
        for item in value if parameter.scope == "expert" else (value,):
            parameter.check(item, f"{method.name}: {parameter.name}")
        complete[parameter.name] = value
    return complete
