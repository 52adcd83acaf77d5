"""Reading tensors slice by slice into reused memory, so that it does not grow with their size."""

from __future__ import annotations

import torch

from evomerge.checkpoints import Checkpoint


class Arena:
    """Byte buffers that one thread uses again for tensor after tensor: fresh memory costs a page fault a page."""

    def __init__(self) -> None:
        self._buffers: list[torch.Tensor] = []

    def slot(self, index: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """Return `numel` elements of buffer `index`, with arbitrary content."""
        nbytes = numel * dtype.itemsize
        while len(self._buffers) <= index:
            self._buffers.append(torch.empty(0, dtype=torch.uint8))
        if self._buffers[index].numel() < nbytes:
            self._buffers[index] = torch.empty(nbytes, dtype=torch.uint8)
        return self._buffers[index][:nbytes].view(dtype)


class StreamedTensor:
    """Stands in for a flat tensor of a checkpoint where only slices of it are read.

    A slice lies in the arena's buffer and is valid until the next slice of the same stream. Unlike pages of a
    mapped file, which count as resident once they are touched, memory stays bounded.

    Args:
        checkpoint, name: what to read.
        arena: of the thread that reads.
        slot: the arena's buffer that this stream owns.
    """

    device = torch.device("cpu")

    def __init__(self, checkpoint: Checkpoint, name: str, arena: Arena, slot: int) -> None:
        self._checkpoint = checkpoint
        self._name = name
        self._arena = arena
        self._slot = slot
        self.dtype = checkpoint.read_dtype(name)
        self.shape = torch.Size([checkpoint.tensors[name].numel])

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
            raise ValueError("a streamed tensor is read in consecutive elements")
        out = self._arena.slot(self._slot, max(0, stop - start), self.dtype)
        return self._checkpoint.read_into(self._name, start, out)
