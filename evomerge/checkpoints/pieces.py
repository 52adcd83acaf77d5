"""Writing files in pieces that go around the page cache where the file system allows it.

A page that is written through the page cache costs a fresh page of memory, a copy and a later write-back, and takes
the place of a parent's page that is still needed. Pieces lie in page-aligned buffers that are used again; their
aligned part is written with O_DIRECT by threads of its own, so that it overlaps with the arithmetic.
"""

from __future__ import annotations

import errno
import mmap
import os
import queue
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

PIECE = 4 << 20
PAGE = 4096
_THREADS = 4
_DIRECT = getattr(os, "O_DIRECT", 0)
_UNSUPPORTED = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)


class PieceFile:
    """An open file that can be written around the page cache, or through it where that is not supported."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.descriptor = descriptor
        self._direct: int | None = None
        self._refused = False
        if _DIRECT:
            try:
                self._direct = os.open(path, os.O_WRONLY | os.O_CLOEXEC | _DIRECT)
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    raise

    def write(self, data: memoryview, position: int) -> None:
        """Write bytes that lie at the same offset in their page as `position` lies in the file's."""
        start = min(-position % PAGE, len(data))
        stop = max(start, len(data) - (position + len(data)) % PAGE)
        middle = data[start:stop]
        if self._direct is not None and not self._refused and len(middle):
            try:
                write_at(self._direct, middle, position + start)
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    raise
                # Not closed here: other threads may be writing with it.
                self._refused = True
            else:
                write_at(self.descriptor, data[:start], position)
                write_at(self.descriptor, data[stop:], position + stop)
                return
        write_at(self.descriptor, data, position)

    def close(self) -> None:
        """Close what this object opened; the descriptor stays the caller's."""
        direct, self._direct = self._direct, None
        if direct is not None:
            os.close(direct)


class Buffer:
    """Page-aligned memory for one piece."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, PIECE + PAGE)
        self._bytes = torch.frombuffer(self._memory, dtype=torch.uint8)

    def at(self, position: int, nbytes: int) -> torch.Tensor:
        """Return `nbytes` bytes at the place in their page that `position` has in the file's."""
        skew = position % PAGE
        return self._bytes[skew : skew + nbytes]


class PiecePool:
    """Buffers that are filled by some threads and written to files by others.

    Args:
        buffers: how many there may be; each thread that fills one holds it until it hands it in.
    """

    def __init__(self, buffers: int) -> None:
        self._free: queue.SimpleQueue[Buffer] = queue.SimpleQueue()
        self._left = buffers
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="evomerge-write")
        self._error: BaseException | None = None
        self._pending: set[Future[None]] = set()

    def take(self) -> Buffer:
        """Return a free buffer; raises the error of an earlier write."""
        self._raise()
        try:
            return self._free.get_nowait()
        except queue.Empty:
            with self._lock:
                make, self._left = self._left > 0, self._left - (self._left > 0)
        if make:
            return Buffer()
        buffer = self._free.get()
        if self._error is not None:
            # The next thread that waits shall meet the error too.
            self._free.put(buffer)
            raise self._error
        return buffer

    def give_back(self, buffer: Buffer) -> None:
        """Return a buffer that was not filled."""
        self._free.put(buffer)

    def submit(self, file: PieceFile, buffer: Buffer, position: int, nbytes: int) -> None:
        """Write a filled buffer, and make it free again."""

        def work() -> None:
            try:
                if self._error is None:
                    file.write(buffer.at(position, nbytes).numpy().data, position)
            except BaseException as error:
                self._error = self._error or error
            finally:
                self._free.put(buffer)

        try:
            future = self._pool.submit(work)
        except RuntimeError:  # closed meanwhile
            self._free.put(buffer)
            raise
        with self._lock:
            self._pending = {one for one in self._pending if not one.done()} | {future}

    def wait(self) -> None:
        """Return once everything is written; raises the error of a write."""
        with self._lock:
            pending = list(self._pending)
        for future in pending:
            future.result()
        self._raise()

    def close(self) -> None:
        """Let writes under way end, drop the others, and turn away the threads that still fill buffers."""
        self._error = self._error or RuntimeError("the pool is closed")
        self._pool.shutdown(wait=True)

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error


def write_at(descriptor: int, data: memoryview, position: int) -> None:
    """Write all of `data` at a position of the file."""
    while data:
        done = os.pwrite(descriptor, data, position)
        data, position = data[done:], position + done
