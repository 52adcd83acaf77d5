"""Open files of a checkpoint: memory maps for views, positioned reads for streaming."""

from __future__ import annotations

import mmap
import os
import threading
import warnings
from functools import cache
from pathlib import Path

import torch

from evomerge.errors import CheckpointError


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


@cache
def _accept_read_only_buffers() -> None:
    """Use up torch's once-a-process warning about tensors over read-only memory."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.frombuffer(b"\0", dtype=torch.uint8)
