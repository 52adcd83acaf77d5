"""Reading tensors slice by slice, so that memory does not grow with their size."""

from __future__ import annotations

import torch

from evomerge.checkpoints import Checkpoint


class StreamedTensor:
    """Stands in for a flat tensor of a checkpoint where only slices of it are read.

    A slice is a new tensor with a copy of the file's bytes. Unlike pages of a mapped file, which count as
    resident once they are touched, it goes away with its last use.
    """

    def __init__(self, checkpoint: Checkpoint, name: str) -> None:
        info = checkpoint.tensors[name]
        self._checkpoint = checkpoint
        self._name = name
        self.dtype = info.dtype
        self.shape = torch.Size([info.numel])

    def numel(self) -> int:
        return self.shape.numel()

    def detach(self) -> StreamedTensor:
        return self

    def reshape(self, size: int) -> StreamedTensor:
        if size != -1:
            raise ValueError("a streamed tensor is flat")
        return self

    def __getitem__(self, part: slice) -> torch.Tensor:
        start, stop, _ = part.indices(self.numel())
        out = torch.empty(max(0, stop - start), dtype=self.dtype)
        return self._checkpoint.read_into(self._name, start, out)
