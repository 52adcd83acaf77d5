"""Running a merge method over one tensor, chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from evomerge.errors import nearest
from evomerge.methods import native
from evomerge.methods.cache import TensorCache
from evomerge.methods.kernels import FusedKernel, Values
from evomerge.methods.masks import MaskKey
from evomerge.methods.operands import Operands
from evomerge.methods.registry import MergeMethod, get_method
from evomerge.methods.statistics import Statistic


class TensorMerge:
    """One tensor's merge, its whole-tensor work done: writes any range of its elements.

    Not to be shared by threads. The bits depend neither on how the ranges are cut, nor on the number of threads,
    nor on `cache`, nor on whether the C kernels are there.

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
        dialect: the method's variant.
        shape: of the tensor, for methods that see rows or matrices; by default that of the first input.
        statistics: one per input, which the method weighs the inputs with; a bare tensor (a diagonal Fisher
            information, a Gram matrix of a layer's inputs) counts as the whole model's. None where there is none.
        transposed: whether a layer's matrix is kept as (in, out) instead of (out, in).
        thresholds: of each input the smallest magnitude that a trim of the whole model keeps; None: the tensor
            counts as the whole model.
        factor: multiplied in before the rounding.

    Attributes:
        size: number of elements.
        dtype: of the arithmetic: float32, or float64 if an operand is.

    Raises:
        ValueError: the arguments do not fit the method.
        CandidateFailed: these values have no merge (weights that cannot be normalised).
    """

    def __init__(
        self,
        method: str,
        base: Tensor | None,
        inputs: Sequence[Tensor],
        values: Mapping[str, float | bool | str | tuple[float, ...]],
        *,
        masks: MaskKey | None = None,
        cache: TensorCache | None = None,
        key: str = "",
        dialect: str = "paper",
        shape: Sequence[int] | None = None,
        statistics: Sequence[Statistic | Tensor] | None = None,
        transposed: bool = False,
        thresholds: Sequence[float] | None = None,
        factor: float = 1.0,
    ) -> None:
        chosen = get_method(method)
        if dialect not in chosen.kernels:
            raise ValueError(f"{method} has no dialect '{dialect}' (known: {', '.join(chosen.dialects)})")
        names = tuple(str(k) for k in range(len(inputs)))
        chosen.check_inputs(None if base is None else "base", names, method, dialect)
        complete = _complete(chosen, values, len(inputs), dialect)
        self._kernel = chosen.kernels[dialect]
        role = chosen.base_in(dialect)
        self._operands = Operands(
            base if role.endswith("origin") else None,
            inputs if base is None or not role.endswith("input") else [base, *inputs],
            masks,
            cache,
            key,
            shape=shape,
            statistics=statistics,
            transposed=transposed,
            thresholds=thresholds,
        )
        self.size = self._operands.size
        self.dtype = self._operands.dtype
        self._factor = factor
        self._plan = self._kernel.prepare(self._operands, complete) if self.size else None
        self._runner = self._fused()

    def write(self, start: int, stop: int, out: Tensor) -> bool:
        """Write the elements ``start:stop``, rounded once to the dtype of `out`.

        Args:
            start: first element.
            stop: one past the last.
            out: ``(stop - start,)``, contiguous.

        Returns:
            Whether all values are finite.
        """
        finite = True
        for begin in range(start, stop, self._operands.strip):
            end = min(begin + self._operands.strip, stop)
            finite = self._strip(begin, end, out[begin - start : end - start]) and finite
        return finite

    def _strip(self, start: int, stop: int, out: Tensor) -> bool:
        if out.device != self._operands.device:
            here = torch.empty(out.numel(), dtype=out.dtype, device=self._operands.device)
            finite = self._strip(start, stop, here)
            out.copy_(here)
            return finite
        if self._runner is not None and out.dtype in native.DTYPES:
            return self._runner(start, stop, out)
        direct = out.dtype == self.dtype
        values = out if direct else self._operands.row("result", stop - start)
        self._kernel.apply(self._plan, next(self._operands.chunks(stop - start, start, stop)), values)
        if self._factor != 1.0:
            values.mul_(self._factor)
        if direct:
            return bool(torch.isfinite(out.sum())) or bool(torch.isfinite(out).all())
        return native.narrow(values, out)

    def _fused(self) -> native.Runner | None:
        if not self.size or not isinstance(self._kernel, FusedKernel) or not native.usable(self._operands):
            return None
        fused = self._kernel.fused(self._plan)
        return None if fused is None else native.Runner(fused, self._operands, self._factor)


def merge_chunks(
    method: str,
    base: Tensor | None,
    inputs: Sequence[Tensor],
    values: Mapping[str, float | bool | str | tuple[float, ...]],
    *,
    chunk: int = 1 << 18,
    **options: Any,
) -> Iterator[tuple[int, Tensor]]:
    """Merge one tensor; yield ``(start element, flat chunk)`` in order, in the arithmetic's dtype.

    The buffer is reused: a chunk is valid until the next one is asked for.

    Args:
        method, base, inputs, values: as for `TensorMerge`.
        chunk: elements per chunk.
        options: the other arguments of `TensorMerge`.
    """
    return _chunks(TensorMerge(method, base, inputs, values, **options), chunk, inputs[0].device)


def _chunks(merge: TensorMerge, chunk: int, device: torch.device) -> Iterator[tuple[int, Tensor]]:
    buffer = torch.empty(min(chunk, merge.size), dtype=merge.dtype, device=device)
    for start in range(0, merge.size, chunk):
        out = buffer[: merge.size - start]
        merge.write(start, start + out.numel(), out)
        yield start, out


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
