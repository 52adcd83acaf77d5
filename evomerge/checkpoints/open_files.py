"""Open files of a checkpoint: memory maps for views, positioned reads for streaming."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import threading
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import cast

import torch

from evomerge.errors import CheckpointError

_POPULATE_READ = 22  # MADV_POPULATE_READ, Linux 5.14


class OpenFiles:
    """Opens files on first use, keeps them open, and survives pickling by forgetting them.

    All methods may be called from several threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._descriptors: dict[Path, int] = {}
        self._maps: dict[Path, mmap.mmap] = {}

    def __reduce__(self) -> tuple[type[OpenFiles], tuple[()]]:
        return OpenFiles, ()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Close all files; the next use opens them anew. Views that were given out stay valid."""
        with self._lock:
            while self._descriptors:
                os.close(self._descriptors.popitem()[1])
            self._maps.clear()

    def read_into(self, file: Path, offset: int, buffer: memoryview) -> None:
        """Fill a writable byte buffer from an offset of the file."""
        descriptor = self._descriptor(file)
        done = 0
        while done < len(buffer):
            try:
                got = os.preadv(descriptor, [buffer[done:]], offset + done)
            except OSError as error:
                raise CheckpointError(
                    f"{file}: cannot be read at byte {offset + done:,}: {error.strerror}"
                ) from None
            if got == 0:
                raise CheckpointError(
                    f"{file}: became shorter while it was in use; do not change open checkpoints"
                )
            done += got

    def view(self, file: Path, offset: int, nbytes: int, dtype: torch.dtype) -> torch.Tensor:
        """Return a flat read-only tensor over the file's mapped bytes, without copying them."""
        if nbytes == 0:
            return torch.empty(0, dtype=dtype)
        mapped = self._map(file)
        if offset + nbytes > len(mapped):
            raise CheckpointError(
                f"{file}: became shorter while it was in use; do not change open checkpoints"
            )
        _accept_read_only_buffers()
        if offset % dtype.itemsize:
            # Kernels may assume aligned elements; headers without padding break that.
            return torch.frombuffer(bytearray(mapped[offset : offset + nbytes]), dtype=dtype)
        return torch.frombuffer(mapped, dtype=dtype, count=nbytes // dtype.itemsize, offset=offset)

    def _descriptor(self, file: Path) -> int:
        with self._lock:
            return self._open(file)

    def _map(self, file: Path) -> mmap.mmap:
        with self._lock:
            if file not in self._maps:
                self._maps[file] = mmap.mmap(self._open(file), 0, access=mmap.ACCESS_READ)
            return self._maps[file]

    def _open(self, file: Path) -> int:
        if file not in self._descriptors:
            try:
                self._descriptors[file] = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from None
        return self._descriptors[file]


def expect(view: torch.Tensor) -> None:
    """Have a mapped view's bytes read from the disk, without waiting for them."""
    function = _madvise()
    if function is not None:
        function(_page(view), _length(view), mmap.MADV_WILLNEED)


def populate(view: torch.Tensor) -> bool:
    """Bring a mapped view's pages into memory and into the page table, in one call instead of a fault for each.

    Returns False where the system cannot; touching the view may then fault page by page, or kill the process if the
    file has become shorter.
    """
    function, length = _madvise(), _length(view)
    return function is not None and not function(_page(view), length, _POPULATE_READ)


def release(view: torch.Tensor) -> None:
    """Let go of a mapped view's pages: they count as resident no longer, and are there again once touched.

    Args:
        view: from `OpenFiles.view`, of bytes that `populate` took. Memory of any other kind would lose its content.
    """
    function = _madvise()
    if function is not None:
        function(_page(view), _length(view), mmap.MADV_DONTNEED)


def _page(view: torch.Tensor) -> int:
    return view.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE


def _length(view: torch.Tensor) -> int:
    return view.data_ptr() + view.nbytes - _page(view)


@cache
def _madvise() -> Callable[[int, int, int], int] | None:
    """Return C's madvise, which unlike Python's lets other threads go on; None on other systems than Linux."""
    if sys.platform != "linux":
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return cast(Callable[[int, int, int], int], function)


@cache
def _accept_read_only_buffers() -> None:
    """Use up torch's once-a-process warning about tensors over read-only memory."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.frombuffer(b"\0", dtype=torch.uint8)
