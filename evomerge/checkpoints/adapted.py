"""A base with a LoRA adapter on it: a checkpoint whose changed tensors are computed where they are read."""

from __future__ import annotations

import copy
import hashlib
import math
import threading
from dataclasses import dataclass, field, replace

import torch

from evomerge.checkpoints.adapter_changes import Change, Product
from evomerge.checkpoints.adapter_fit import fit
from evomerge.checkpoints.adapters import Adapter
from evomerge.checkpoints.completeness import head_name, input_embedding
from evomerge.checkpoints.header import TensorInfo
from evomerge.checkpoints.hub import commit_of
from evomerge.checkpoints.model_config import set_tied
from evomerge.checkpoints.reader import Checkpoint
from evomerge.threads import one_thread_per_operation

BLOCK = 1 << 18
"""Elements that are expanded at a time; fixed, so that the bits do not depend on who reads which part."""


class _Local(threading.local):
    """Memory of each thread; left behind when pickled."""

    def __reduce__(self) -> tuple[type[_Local], tuple[()]]:
        return _Local, ()


@dataclass(frozen=True, eq=False)
class AdaptedCheckpoint(Checkpoint):
    """A base with a LoRA adapter; the factors stay as they are, W_0 + s B A is expanded block by block.

    Where the base ties its head to the embedding and the adapter changes one of the two, the head is a tensor
    of its own and `tied` is false: that is what the adapter was trained as.

    Attributes:
        base: the model that the adapter lies on.
        adapter: the PEFT folder.
        changes: by the names of the base's tensors.
        sources: name in the base of each tensor; differs for the head of a tied base.
    """

    base: Checkpoint = field(kw_only=True)
    adapter: Adapter = field(kw_only=True)
    changes: dict[str, Change] = field(kw_only=True)
    sources: dict[str, str] = field(kw_only=True)
    _local: _Local = field(default_factory=_Local, repr=False, kw_only=True)

    def mapped(self, name: str) -> bool:
        change = self.changes.get(name)
        return change is None or change.replaces

    def view(self, name: str) -> torch.Tensor | None:
        return None if name in self.changes else self.base.view(self.sources[name])

    def read_dtype(self, name: str) -> torch.dtype:
        change = self.changes.get(name)
        if change is None:
            return self.base.read_dtype(self.sources[name])
        if change.replaces and change.whole is not None:
            return change.whole.dtype
        dtypes = {info.dtype for info in change.infos} | {self.tensors[name].dtype}
        return torch.float64 if torch.float64 in dtypes else torch.float32

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor in its shape; a changed one is expanded as a whole, in the dtype of reading."""
        change = self.changes.get(name)
        if change is None:
            return self.base.tensor(self.sources[name])
        if change.replaces and change.whole is not None:
            return _view(self.adapter, change.whole)
        info = self.tensors[name]
        out = torch.empty(info.numel, dtype=self.read_dtype(name))
        return self.read_into(name, 0, out).reshape(info.shape)

    def read_into(self, name: str, start: int, out: torch.Tensor) -> torch.Tensor:
        self._check_reading(name, start, out)
        change = self.changes.get(name)
        if change is None:
            return self.base.read_into(self.sources[name], start, out)
        if change.replaces and change.whole is not None:
            return _read(self.adapter, change.whole, start, out)
        done = 0
        while done < out.numel():
            expansion = self._expansion(name)
            first = (start + done) // expansion.elements
            block = expansion.block(first)
            offset = start + done - first * expansion.elements
            count = min(out.numel() - done, expansion.elements - offset)
            out[done : done + count] = block[offset : offset + count]
            done += count
        return out

    def close(self) -> None:
        self.base.close()
        self.adapter.files.close()

    def _content_hash(self) -> str:
        """Return the hash of the base, the adapter's tensors and how they are applied."""
        return combined_sha256(self.base.sha256, self.adapter.sha256)

    def _expansion(self, name: str) -> _Expansion:
        """Return the calling thread's expansion of a tensor; it keeps the last one that it asked for."""
        last: _Expansion | None = getattr(self._local, "expansion", None)
        if last is None or last.name != name:
            last = self._local.expansion = None  # its memory is free before the next one's is taken
            last = self._local.expansion = _Expansion(self, name)
        return last


