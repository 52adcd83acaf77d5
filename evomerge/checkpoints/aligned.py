"""A checkpoint as another's tokenizer sees it: rows of embedding and head in the order of other token ids."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch

from evomerge.checkpoints.completeness import input_embedding
from evomerge.checkpoints.header import TensorInfo
from evomerge.checkpoints.reader import Checkpoint

Rows = npt.NDArray[np.int64]
"""For each row of the output the row of a checkpoint that it is, or -1."""

_BLOCK = 1 << 18
_SCATTERED = 4  # Rows of a stretch below which a mapped file is quicker than reads.


@dataclass(frozen=True, eq=False)
class Fill:
    """Where a row comes from that a checkpoint has not got.

    Attributes:
        donors: checkpoints that may give rows.
        rows: for each donor, which row it gives: ``(donors, output rows)``. Several donors of one row give
            their mean, taken in float64; a row without donors is zero.
    """

    donors: tuple[Checkpoint, ...]
    rows: Rows


@dataclass(frozen=True, eq=False)
class Alignment:
    """How a checkpoint's embedding and head become those of other token ids.

    Attributes:
        own: the checkpoint's row of each output row.
        fill: where the rest comes from.
        tokens: output rows from here on belong to no token; they are the mean of all rows before.
    """

    own: Rows
    fill: Fill
    tokens: int

    @cached_property
    def _breaks(self) -> Rows:
        """The number of rows, up to each one, that do not follow the row before."""
        return np.cumsum(np.concatenate([[0], (np.diff(self.own) != 1) | (self.own[1:] < 0)]))

    def follows(self, first: int, stop: int) -> bool:
        """Whether the rows ``first:stop`` are the checkpoint's own, one after the other."""
        return bool(
            stop <= self.tokens and self.own[first] >= 0 and self._breaks[first] == self._breaks[stop - 1]
        )


