"""A checkpoint's content hash and finiteness, found in one pass over its bytes and remembered on disk."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from evomerge.checkpoints.canonical import language_prefix
from evomerge.checkpoints.header import DTYPE_NAMES, TensorInfo
from evomerge.checkpoints.open_files import OpenFiles
from evomerge.environment import cache_folder
from evomerge.errors import CheckpointError

_CHUNK = 4 << 20
_VERSION = 2

# Unsigned type of a float's bits, mask of its exponent, mask of its mantissa.
_BITS: dict[torch.dtype, tuple[type[np.unsignedinteger[Any]], int, int]] = {
    torch.float64: (np.uint64, 0x7FF0 << 48, (1 << 52) - 1),
    torch.float32: (np.uint32, 0x7F80 << 16, (1 << 23) - 1),
    torch.bfloat16: (np.uint16, 0x7F80, 0x7F),
    torch.float16: (np.uint16, 0x7C00, 0x3FF),
}

# Timestamps of file systems are coarse: a file this young could change again without a new one.
_SETTLED_NS = 1_000_000_000

_VOLATILE = {
    *("transformers_version", "_name_or_path", "name_or_path", "_commit_hash", "_from_model_config"),
    *("torch_dtype", "dtype", "use_cache", "output_attentions", "output_hidden_states", "return_dict"),
    *("_attn_implementation", "_attn_implementation_autoset", "attn_implementation", "torchscript"),
}


def content_hash(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any], files: OpenFiles) -> str:
    """Return the sha256 of a checkpoint's content; refuse NaN and infinity.

    The hash covers, sorted by canonical name, a line ``name dtype shape sha256(bytes)`` for each tensor, before
    them the prefix of a multimodal model's language part, and the canonical JSON of the config without the keys
    that say nothing about the model (versions, paths, the declared dtype). It depends neither on the sharding
    nor on the folder. Every tensor is read once, in chunks of 4 MiB.

    Raises:
        CheckpointError: names the file, the first tensor with a non-finite value, and how many it has.
    """
    names = sorted(tensors)
    ordered = [tensors[name] for name in names]
    buffers = threading.local()
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        scans = list(pool.map(lambda info: _scan(info, files, buffers), ordered))
    bad = [(info, nans, infs) for info, (_, nans, infs) in zip(ordered, scans, strict=True) if nans or infs]
    if bad:
        info, nans, infs = bad[0]
        counts = " and ".join(f"{n:,} {what}" for n, what in ((nans, "NaN"), (infs, "infinite")) if n)
        others = f"; {len(bad) - 1} further tensors have such values too" if len(bad) > 1 else ""
        raise CheckpointError(
            f"{info.file}: tensor '{info.name}' has {counts} values out of {info.numel:,}{others}; "
            "the checkpoint is broken, use another"
        )
    lines = [
        f"{name} {DTYPE_NAMES[info.dtype]} {list(info.shape)} {digest}\n"
        for name, info, (digest, _, _) in zip(names, ordered, scans, strict=True)
    ]
    kept = {key: value for key, value in config.items() if key not in _VOLATILE}
    text = language_prefix(tensors) + "".join(lines) + json.dumps(kept, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _scan(info: TensorInfo, files: OpenFiles, buffers: threading.local) -> tuple[str, int, int]:
    """Return a tensor's sha256 and its numbers of NaN and infinite values."""
    if not hasattr(buffers, "data"):
        buffers.data, buffers.exponent = _pages(_CHUNK), _pages(_CHUNK)
    kind, exponent, mantissa = _BITS.get(info.dtype, (np.uint8, 0, 0))
    digest = hashlib.sha256()
    nans = infs = 0
    for start in range(0, info.nbytes, _CHUNK):
        size = min(_CHUNK, info.nbytes - start)
        data = buffers.data[:size]
        files.read_into(info.file, info.offset + start, memoryview(data))
        digest.update(data)
        if not exponent:
            continue
        bits, masked = data.view(kind), buffers.exponent[:size].view(kind)
        np.bitwise_and(bits, kind(exponent), out=masked)
        if masked.max() == exponent:
            special = bits[masked == exponent]
            infinite = int(np.count_nonzero((special & kind(mantissa)) == 0))
            infs += infinite
            nans += len(special) - infinite
    return digest.hexdigest(), nans, infs


def _pages(size: int) -> npt.NDArray[np.uint8]:
    """Return bytes that go back to the system with the array; malloc would keep some of each thread's."""
    return np.frombuffer(mmap.mmap(-1, size), np.uint8)


def cached_content_hash(
    tensors: Mapping[str, TensorInfo], config: Mapping[str, Any], files: OpenFiles, sources: Iterable[Path]
) -> str:
    """Return `content_hash`, from the cache on disk if none of the `sources` has changed since.

    An entry belongs to the absolute paths, sizes, modification times and inodes of all files that went in.
    Only hashes of finite checkpoints are remembered. A cache that cannot be read or written is ignored.
    """
    sources = list(sources)
    state = _state(sources)
    entry = _entry(state)
    if (known := _recall(entry)) is not None:
        return known
    started = time.time_ns()
    digest = content_hash(tensors, config, files)
    settled = all(modified < started - _SETTLED_NS for _, _, modified, _ in state)
    if settled and _state(sources) == state:
        _remember(entry, digest)
    return digest


def _state(sources: Iterable[Path]) -> list[tuple[str, int, int, int]]:
    states = []
    for file in sorted(sources):
        try:
            stat = file.stat()
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from None
        states.append((str(file.absolute()), stat.st_size, stat.st_mtime_ns, stat.st_ino))
    return states


def _entry(state: list[tuple[str, int, int, int]]) -> Path:
    key = hashlib.sha256(json.dumps([_VERSION, state]).encode()).hexdigest()
    return cache_folder() / "checkpoints" / f"{key}.json"


def _recall(entry: Path) -> str | None:
    try:
        digest = json.loads(entry.read_text(encoding="utf-8"))["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return digest if isinstance(digest, str) and len(digest) == 64 else None


def _remember(entry: Path, digest: str) -> None:
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=entry.parent, suffix=".tmp", delete=False) as stream:
            stream.write(json.dumps({"sha256": digest}))
        os.replace(stream.name, entry)
    except OSError:
        return
