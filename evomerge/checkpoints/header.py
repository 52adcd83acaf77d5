"""The header of a safetensors file, read strictly and written.

Format: https://huggingface.co/docs/safetensors: eight bytes with the header's length (little endian), a JSON
header, then the tensors' bytes without gaps.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from evomerge.errors import CheckpointError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MERGEABLE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
COPYABLE = (*MERGEABLE, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)

_MAX_HEADER = 100_000_000
_LFS = b"version https://git-lfs"


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor's bytes lie.

    Attributes:
        name: on-disk name.
        shape: sizes of the dimensions.
        dtype: as stored.
        file: the safetensors file.
        offset: first byte, counted from the start of the file.
        nbytes: number of bytes.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    offset: int
    nbytes: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def read_header(file: Path) -> list[TensorInfo]:
    """Read a file's header and return its tensors by offset.

    Raises:
        CheckpointError: the file is missing, truncated, has bytes left over, or its header contradicts
            itself; names the file and the tensor.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            rest = stream.read(length if length <= min(size - 8, _MAX_HEADER) else len(_LFS))
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from None
    if (start + rest).startswith(_LFS):
        raise CheckpointError(
            f"{file}: is a Git LFS pointer, not the weights; run 'git lfs pull' in its folder"
        )
    if len(start) < 8 or 8 + length > size:
        raise CheckpointError(
            f"{file}: truncated: the header should end at byte {8 + length if len(start) == 8 else 8:,}, "
            f"the file has {size:,}; download or copy it again"
        )
    if length > _MAX_HEADER:
        raise CheckpointError(f"{file}: not a safetensors file: its header would have {length:,} bytes")
    entries = _parse(file, rest)
    tensors = [_tensor(file, name, entry, 8 + length) for name, entry in entries.items()]
    tensors.sort(key=lambda info: (info.offset, info.nbytes))
    _check_cover(file, tensors, 8 + length, size)
    return tensors


def build_header(tensors: Sequence[tuple[str, tuple[int, ...], torch.dtype]]) -> tuple[bytes, list[int]]:
    """Return a file's first bytes (length and header) and the offset of each tensor in the file.

    Tensors lie in the given order without gaps; the header is padded with spaces to a multiple of 8 bytes.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    ends = []
    position = 0
    for name, shape, dtype in tensors:
        end = position + math.prod(shape) * dtype.itemsize
        entries[name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [position, end],
        }
        ends.append(end)
        position = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    data = 8 + len(text)
    return struct.pack("<Q", len(text)) + text, [data + start for start in [0, *ends[:-1]][: len(ends)]]


def _parse(file: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        mapping = dict(pairs)
        if len(mapping) < len(pairs):
            twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
            raise CheckpointError(f"{file}: the header lists '{twice}' twice")
        return mapping

    try:
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError):
        raise CheckpointError(f"{file}: not a safetensors file: its header is not valid JSON") from None
    if not isinstance(entries, dict):
        raise CheckpointError(f"{file}: not a safetensors file: its header is not a JSON object")
    entries.pop("__metadata__", None)
    return entries


def _tensor(file: Path, name: str, entry: Any, data: int) -> TensorInfo:
    try:
        dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, start, end]
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(
            f"{file}: the header of '{name}' needs dtype, shape and two data_offsets, it says {entry!r}"
        ) from None
    if any(type(number) is not int or number < 0 for number in numbers):
        raise CheckpointError(f"{file}: '{name}' has a shape or offset that is not a whole number: {entry!r}")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(
            f"{file}: '{name}' has dtype {dtype}, which cannot be merged; "
            "convert the checkpoint to bfloat16, float16 or float32"
        )
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    if end - start != nbytes:
        raise CheckpointError(
            f"{file}: '{name}' of shape {shape} and dtype {dtype} needs {nbytes:,} bytes, "
            f"its offsets span {end - start:,}"
        )
    return TensorInfo(name, tuple(shape), DTYPES[dtype], file, data + start, nbytes)


def _check_cover(file: Path, tensors: list[TensorInfo], start: int, size: int) -> None:
    """Refuse overlaps and gaps between tensors, a data part that ends early, and trailing bytes."""
    position, previous = start, "the header"
    for info in tensors:
        if info.offset < position:
            raise CheckpointError(f"{file}: the bytes of '{info.name}' overlap those of {previous}")
        if info.offset > position:
            raise CheckpointError(f"{file}: {info.offset - position:,} bytes before '{info.name}' are unused")
        position, previous = info.offset + info.nbytes, f"'{info.name}'"
    if position > size:
        first = next(info for info in tensors if info.offset + info.nbytes > size)
        raise CheckpointError(
            f"{file}: truncated: the header promises {position:,} bytes, the file has {size:,} and ends in "
            f"'{first.name}'; download or copy it again"
        )
    if position < size:
        raise CheckpointError(f"{file}: {size - position:,} bytes are left over after the last tensor")
