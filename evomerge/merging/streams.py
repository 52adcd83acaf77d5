"""Reading tensors slice by slice into reused memory, so that it does not grow with their size."""

from __future__ import annotations

import threading

import torch

from evomerge.checkpoints import Checkpoint

_SHARE = 0.6
_COPY = 1 << 24


class Arena:
    """Byte buffers that one thread uses again for tensor after tensor: fresh memory costs a page fault a page."""

    def __init__(self, *, pinned: bool = False) -> None:
        self._buffers: list[torch.Tensor] = []
        self._pinned = pinned

    def slot(self, index: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """Return `numel` elements of buffer `index`, with arbitrary content.

        Buffers are page-locked where there is a GPU to copy them to.
        """
        nbytes = numel * dtype.itemsize
        while len(self._buffers) <= index:
            self._buffers.append(torch.empty(0, dtype=torch.uint8))
        if self._buffers[index].numel() < nbytes:
            self._buffers[index] = torch.empty(nbytes, dtype=torch.uint8, pin_memory=self._pinned)
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


class DeviceTensor:
    """Stands in for a flat tensor on a device where only slices of it are read.

    Args:
        flat: on the CPU: a tensor or a stream.
        device: where slices are copied to.
    """

    def __init__(self, flat: torch.Tensor | StreamedTensor, device: torch.device) -> None:
        self._flat = flat
        self.device = device
        self.dtype = flat.dtype
        self.shape = flat.shape

    def numel(self) -> int:
        return self.shape.numel()

    def detach(self) -> DeviceTensor:
        return self

    def reshape(self, size: int) -> DeviceTensor:
        if size != -1:
            raise ValueError("a tensor that is read slice by slice is flat")
        return self

    def __getitem__(self, part: slice) -> torch.Tensor:
        # A stream's buffer is used again for the next slice, so the copy must have ended by then.
        return self._flat[part].to(self.device)


class Residents:
    """Parents' tensors kept on a device, for as long as they fit: what came first stays.

    Args:
        device: where.
        limit: bytes they may take together; None: most of what is free there when the first one comes.
    """

    def __init__(self, device: torch.device, limit: int | None = None) -> None:
        self.device = device
        self._limit = limit
        self._held: dict[tuple[str, str], torch.Tensor] = {}
        self._lock = threading.Lock()
        self.nbytes = 0

    def get(
        self, checkpoint: Checkpoint, name: str, flat: torch.Tensor | StreamedTensor
    ) -> torch.Tensor | DeviceTensor:
        """Return a tensor on the device: whole if it fits, else one that is copied slice by slice."""
        key = (checkpoint.name, name)
        with self._lock:
            found = self._held.get(key)
            if found is not None:
                return found
            if self._limit is None:
                self._limit = int(torch.cuda.mem_get_info(self.device)[0] * _SHARE)
            nbytes = flat.numel() * flat.dtype.itemsize
            if self.nbytes + nbytes > self._limit:
                return DeviceTensor(flat, self.device)
            whole = torch.empty(flat.numel(), dtype=flat.dtype, device=self.device)
            for start in range(0, flat.numel(), _COPY):
                part = flat[start : start + _COPY]
                whole[start : start + part.numel()].copy_(part)
            self._held[key] = whole
            self.nbytes += nbytes
            return whole
