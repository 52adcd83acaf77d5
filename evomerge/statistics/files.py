"""Statistics on disk: one folder for each model, data and kind, in the user's cache folder.

A folder holds safetensors files, written one layer (or tensor) at a time, and ``about.json``.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, cast

import numpy as np
import torch
from safetensors.torch import save_file

from evomerge.checkpoints import Checkpoint, TensorInfo, tokenizer_sha256
from evomerge.checkpoints.aligned import Rows
from evomerge.checkpoints.header import read_header
from evomerge.checkpoints.open_files import OpenFiles
from evomerge.environment import cache_folder
from evomerge.errors import CheckpointError, InfrastructureError, UserError
from evomerge.folders import hidden_beside, lock_folder, remove_abandoned
from evomerge.methods.registry import Needs
from evomerge.methods.statistics import Statistic

ABOUT = "about.json"
_VERSION = 1


def statistics_key(kind: Needs, checkpoint: Checkpoint, settings: Sequence[Any], context: str = "") -> str:
    """Return the name of one model's statistics: a hash of everything that they depend on.

    Args:
        kind: of the statistics.
        checkpoint: the model; its weights, config and tokenizer.
        settings: of the data (`evomerge.data_config.Data.settings`).
        context: what else they depend on.
    """
    tokenizer = tokenizer_of(checkpoint.path)
    content = [_VERSION, kind, checkpoint.sha256, tokenizer, list(settings), context]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def tokenizer_of(folder: Path) -> str:
    """Return a hash of a folder's tokenizer, read again only if a file has changed."""
    return _tokenizer(folder, _state(folder))


@lru_cache(maxsize=64)
def _tokenizer(folder: Path, state: object) -> str:
    return tokenizer_sha256(folder)