class _Expansion:
    """One changed tensor, block by block of whole rows; one thread's.

    All blocks have the same number of rows, the last one of the factors is padded with zeros: the matrix
    product has one shape, and its bits do not depend on where reading begins.
    """

    def __init__(self, checkpoint: AdaptedCheckpoint, name: str) -> None:
        info = checkpoint.tensors[name]
        change = checkpoint.changes[name]
        self.name = name
        self._checkpoint = checkpoint
        self._change = change
        self._dtype = checkpoint.read_dtype(name)
        self._total = info.shape[0] if info.shape else 1
        self._columns = info.numel // max(1, self._total)
        self._rows = max(1, min(BLOCK // max(1, self._columns), self._total))
        self.elements = self._rows * self._columns
        self._index = -1
        self._values = torch.empty(self.elements, dtype=self._dtype)
        self._stored = torch.empty(self.elements, dtype=self._source_dtype())
        self._replaced = dict(zip(change.rows, range(len(change.rows)), strict=True))
        self._left = self._right = self._product = torch.empty(0)
        if change.product is not None:
            a, b = _factors(checkpoint.adapter, change.product, self._dtype)
            left, right = (a.T, b.T) if change.product.transposed else (b, a)
            padded = math.ceil(self._total / self._rows) * self._rows
            self._left = torch.zeros(padded, left.shape[1], dtype=self._dtype)
            self._left[: self._total] = left
            self._right = right.contiguous()
            self._product = torch.empty(self._rows, self._columns, dtype=self._dtype)

    def block(self, index: int) -> torch.Tensor:
        """Return the block's elements, valid until another block is asked for."""
        if index == self._index:
            return self._values
        self._index = -1
        first = index * self._rows
        rows = min(self._rows, self._total - first)
        count = rows * self._columns
        values = self._values[:count]
        values.copy_(self._read(first * self._columns, self._stored[:count]))
        change = self._change
        if change.tokens is not None:
            for row in range(first, first + rows):
                if row in self._replaced:
                    place = (row - first) * self._columns
                    values[place : place + self._columns] = self._token_row(change.tokens, row)
        if change.product is not None:
            with one_thread_per_operation():
                torch.mm(self._left[first : first + self._rows], self._right, out=self._product)
            self._product.mul_(change.product.scale)
            values.add_(self._product.view(-1)[:count])
        if change.shift is not None:
            shift = _load(self._checkpoint.adapter, change.shift, self._dtype)
            values.add_(shift[first : first + rows].mul_(change.scale))
        self._index = index
        return self._values

    def _source_dtype(self) -> torch.dtype:
        if self._change.whole is not None:
            return self._change.whole.dtype
        return self._checkpoint.base.read_dtype(self._checkpoint.sources[self.name])

    def _read(self, start: int, out: torch.Tensor) -> torch.Tensor:
        checkpoint = self._checkpoint
        if self._change.whole is not None:
            return _read(checkpoint.adapter, self._change.whole, start, out)
        return checkpoint.base.read_into(checkpoint.sources[self.name], start, out)

    def _token_row(self, tokens: TensorInfo, row: int) -> torch.Tensor:
        out = torch.empty(self._columns, dtype=tokens.dtype)
        return _read(self._checkpoint.adapter, tokens, self._replaced[row] * self._columns, out)


def adapt(base: Checkpoint, adapter: Adapter, *, name: str) -> AdaptedCheckpoint:
    """Lay an adapter on an opened base.

    Args:
        base: the model.
        adapter: from `read_adapter`.
        name: what the user calls the result.

    Raises:
        CheckpointError: the adapter cannot be used, or is not one for this base.
    """
    tensors, sources, config, tied = dict(base.tensors), {n: n for n in base.tensors}, base.config, base.tied
    embedding, head = input_embedding(base.tensors), head_name(base.text_config)
    shapes = {n: info.shape for n, info in tensors.items()}
    if tied and embedding is not None:
        shapes[head] = shapes[embedding]
    changes = fit(adapter, shapes, config=base.config, base=str(base.path))
    if tied and embedding is not None and _unties(changes, embedding, head, adapter):
        tensors[head] = replace(tensors[embedding], name=head)
        sources[head] = embedding
        config, tied = copy.deepcopy(config), False
        set_tied(config, tied)
        if head not in changes and changes[embedding].tokens is not None:
            changes[head] = Change(tokens=changes[embedding].tokens, rows=changes[embedding].rows)
    elif tied:
        changes.pop(head, None)
    return AdaptedCheckpoint(
        name,
        base.path,
        config,
        tensors,
        tied,
        base.num_layers,
        base=base,
        adapter=adapter,
        changes=changes,
        sources=sources,
    )


def combined_sha256(base: str, adapter: str) -> str:
    """Return the content hash of an adapted model from that of its base and its adapter."""
    return hashlib.sha256(f"{base}\nlora {adapter}\n".encode()).hexdigest()


def commits(checkpoint: Checkpoint, source: str, adapter: str | None) -> dict[str, str]:
    """Return the commits at which an opened model and its adapter were found on the hub.

    Args:
        checkpoint: opened from the two.
        source, adapter: how the user names them: folders or hub ids.

    Returns:
        ``revision`` and ``adapter_revision``, each only for a hub id.
    """
    lora = checkpoint.adapter.path if isinstance(checkpoint, AdaptedCheckpoint) else checkpoint.path
    found = {"revision": commit_of(source, lora if adapter is None else checkpoint.path)}
    if adapter is not None:
        found["adapter_revision"] = commit_of(adapter, lora)
    return {key: commit for key, commit in found.items() if commit is not None}


def _unties(changes: dict[str, Change], embedding: str, head: str, adapter: Adapter) -> bool:
    """Whether head and embedding of a tied base differ once the adapter is on it.

    peft ties replaced token rows to the head; everything else only where `ensure_weight_tying` says so.
    """
    if adapter.config.get("ensure_weight_tying"):
        return False
    own = changes.get(embedding)
    return head in changes or (own is not None and own.tokens is None)


def _factors(adapter: Adapter, product: Product, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Read A ``(rank, in)`` and B ``(out, rank)`` of one matrix."""
    part = product.part
    if part is None:
        return _load(adapter, product.a, dtype), _load(adapter, product.b, dtype)
    rank, columns = product.a.shape[0] // part.experts, product.a.shape[1]
    a = torch.empty(rank * columns, dtype=product.a.dtype)
    _read(adapter, product.a, part.expert * a.numel(), a)
    width = product.b.shape[1]
    b = torch.empty((part.stop - part.start) * width, dtype=product.b.dtype)
    _read(adapter, product.b, part.start * width, b)
    return a.reshape(rank, columns).to(dtype), b.reshape(-1, width)[:, part.expert :: part.experts].to(dtype)


def _load(adapter: Adapter, info: TensorInfo, dtype: torch.dtype) -> torch.Tensor:
    """Read a stored tensor of an adapter as a whole."""
    out = torch.empty(info.numel, dtype=info.dtype)
    return _read(adapter, info, 0, out).to(dtype).reshape(info.shape)


def _read(adapter: Adapter, info: TensorInfo, start: int, out: torch.Tensor) -> torch.Tensor:
    if out.numel():
        adapter.files.read_into(
            info.file, info.offset + start * info.dtype.itemsize, out.view(torch.uint8).numpy().data
        )
    return out


def _view(adapter: Adapter, info: TensorInfo) -> torch.Tensor:
    return adapter.files.view(info.file, info.offset, info.nbytes, info.dtype).reshape(info.shape)
