"""One tensor of every model of a merge, read chunk by chunk into reused buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from evomerge.methods.cache import TensorCache
from evomerge.methods.masks import MaskKey

T = TypeVar("T")

STRIP = 1 << 17
"""Elements that kernels work on at a time: enough to hide the cost of a call, few enough to stay in cache."""

RUNS, RUN = 1 << 6, 1 << 9
"""Number and length of the runs of a sample."""

DEVICE_STRIP = 1 << 24
"""The same for a GPU, where launching a kernel costs more than its work on a small strip."""

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Operands:
    """The same tensor of the base and of each input, flattened, with scratch memory.

    Attributes:
        base: ``(n,)`` or None.
        inputs: K tensors ``(n,)``.
        size: n.
        shape: of the tensor before it was flattened.
        statistics: one per input (`evomerge.methods.statistics`), or none at all.
        transposed: whether a layer's matrix is kept as (in, out) instead of (out, in).
        dtype: of the arithmetic: float64 if any operand is, else float32.
        device: where the operands are and the arithmetic is done.
        masks: what random masks depend on, or None.
        thresholds: of each input the smallest magnitude that a trim of the whole model keeps, or None.

    Raises:
        ValueError: shapes differ, or a dtype is not a floating-point one that merges.
    """

    def __init__(
        self,
        base: Tensor | None,
        inputs: Sequence[Tensor],
        masks: MaskKey | None = None,
        cache: TensorCache | None = None,
        key: str = "",
        *,
        shape: Sequence[int] | None = None,
        statistics: Sequence[Any] | None = None,
        transposed: bool = False,
        thresholds: Sequence[float] | None = None,
    ) -> None:
        everything = [*inputs] if base is None else [base, *inputs]
        for tensor in everything:
            if tensor.shape != everything[0].shape:
                raise ValueError(
                    f"shapes differ: {tuple(everything[0].shape)} and {tuple(tensor.shape)}; "
                    "a merge needs one shape"
                )
            if tensor.dtype not in DTYPES:
                raise ValueError(f"cannot merge {str(tensor.dtype).removeprefix('torch.')} tensors")
        if cache is not None and not key:
            raise ValueError("a cache needs a key that names the tensor and its inputs")
        self.base = None if base is None else base.detach().reshape(-1)
        self.inputs = tuple(tensor.detach().reshape(-1) for tensor in inputs)
        self.size = self.inputs[0].numel()
        self.device = everything[0].device
        self.shape = tuple(inputs[0].shape if shape is None else shape)
        self.statistics = None if statistics is None else tuple(statistics)
        self.transposed = transposed
        self.thresholds = thresholds
        self.dtype = torch.float64 if any(t.dtype == torch.float64 for t in everything) else torch.float32
        self.masks = masks
        self._cache = cache
        self._key = key
        self._rows: dict[str, Tensor] = {}
        self._sampled: Tensor | None = None

    def tensor(self, k: int) -> Tensor:
        """Return input k, or the base for −1, flat and in its own dtype."""
        found = self.base if k < 0 else self.inputs[k]
        assert found is not None, "the method is declared to need a base"
        return found

    def row(self, name: str, length: int) -> Tensor:
        """Return the reused buffer of that name, ``(length,)``, with arbitrary content."""
        row = self._rows.get(name)
        if row is None or row.numel() < length:
            row = self._rows[name] = torch.empty(length, dtype=self.dtype, device=self.device)
        return row[:length]

    @property
    def strip(self) -> int:
        """Elements to work on at a time."""
        return STRIP if self.device.type == "cpu" else DEVICE_STRIP

    def chunks(self, size: int, start: int = 0, stop: int | None = None) -> Iterator[Chunk]:
        """Cut the elements ``start:stop`` into chunks of `size` elements; the last may be shorter."""
        stop = self.size if stop is None else min(stop, self.size)
        for begin in range(start, stop, size):
            yield Chunk(self, begin, min(begin + size, stop))

    def whole(self, k: int) -> Tensor:
        """Return θ_k in its shape and the arithmetic's dtype, freshly allocated: for dense algebra."""
        return self.inputs[k][0 : self.size].to(self.dtype, copy=True).reshape(self.shape)

    def whole_base(self) -> Tensor:
        """Return θ_0 likewise."""
        assert self.base is not None, "the method is declared to need a base"
        return self.base[0 : self.size].to(self.dtype, copy=True).reshape(self.shape)

    def sample(self, k: int) -> Tensor:
        """Return some 2¹⁵ elements of θ_k − θ_0 (all of a smaller tensor), freshly allocated.

        They come in runs of consecutive elements at equal distances, which is what a file can be asked for.
        """
        if self._sampled is None:
            self._sampled = self._runs(-1)
        return self._runs(k).sub_(self._sampled)

    def _runs(self, k: int) -> Tensor:
        tensor, count = self.tensor(k), RUNS if self.size > RUNS * RUN else 1
        length = RUN if count > 1 else self.size
        stride = self.size // count
        rows = torch.empty(count, length, dtype=self.dtype, device=self.device)
        # A stream that has the whole tensor in memory says so.
        whole = tensor if isinstance(tensor, Tensor) else getattr(tensor, "whole", None)
        if whole is not None and whole.is_contiguous() and length:
            return rows.copy_(whole.as_strided((count, length), (stride, 1), whole.storage_offset())).reshape(
                -1
            )
        for run, row in enumerate(rows):
            row.copy_(tensor[run * stride : run * stride + length])
        return rows.reshape(-1)

    @property
    def caching(self) -> bool:
        """Whether a further reduction would be kept."""
        return self._cache is not None and not self._cache.full

    def cached(self, what: str, build: Callable[[], T]) -> T:
        """Return a reduction that depends on the operands alone, from the cache if there is one."""
        return build() if self._cache is None else self._cache.get((self._key, what), build)

    def known(self, what: str) -> bool:
        """Whether a reduction is in the cache."""
        return self._cache is not None and (self._key, what) in self._cache

    def fork(self) -> Operands:
        """Return the same operands with scratch memory of their own."""
        other = object.__new__(Operands)
        other.__dict__.update(self.__dict__, _rows={})
        return other


class Chunk:
    """The elements ``start:stop`` of every operand, in the arithmetic's dtype.

    What the methods return is only read by the caller, except for `row` and `delta`, and is valid until
    the same method is called again.
    """

    def __init__(self, operands: Operands, start: int, stop: int) -> None:
        self.start = start
        self.stop = stop
        self._operands = operands
        self._base: Tensor | None = None

    def row(self, name: str) -> Tensor:
        """Return a scratch buffer of the chunk's length."""
        return self._operands.row(name, self.stop - self.start)

    def base(self) -> Tensor:
        """Return the base's elements."""
        if self._base is None:
            base = self._operands.base
            assert base is not None, "the method is declared to need a base"
            part = self._read(base, "base")
            # A stream's slice ends with its next one, and a kernel may read on, through a fork, before it is done.
            lasting = part.dtype != base.dtype or type(base) is Tensor
            self._base = part if lasting else self.row("base").copy_(part)
        return self._base

    def input(self, k: int) -> Tensor:
        """Return input k's elements."""
        return self._read(self._operands.inputs[k], "input")

    def delta(self, k: int) -> Tensor:
        """Return θ_k − θ_0 in a buffer that the caller may overwrite."""
        return torch.sub(self.input(k), self.base(), out=self.row("input"))

    def _read(self, tensor: Tensor, row: str) -> Tensor:
        part = tensor[self.start : self.stop]
        return part if part.dtype == self._operands.dtype else self.row(row).copy_(part)