def _state(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Return what changes when a file of a folder does."""
    stats = ((file.name, file.stat()) for file in sorted(folder.iterdir()) if file.is_file())
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


def statistics_cache() -> Path:
    """Return the folder in which statistics are kept, each in a folder that is called by its key."""
    return cache_folder() / "statistics"


def cached_folder(key: str) -> Path:
    """Return where statistics of a key are kept."""
    return statistics_cache() / key


def find_statistics(key: str) -> Statistics | None:
    """Open the kept statistics of a key, which counts as a use of them; None if there are none."""
    folder = cached_folder(key)
    if not (folder / ABOUT).is_file():
        return None
    with contextlib.suppress(OSError):
        os.utime(folder / ABOUT)
    return Statistics(folder)


class Source(Protocol):
    """Whatever knows the statistics of one model."""

    def of(self, tensor: str) -> Statistic | None:
        """Return the statistic of one of the model's tensors; None if it has none."""


class Statistics:
    """Statistics of one model, read slice by slice.

    Attributes:
        folder: where they lie.
        about: what they are, as plain data: `kind`, `unit`, `tensors` (the tensor that holds a weight's
            statistic, by the weight's name), and what they were made of.

    Raises:
        CheckpointError: the folder does not hold statistics, or they are damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.about: dict[str, Any] = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
            self._holders: Mapping[str, str] = self.about["tensors"]
            self._unit = float(self.about["unit"])
        except (OSError, ValueError, KeyError, TypeError):
            raise CheckpointError(
                f"{folder / ABOUT}: does not describe statistics; remove the folder"
            ) from None
        self._files = OpenFiles()
        self._infos: dict[str, TensorInfo] = {
            info.name: info for file in sorted(folder.glob("*.safetensors")) for info in read_header(file)
        }

    def of(self, tensor: str) -> Statistic | None:
        """Return the statistic of one of the model's tensors; None if it has none."""
        holder = self._holders.get(tensor)
        if holder is None:
            return None
        if holder not in self._infos:
            raise CheckpointError(f"{self.folder}: lacks '{holder}'; remove the folder to have it made again")
        values = cast(torch.Tensor, _FileTensor(self._files, self._infos[holder]))
        return Statistic(values, self._unit)


class _FileTensor:
    """Stands in for a flat tensor of a file where only slices of it are read."""

    def __init__(self, files: OpenFiles, info: TensorInfo) -> None:
        self._files = files
        self._info = info
        self.dtype = info.dtype

    def numel(self) -> int:
        return self._info.numel

    def __getitem__(self, part: slice) -> torch.Tensor:
        start, stop, _ = part.indices(self._info.numel)
        out = torch.empty(max(0, stop - start), dtype=self.dtype)
        if out.numel():
            offset = self._info.offset + start * self.dtype.itemsize
            self._files.read_into(self._info.file, offset, out.view(torch.uint8).numpy().data)
        return out


def with_rows(statistic: Statistic, own: Rows, width: int) -> Statistic:
    """Return the statistic of a tensor whose rows are in another order; rows it has not got are 0.

    Args:
        statistic: of the tensor as it is on disk, one number for each weight.
        own: the row on disk of each row, or -1.
        width: of a row.
    """
    return replace(statistic, values=cast(torch.Tensor, _MovedRows(statistic.values, own, width)))


class _MovedRows:
    """Stands in for a flat tensor whose rows are another's in another order."""

    def __init__(self, values: torch.Tensor, own: Rows, width: int) -> None:
        self._values = values
        self._own = own
        self._width = width
        self.dtype = values.dtype

    def numel(self) -> int:
        return len(self._own) * self._width

    def __getitem__(self, part: slice) -> torch.Tensor:
        start, stop, _ = part.indices(self.numel())
        width = self._width
        first, last = start // width, -(-stop // width)
        own = self._own[first:last]
        rows = torch.zeros(len(own), width, dtype=self.dtype)
        begin = 0
        breaks = np.nonzero((np.diff(own) != 1) | (own[:-1] < 0))[0] + 1
        for end in [*breaks.tolist(), len(own)]:
            if begin < end and own[begin] >= 0:
                held = self._values[int(own[begin]) * width : (int(own[begin]) + end - begin) * width]
                rows[begin:end] = held.view(-1, width)
            begin = end
        return rows.view(-1)[start - first * width : stop - first * width]


class StatisticsWriter:
    """Writes one folder of statistics; nothing is seen of it until `commit`.

    A context manager, like `evomerge.checkpoints.CheckpointWriter`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._partial = hidden_beside(folder)
        self._count = 0
        self._lock: int | None = None

    def __enter__(self) -> StatisticsWriter:
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            remove_abandoned(self.folder)
            self._partial.mkdir()
        except OSError as error:
            raise _told(self.folder, error) from None
        self._lock = lock_folder(self._partial)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self._partial, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)

    def write(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write some tensors, in one file of their own."""
        if not tensors:
            return
        self._count += 1
        try:
            save_file(dict(tensors), self._partial / f"part-{self._count:05d}.safetensors")
        except Exception as error:
            # safetensors wraps the system's error, sometimes in text alone.
            if isinstance(error, OSError) or "os error" in str(error).lower():
                raise _told(self.folder, error) from None
            raise

    def commit(self, about: Mapping[str, Any]) -> Statistics:
        """Move the folder to its place and open it; one that is there already stays."""
        try:
            (self._partial / ABOUT).write_text(json.dumps(about, indent=1), encoding="utf-8")
            os.rename(self._partial, self.folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise _told(self.folder, error) from None
        return Statistics(self.folder)


def _told(folder: Path, error: Exception) -> Exception:
    number = getattr(error, "errno", None)
    kept = folder.parent == statistics_cache()
    if number in (errno.ENOSPC, errno.EDQUOT) or f"os error {errno.ENOSPC}" in str(error).lower():
        fix = "set EVOMERGE_CACHE to a folder on another disk" if kept else "name a folder on another disk"
        return InfrastructureError(
            f"{folder.parent}: the disk is full: the statistics of a model could not be written; make room, or {fix}"
        )
    reason = getattr(error, "strerror", None) or error
    fix = "set EVOMERGE_CACHE to another folder" if kept else "name another folder"
    return UserError(f"{folder.parent}: cannot be written: {reason}; {fix}")
