"""Writing a checkpoint in pieces: headers first, then every chunk straight to its place."""

from __future__ import annotations

import copy
import errno
import json
import math
import os
import re
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch

from evomerge.checkpoints.files import COMPACT_FILE, CONFIG_FILE, INDEX_FILE, SINGLE_FILE
from evomerge.checkpoints.header import build_header
from evomerge.checkpoints.model_config import set_dtype
from evomerge.checkpoints.pieces import PIECE, PieceFile, PiecePool, write_at
from evomerge.checkpoints.tokenizer import PROCESSOR_FILES, copy_tokenizer
from evomerge.errors import InfrastructureError, UserError
from evomerge.folders import hidden_beside, lock_folder, remove_abandoned

T = TypeVar("T")

Layout = Sequence[tuple[str, tuple[int, ...], torch.dtype]]
"""Name, shape and dtype of every tensor of a checkpoint, in the order of writing."""

_GENERATION_CONFIG = "generation_config.json"
_FULL = (errno.ENOSPC, errno.EDQUOT)
_UNITS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def parse_size(text: str | int) -> int:
    """Return a number of bytes from text like ``5GB`` (powers of 1000) or ``5GiB`` (powers of 1024)."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?\s*", str(text), re.IGNORECASE)
    size = 0
    if match:
        number, unit, binary = match.groups()
        size = int(float(number) * (1024 if binary else 1000) ** _UNITS[unit.upper()])
    if size < 1:
        raise UserError(f"max shard size {text!r} is not understood; write it like 5GB, 500MB or 2GiB")
    return size


@dataclass(frozen=True)
class _Place:
    file: PieceFile
    offset: int
    numel: int
    dtype: torch.dtype


class CheckpointWriter:
    """Writes one checkpoint folder; nothing is seen of it until `commit` has put it in place.

    A context manager. Everything goes to a hidden folder beside `out`, which `commit` renames to `out`;
    leaving the context without a commit removes it, and the next writer for `out` removes what a killed one
    left behind. `write` may be called from several threads, in any order,
    with chunks of any size; resident memory does not grow with the checkpoint.

    Args:
        out: the folder to make; it must not exist, or be empty.
        layout: every tensor of the checkpoint (a tied head left out), in order.
        config: ``config.json``; its dtype is set to that of most weights.
        donor: folder whose ``generation_config.json``, processor files, tokenizer and chat template are copied byte
            for byte.
        tokenizer_donor: whose tokenizer, if not the donor's.
        chat_template_donor: whose chat template, if not that of the tokenizer's donor.
        generation: ``generation_config.json``, if not the donor's.
        max_shard_size: bytes of weights a file; a larger tensor has a file of its own.
        compact: for a compact folder (`evomerge.checkpoints.compact`), which has no ``config.json``: what its
            ``evomerge_compact.json`` says besides the config.

    Raises:
        UserError: `out` is taken, or cannot be written.
        InfrastructureError: the disk is full; nothing is left behind.
    """

    def __init__(
        self,
        out: Path,
        layout: Layout,
        *,
        config: Mapping[str, Any],
        donor: Path,
        tokenizer_donor: Path | None = None,
        chat_template_donor: Path | None = None,
        generation: Mapping[str, Any] | None = None,
        max_shard_size: int = 5_000_000_000,
        compact: Mapping[str, Any] | None = None,
    ) -> None:
        self._compact = compact
        self.out = Path(os.path.abspath(out))
        self._layout = [(name, tuple(shape), dtype) for name, shape, dtype in layout]
        self._config = dict(config)
        self._donor = donor
        self._tokenizer_donor = tokenizer_donor or donor
        self._chat_template_donor = chat_template_donor
        self._generation = generation
        self._shards = plan_shards(self._layout, max_shard_size)
        self._total = sum(_nbytes(tensor) for tensor in self._layout)
        self._folder = hidden_beside(self.out)
        self._made: list[Path] = []
        self._descriptors: list[int] = []
        self._folder_lock: int | None = None
        self._files: list[PieceFile] = []
        self._pool = PiecePool(2 * (os.cpu_count() or 1) + 4)
        self._places: dict[str, _Place] = {}
        self._written: dict[str, list[tuple[int, int]]] = {name: [] for name, _, _ in self._layout}
        self._lock = threading.Lock()
        if not layout or len(self._written) < len(self._layout):
            raise ValueError("the layout is empty, or lists a tensor twice")

    def __enter__(self) -> CheckpointWriter:
        try:
            self._refuse_taken()
            self._make_folders()
            self._refuse_full_disk()
            for file, tensors in self._shards.items():
                self._allocate(file, tensors)
            self._copy_companions()
        except OSError as error:
            self._discard()
            raise self._told(error) from None
        except BaseException:
            self._discard()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._discard()

    def write(self, name: str, start_element: int, chunk: torch.Tensor) -> None:
        """Write consecutive elements of a tensor.

        Args:
            name: of the tensor.
            start_element: flat index of the chunk's first element.
            chunk: contiguous, on the CPU, in the tensor's dtype; its shape does not matter.

        Raises:
            ValueError: wrong dtype, not contiguous, or beyond the tensor's end.
            InfrastructureError: the disk is full.
        """
        place = self._places[name]
        end = start_element + chunk.numel()
        if chunk.dtype != place.dtype or not chunk.is_contiguous():
            raise ValueError(f"'{name}' takes contiguous chunks of {place.dtype}, not {chunk.dtype}")
        if start_element < 0 or end > place.numel:
            raise ValueError(f"'{name}' has {place.numel} elements, not {start_element} to {end}")
        if start_element == end:
            return
        data = chunk.detach().view(-1).view(torch.uint8).numpy().data
        position = place.offset + start_element * place.dtype.itemsize
        try:
            write_at(place.file.descriptor, data, position)
        except OSError as error:
            raise self._told(error) from None
        with self._lock:
            self._written[name].append((start_element, end))

    def pieces(self, name: str) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield (first element, buffer) over a tensor, in order; fill each buffer before asking for the next.

        The faster way to write: buffers are written around the page cache, while others are filled. Another thread
        may write another tensor at the same time.

        Raises:
            InfrastructureError: the disk is full.
        """
        place = self._places[name]
        itemsize = place.dtype.itemsize
        position, end = place.offset, place.offset + place.numel * itemsize
        while position < end:
            nbytes = min(end, (position // PIECE + 1) * PIECE) - position
            buffer = self._told_of(self._pool.take)
            filled = False
            try:
                yield (position - place.offset) // itemsize, buffer.at(position, nbytes).view(place.dtype)
                filled = True
            finally:
                if not filled:
                    self._pool.give_back(buffer)
            self._pool.submit(place.file, buffer, position, nbytes)
            position += nbytes
        with self._lock:
            self._written[name].append((0, place.numel))

    def commit(self, extra: Mapping[str, str] | None = None) -> Path:
        """Finish the checkpoint, move it to `out`, and return that path.

        Args:
            extra: further text files that belong to the checkpoint, by name.

        Raises:
            ValueError: a tensor has not been written from end to end, once.
        """
        self._check_written()
        try:
            self._pool.wait()
            for name, text in (extra or {}).items():
                (self._folder / name).write_text(text, encoding="utf-8")
            self._write_structure()
            for descriptor in self._descriptors:
                os.fsync(descriptor)
            for path in [*self._folder.rglob("*"), self._folder]:
                if path.suffix != ".safetensors":
                    _sync(path)
            os.rename(self._folder, self.out)
            _sync(self.out.parent)
        except OSError as error:
            raise self._told(error) from None
        self._made.clear()
        self._close()
        return self.out

    def _refuse_taken(self) -> None:
        if not os.path.lexists(self.out):
            return
        if self.out.is_symlink() or not self.out.is_dir():
            raise UserError(f"{self.out}: is not a folder; choose another output folder")
        if any(self.out.iterdir()):
            raise UserError(
                f"{self.out}: is not empty; choose another output folder, or remove this one first"
            )

    def _make_folders(self) -> None:
        remove_abandoned(self.out)
        missing = [parent for parent in self.out.parents if not parent.exists()]
        for folder in (*reversed(missing), self._folder):
            folder.mkdir()
            self._made.append(folder)
        self._folder_lock = lock_folder(self._folder)

    def _refuse_full_disk(self) -> None:
        if shutil.disk_usage(self._folder).free < self._total:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _allocate(self, file: str, tensors: Layout) -> None:
        header, offsets = build_header(tensors)
        descriptor = os.open(self._folder / file, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self._descriptors.append(descriptor)
        opened = PieceFile(self._folder / file, descriptor)
        self._files.append(opened)
        _reserve(descriptor, len(header) + sum(_nbytes(tensor) for tensor in tensors))
        write_at(descriptor, memoryview(header), 0)
        for (name, shape, dtype), offset in zip(tensors, offsets, strict=True):
            self._places[name] = _Place(opened, offset, math.prod(shape), dtype)

    def _check_written(self) -> None:
        for name, place in self._places.items():
            position = 0
            for start, end in sorted(self._written[name]):
                if start != position:
                    what = "was not written" if start > position else "was written twice"
                    raise ValueError(f"'{name}': element {min(start, position)} {what}")
                position = end
            if position != place.numel:
                raise ValueError(f"'{name}': element {position} was not written")

    def _copy_companions(self) -> None:
        for name in (_GENERATION_CONFIG, *PROCESSOR_FILES):
            if (self._donor / name).is_file():
                shutil.copyfile(self._donor / name, self._folder / name)
        if self._generation is not None:
            _write_json(self._folder / _GENERATION_CONFIG, self._generation)
        copy_tokenizer(self._folder, self._tokenizer_donor, self._chat_template_donor)

    def _write_structure(self) -> None:
        """Write the files without which the folder is no checkpoint."""
        if self._compact is None:
            _write_json(self._folder / CONFIG_FILE, self._final_config())
        else:
            _write_json(self._folder / COMPACT_FILE, {**self._compact, "config": self._final_config()})
        if list(self._shards) != [SINGLE_FILE]:
            weight_map = {name: file for file, tensors in self._shards.items() for name, _, _ in tensors}
            parameters = sum(math.prod(shape) for _, shape, _ in self._layout)
            _write_json(
                self._folder / INDEX_FILE,
                {
                    "metadata": {"total_parameters": parameters, "total_size": self._total},
                    "weight_map": dict(sorted(weight_map.items())),
                },
            )

    def _final_config(self) -> dict[str, Any]:
        sizes: Counter[torch.dtype] = Counter()
        for _, shape, dtype in self._layout:
            sizes[dtype] += math.prod(shape)
        config = copy.deepcopy(self._config)
        set_dtype(config, sizes.most_common(1)[0][0])
        return config

    def _told(self, error: OSError) -> Exception:
        """Return the one sentence for a failure of the file system."""
        if error.errno in _FULL:
            place = next(path for path in (self._folder, *self._folder.parents) if path.exists())
            held = sum(os.fstat(descriptor).st_blocks * 512 for descriptor in self._descriptors)
            free = shutil.disk_usage(place).free + held
            return InfrastructureError(
                f"{self.out}: the disk is full: the checkpoint needs {self._total:,} bytes, {free:,} are "
                "free; make room or choose another output folder"
            )
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return UserError(
                f"{self.out}: appeared while the checkpoint was written; choose another output folder"
            )
        return UserError(f"{self.out}: cannot be written: {error.strerror}; choose another output folder")

    def _told_of(self, work: Callable[[], T]) -> T:
        try:
            return work()
        except OSError as error:
            raise self._told(error) from None

    def _close(self) -> None:
        self._pool.close()
        self._places.clear()
        while self._files:
            self._files.pop().close()
        while self._descriptors:
            os.close(self._descriptors.pop())
        if self._folder_lock is not None:
            os.close(self._folder_lock)
            self._folder_lock = None

    def _discard(self) -> None:
        self._close()
        shutil.rmtree(self._folder, ignore_errors=True)
        for folder in reversed(self._made):
            if folder != self._folder and folder.exists() and not any(folder.iterdir()):
                folder.rmdir()
        self._made.clear()


def plan_shards(
    layout: Layout, max_shard_size: int
) -> dict[str, list[tuple[str, tuple[int, ...], torch.dtype]]]:
    """Distribute tensors, in order, over files of at most `max_shard_size` bytes, named as transformers does.

    Within a file wider dtypes come first, so that every tensor is aligned.
    """
    shards: list[list[tuple[str, tuple[int, ...], torch.dtype]]] = [[]]
    size = 0
    for tensor in layout:
        if shards[-1] and size + _nbytes(tensor) > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += _nbytes(tensor)
    for shard in shards:
        shard.sort(key=lambda tensor: -tensor[2].itemsize)
    if len(shards) == 1:
        return {SINGLE_FILE: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def _nbytes(tensor: tuple[str, tuple[int, ...], torch.dtype]) -> int:
    return math.prod(tensor[1]) * tensor[2].itemsize


def _reserve(descriptor: int, size: int) -> None:
    """Give a file its size, and its blocks where the file system can reserve them."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except AttributeError:
        os.ftruncate(descriptor, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        os.ftruncate(descriptor, size)


def _write_json(file: Path, data: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
