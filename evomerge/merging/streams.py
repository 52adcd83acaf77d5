"""Reading tensors slice by slice into reused memory, so that it does not grow with their size."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable

import torch

from evomerge.checkpoints import Checkpoint
from evomerge.checkpoints.open_files import expect, populate, release

_SHARE = 0.6
_COPY = 1 << 24
_WINDOW = 1 << 21
_JUMP = 1 << 16


class Arena:
    """Byte buffers that one thread uses again for tensor after tensor: fresh memory costs a page fault a page."""

    def __init__(self, *, pinned: bool = False) -> None:
        self._buffers: list[torch.Tensor] = []
        self._views: dict[int, torch.Tensor] = {}
        self._windows: dict[int, torch.Tensor] = {}
        self._pinned = pinned

    @property
    def pinned(self) -> bool:
        """Whether slots are page-locked."""
        return self._pinned

    def lend(self, index: int, view: torch.Tensor | None) -> Callable[[], torch.Tensor | None]:
        """Keep a view for slot `index`, and return what gives it until another takes its place.

        What a stream leads to may outlive the merge in a reference cycle, a mapped file must not.
        """
        self._views.pop(index, None)
        if view is None:
            return lambda: None
        self._views[index] = view
        return weakref.ref(view)

    def hold(self, index: int, window: torch.Tensor) -> bool:
        """Bring a view's pages into memory, and let go of those that slot `index` held; whether that worked."""
        last = self._windows.pop(index, None)
        if last is not None:
            release(last)
        if not populate(window):
            return False
        self._windows[index] = window
        return True

    def close(self) -> None:
        """Let go of all mapped files."""
        self._views.clear()
        while self._windows:
            release(self._windows.popitem()[1])

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

    A slice is valid until the next slice of the same stream. Resident memory stays bounded: of a tensor that lies in
    a file as it is, a window of some MiB is mapped at a time, which copies nothing; computed tensors, and slices out
    of the row, lie in the arena's buffer.

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
        view = None if arena.pinned else checkpoint.view(name)
        self._view = arena.lend(slot, view)
        self._begin = self._end = 0
        if view is not None:
            expect(view[: _WINDOW // view.itemsize])
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
        view = self._view()
        if view is not None and self._mapped(view, start, stop):
            return view[start:stop]
        out = self._arena.slot(self._slot, max(0, stop - start), self.dtype)
        return self._checkpoint.read_into(self._name, start, out)

    @property
    def whole(self) -> torch.Tensor | None:
        """The tensor as mapped memory, if all of it fits into a window."""
        view = self._view()
        fits = view is not None and view.nbytes <= _WINDOW and self._mapped(view, 0, self.numel())
        return view if fits else None

    def _mapped(self, view: torch.Tensor, start: int, stop: int) -> bool:
        """Whether a slice is in memory, in the window that is there or one that begins with it."""
        if self._begin <= start and stop <= self._end:
            return True
        follows = start == 0 or self._begin <= start <= self._end
        if start >= stop or not (follows or stop - start >= _JUMP):
            return False
        size = _WINDOW // self.dtype.itemsize
        end = min(max(stop, start + size), self.numel())
        if end < self.numel():
            expect(view[end : end + size])
        if not self._arena.hold(self._slot, view[start:end]):
            self._view = self._arena.lend(self._slot, None)
            return False
        self._begin, self._end = start, end
        return True


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
