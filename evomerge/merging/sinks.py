"""Where merged tensors go: a folder of safetensors files, the parameters of a live model, a hash."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch

from evomerge.checkpoints import CheckpointWriter


class Sink(Protocol):
    """Takes tensors piece by piece. Different tensors may come from different threads."""

    def pieces(
        self, name: str, numel: int, dtype: torch.dtype, chunk: int
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield (first element, flat buffer) over a tensor, in order.

        Each buffer is filled by the caller, in the tensor's output dtype, before the next one is asked for; its
        memory may be used again afterwards.

        Args:
            name: of the tensor.
            numel, dtype: its elements.
            chunk: how many elements at a time, unless the sink knows better.
        """


class FileSink:
    """Writes into a checkpoint folder."""

    def __init__(self, writer: CheckpointWriter) -> None:
        self._writer = writer

    def pieces(
        self, name: str, numel: int, dtype: torch.dtype, chunk: int
    ) -> Iterator[tuple[int, torch.Tensor]]:
        return self._writer.pieces(name)


class LiveSink:
    """Writes into the parameters of a live model, in place.

    Where a checkpoint mixes number formats, values are rounded to that of the live tensor, as transformers does
    when it loads the exported folder.

    Args:
        parameters: from `evomerge.merging.binding.bind`: contiguous live tensors by canonical name.
    """

    def __init__(self, parameters: Mapping[str, torch.Tensor]) -> None:
        self._flat = {name: tensor.detach().view(-1) for name, tensor in parameters.items()}

    def __contains__(self, name: str) -> bool:
        """Whether the model has a place for a tensor."""
        return name in self._flat

    def pieces(
        self, name: str, numel: int, dtype: torch.dtype, chunk: int
    ) -> Iterator[tuple[int, torch.Tensor]]:
        live = self._flat[name]
        if live.dtype == dtype:
            for start in range(0, numel, chunk):
                yield start, live[start : start + chunk]
            return
        for start, piece in _scratch(numel, dtype, chunk, live.device):
            yield start, piece
            live[start : start + piece.numel()].copy_(piece)


class HashSink:
    """Keeps the sha256 of each tensor's bytes instead of the tensor."""

    def __init__(self) -> None:
        self._hashes: dict[str, Any] = {}

    def pieces(
        self, name: str, numel: int, dtype: torch.dtype, chunk: int
    ) -> Iterator[tuple[int, torch.Tensor]]:
        found = self._hashes.setdefault(name, hashlib.sha256())
        for start, piece in _scratch(numel, dtype, chunk, torch.device("cpu")):
            yield start, piece
            found.update(piece.view(torch.uint8).numpy().data)

    def digests(self) -> dict[str, str]:
        """Return the hex digest of each tensor written so far, by name."""
        return {name: value.hexdigest() for name, value in self._hashes.items()}


def _scratch(
    numel: int, dtype: torch.dtype, chunk: int, device: torch.device
) -> Iterator[tuple[int, torch.Tensor]]:
    buffer = torch.empty(min(chunk, numel), dtype=dtype, device=device)
    for start in range(0, numel, chunk):
        yield start, buffer[: numel - start]
