"""Where merged tensors go: a folder of safetensors files, the parameters of a live model, a hash."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Protocol

import torch

from evomerge.checkpoints import CheckpointWriter


class Sink(Protocol):
    """Takes tensors chunk by chunk.

    The chunks of one tensor come in order from one thread; different tensors may come from different threads.
    """

    def write(self, name: str, start: int, chunk: torch.Tensor) -> None:
        """Take the flat elements `start` … `start + chunk.numel()` of a tensor, in its output dtype.

        The chunk's memory is reused afterwards.
        """


class FileSink:
    """Writes into a checkpoint folder."""

    def __init__(self, writer: CheckpointWriter) -> None:
        self._writer = writer

    def write(self, name: str, start: int, chunk: torch.Tensor) -> None:
        self._writer.write(name, start, chunk)


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

    def write(self, name: str, start: int, chunk: torch.Tensor) -> None:
        self._flat[name][start : start + chunk.numel()].copy_(chunk)


class HashSink:
    """Keeps the sha256 of each tensor's bytes instead of the tensor."""

    def __init__(self) -> None:
        self._hashes: dict[str, Any] = {}

    def write(self, name: str, start: int, chunk: torch.Tensor) -> None:
        self._hashes.setdefault(name, hashlib.sha256()).update(_raw(chunk))

    def digests(self) -> dict[str, str]:
        """Return the hex digest of each tensor written so far, by name."""
        return {name: value.hexdigest() for name, value in self._hashes.items()}


def _raw(flat: torch.Tensor) -> memoryview:
    return flat.cpu().view(torch.uint8).numpy().data
