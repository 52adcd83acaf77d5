"""Reading tensors slice by slice, so that memory does not grow with their size."""

from __future__ import annotations

import torch

from evomerge.checkpoints import Checkpoint

PIECE = 1 << 18


class StreamedTensor:
    """Stands in for a flat tensor of a checkpoint where only slices of it are read.

    A slice is a new tensor with a copy of the file's bytes. Unlike pages of a mapped file, which count as
    resident once they are touched, it goes away with its last use.
    """

    def __init__(self, checkpoint: Checkpoint, name: str) -> None:
        info = checkpoint.tensors[name]
        self._checkpoint = checkpoint
        self._name = name
        self.dtype = checkpoint.read_dtype(name)
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
        start, stop, step = part.indices(self.numel())
        if step != 1:
            return torch.cat([self[begin:end][::step] for begin, end in _pieces(start, stop, step)])
        out = torch.empty(max(0, stop - start), dtype=self.dtype)
        return self._checkpoint.read_into(self._name, start, out)


def _pieces(start: int, stop: int, step: int) -> list[tuple[int, int]]:
    """Cut a range into pieces of about `PIECE` elements that each begin on the step's grid."""
    length = max(1, PIECE // step) * step
    return [(begin, min(begin + length, stop)) for begin in range(start, stop, length)]