@dataclass(frozen=True, eq=False)
class AlignedCheckpoint(Checkpoint):
    """A checkpoint whose embedding and head are read as other token ids want them.

    Its other tensors are the parent's. A head of a tied parent is the parent's embedding.

    Attributes:
        parent: the checkpoint itself.
        sources: the parent's name of each tensor.
        alignments: of the tensors whose rows are moved, by name.
    """

    parent: Checkpoint = field(kw_only=True)
    sources: Mapping[str, str] = field(kw_only=True)
    alignments: Mapping[str, Alignment] = field(kw_only=True)
    _means: dict[str, torch.Tensor] = field(default_factory=dict, repr=False, kw_only=True)

    @property
    def sha256(self) -> str:
        """The parent's."""
        return self.parent.sha256

    def changes(self, name: str) -> bool:
        """Whether a tensor is another than the parent's of that name."""
        return name in self.alignments or self.sources[name] != name

    def mapped(self, name: str) -> bool:
        return name not in self.alignments and self.parent.mapped(self.sources[name])

    def view(self, name: str) -> torch.Tensor | None:
        return None if name in self.alignments else self.parent.view(self.sources[name])

    def read_dtype(self, name: str) -> torch.dtype:
        moved = name in self.alignments
        return self.tensors[name].dtype if moved else self.parent.read_dtype(self.sources[name])

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor in its shape; of moved rows a copy."""
        if name not in self.alignments:
            return self.parent.tensor(self.sources[name])
        info = self.tensors[name]
        return self.read_into(name, 0, torch.empty(info.numel, dtype=info.dtype)).reshape(info.shape)

    def read_into(self, name: str, start: int, out: torch.Tensor) -> torch.Tensor:
        if name not in self.alignments:
            return self.parent.read_into(self.sources[name], start, out)
        self._check_reading(name, start, out)
        info, alignment = self.tensors[name], self.alignments[name]
        if not out.numel():
            return out
        width = info.numel // info.shape[0]
        first, last = start // width, -(-(start + out.numel()) // width)
        source = self.sources[name]
        if alignment.follows(first, last) and self.parent.read_dtype(source) == out.dtype:
            moved = int(alignment.own[first] - first) * width
            return self.parent.read_into(source, start + moved, out)
        if out.numel() == (last - first) * width:
            self._read_rows(name, first, out.view(-1, width))
        else:
            rows = torch.empty(last - first, width, dtype=info.dtype)
            self._read_rows(name, first, rows)
            begin = start - first * width
            out.copy_(rows.view(-1)[begin : begin + out.numel()])
        return out

    def _read_rows(self, name: str, first: int, out: torch.Tensor) -> None:
        """Fill `out`, ``(rows, width)``, with the output rows from `first` on."""
        alignment = self.alignments[name]
        stop = first + len(out)
        tokens = min(stop, max(first, alignment.tokens)) - first
        if tokens < len(out):
            out[tokens:] = self._mean(name)
        own = alignment.own[first : first + tokens]
        (held,) = np.nonzero(own >= 0)
        _gather(self.parent, self.sources[name], own[held], out, held)
        (absent,) = np.nonzero(own < 0)
        if len(absent):
            self._fill(name, alignment.fill, first + absent, out, absent)

    def _fill(self, name: str, fill: Fill, rows: Rows, out: torch.Tensor, places: Rows) -> None:
        taken = fill.rows[:, rows]
        count = (taken >= 0).sum(axis=0)
        out[torch.from_numpy(places[count == 0])] = 0
        for donor, given in zip(fill.donors, taken, strict=True):
            alone = (given >= 0) & (count == 1)
            _gather(donor, source_name(donor, name), given[alone], out, places[alone])
        (shared,) = np.nonzero(count > 1)
        if not len(shared):
            return
        total = torch.zeros(len(shared), out.shape[1], dtype=torch.float64)
        for donor, given in zip(fill.donors, taken[:, shared], strict=True):
            (has,) = np.nonzero(given >= 0)
            rows_ = torch.empty(len(has), out.shape[1], dtype=torch.float64)
            _gather(donor, source_name(donor, name), given[has], rows_, np.arange(len(has)))
            total[torch.from_numpy(has)] += rows_
        total /= torch.from_numpy(count[shared]).unsqueeze(1)
        out[torch.from_numpy(places[shared])] = total.to(out.dtype)

    def _mean(self, name: str) -> torch.Tensor:
        """Return the mean of the rows that belong to tokens."""
        # Two threads that ask at the same time find the same.
        if name not in self._means:
            info = self.tensors[name]
            tokens = self.alignments[name].tokens
            width = info.numel // info.shape[0]
            step = max(1, _BLOCK // width)
            total = torch.zeros(width, dtype=torch.float64)
            for first in range(0, tokens, step):
                rows = torch.empty(min(step, tokens - first), width, dtype=info.dtype)
                self._read_rows(name, first, rows)
                total += rows.double().sum(dim=0)
            self._means[name] = (total / max(1, tokens)).to(info.dtype)
        return self._means[name]


def source_name(checkpoint: Checkpoint, name: str) -> str:
    """Return the name under which a checkpoint has a tensor; the head of a tied one is its embedding."""
    if name in checkpoint.tensors:
        return name
    embedding = input_embedding(checkpoint.tensors)
    assert embedding is not None, "checkpoints without an embedding are refused"
    return embedding


def with_head(checkpoint: Checkpoint, head: str) -> Checkpoint:
    """Return a tied checkpoint as an untied one, whose head repeats the embedding."""
    return _viewed(checkpoint, {head: None})


def align(checkpoint: Checkpoint, alignments: Mapping[str, Alignment]) -> Checkpoint:
    """Return a checkpoint whose tensors of these names have their rows moved.

    What is read is wider than what is stored where rows of several formats, or means, come together.
    """
    return _viewed(checkpoint, alignments)


def _viewed(checkpoint: Checkpoint, alignments: Mapping[str, Alignment | None]) -> Checkpoint:
    tensors = dict(checkpoint.tensors)
    sources = {name: name for name in tensors}
    for name, alignment in alignments.items():
        sources[name] = source_name(checkpoint, name)
        info = replace(checkpoint.tensors[sources[name]], name=name)
        tensors[name] = info if alignment is None else _moved(checkpoint, sources[name], info, alignment)
    return AlignedCheckpoint(
        checkpoint.name,
        checkpoint.path,
        checkpoint.config,
        tensors,
        tied=False,
        num_layers=checkpoint.num_layers,
        parent=checkpoint,
        sources=sources,
        alignments={name: alignment for name, alignment in alignments.items() if alignment is not None},
    )


def _moved(checkpoint: Checkpoint, source: str, info: TensorInfo, alignment: Alignment) -> TensorInfo:
    rows = len(alignment.own)
    shape = (rows, *info.shape[1:])
    dtypes = {checkpoint.read_dtype(source)}
    absent = alignment.fill.rows[:, alignment.own < 0]
    for donor, given in zip(alignment.fill.donors, absent, strict=True):
        if (given >= 0).any():
            dtypes.add(donor.read_dtype(source_name(donor, info.name)))
    means = alignment.tokens < rows or bool(((absent >= 0).sum(axis=0) > 1).any())
    dtype = next(iter(dtypes))
    if len(dtypes) > 1 or means:
        dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    numel = torch.Size(shape).numel()
    return replace(info, shape=shape, dtype=dtype, nbytes=numel * dtype.itemsize)


def _gather(checkpoint: Checkpoint, name: str, rows: Rows, out: torch.Tensor, places: Rows) -> None:
    """Copy rows of a tensor to places of `out`; consecutive rows are one read."""
    edges = _edges(rows, places)
    if len(rows) < _SCATTERED * (len(edges) - 1) and checkpoint.mapped(name):
        whole = checkpoint.tensor(name).view(-1, out.shape[1])
        out[torch.from_numpy(places)] = whole[torch.from_numpy(rows)].to(out.dtype)
        return
    dtype = checkpoint.read_dtype(name)
    for begin, end in pairwise(edges):
        place = out[places[begin] : places[begin] + end - begin].view(-1)
        start = int(rows[begin]) * out.shape[1]
        if dtype == out.dtype:
            checkpoint.read_into(name, start, place)
        else:
            place.copy_(checkpoint.read_into(name, start, torch.empty(len(place), dtype=dtype)))


def _edges(rows: Rows, places: Rows) -> list[int]:
    """Return where the stretches begin over which rows and places both rise by one, and their end."""
    breaks = np.nonzero((np.diff(rows) != 1) | (np.diff(places) != 1))[0] + 1
    return [0, *breaks.tolist(), len(rows)] if len(rows) else [0]
