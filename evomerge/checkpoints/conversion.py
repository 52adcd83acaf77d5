"""Pickled PyTorch weights become a folder of safetensors files, shard by shard, without running their code."""

from __future__ import annotations

import gc
import pickle
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from evomerge.checkpoints.adapter_writer import write_adapter
from evomerge.checkpoints.compact import expand, is_compact, open_compact
from evomerge.checkpoints.files import (
    ADAPTER_CONFIG,
    CONFIG_FILE,
    INDEX_FILE,
    PICKLED_ADAPTER,
    PICKLED_FILE,
    PICKLED_INDEX,
    SINGLE_FILE,
    explain_weights,
)
from evomerge.checkpoints.header import DTYPE_NAMES
from evomerge.checkpoints.locate import find, is_adapter
from evomerge.checkpoints.names import parse
from evomerge.checkpoints.reader import read_object
from evomerge.checkpoints.tokenizer import copy_tokenizer
from evomerge.checkpoints.writer import CheckpointWriter, parse_size
from evomerge.errors import CheckpointError, UserError, at

_CHUNK = 1 << 22


def convert(
    source: str | Path,
    out: str | Path,
    *,
    revision: str | None = None,
    max_shard_size: int | str = "5GB",
) -> Path:
    """Write a model or an adapter with pickled weights, or a compact one, as an ordinary folder.

    The pickles are read with torch's restricted unpickler, which makes tensors and nothing else, and mapped
    into memory where their format allows it. Tensors keep their bytes; a head that is the embedding itself is
    left out of a tied model, as transformers does.

    A compact folder (`evomerge.checkpoints.compact`) becomes the model that it stands for.

    Args:
        source: a compact folder, or a folder or hub id with ``pytorch_model.bin`` (or shards and an index) or
            ``adapter_model.bin``.
        out: the folder to make; it must not exist, or be empty.
        revision: of a hub id.
        max_shard_size: bytes of weights a file.

    Raises:
        CheckpointError: no such weights, a file that needs code to be read, that is damaged, or that holds
            anything but tensors by name.
        UserError: `out` is taken.
        InfrastructureError: the disk is full.
    """
    out = Path(out)
    shard_bytes = parse_size(max_shard_size)
    local = Path(source).expanduser()
    folder = local if is_compact(local) else find(str(source), revision, pickled=True)
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UserError(f"{out}: exists already and is not an empty folder; name a new one")
    if is_compact(folder):
        return expand(open_compact(folder), out, max_shard_size=shard_bytes)
    return _adapter(folder, source, out) if is_adapter(folder) else _model(folder, source, out, shard_bytes)


def _model(folder: Path, source: str | Path, out: Path, max_shard_size: int) -> Path:
    config = read_object(folder / CONFIG_FILE)
    files = _files(folder, source)
    tied = config.get("tie_word_embeddings") is True
    layout: list[tuple[str, tuple[int, ...], torch.dtype]] = []
    homes: dict[str, Path] = {}
    for file in files:
        weights = _load(file)
        for name, tensor in weights.items():
            if name in homes:
                raise CheckpointError(f"{file}: '{name}' lies in {homes[name].name} too")
            if tied and _repeats_embedding(name, weights):
                continue
            homes[name] = file
            layout.append((name, tuple(tensor.shape), tensor.dtype))
        del weights
    if not layout:
        raise CheckpointError(f"{files[0]}: holds no tensors")
    with CheckpointWriter(out, layout, config=config, donor=folder, max_shard_size=max_shard_size) as writer:
        for file in files:
            weights = _load(file)
            for name in [name for name, home in homes.items() if home == file]:
                start = 0
                for piece in _pieces(weights[name]):
                    writer.write(name, start, piece)
                    start += piece.numel()
            del weights
            gc.collect()
        return writer.commit()


def _adapter(folder: Path, source: str | Path, out: Path) -> Path:
    file = folder / PICKLED_ADAPTER
    if not file.is_file():
        _refuse(folder, source, adapter=True)
    weights = _load(file)
    tensors = [(name, tuple(t.shape), t.dtype, _pieces(t)) for name, t in weights.items()]
    write_adapter(out, read_object(folder / ADAPTER_CONFIG), tensors)
    copy_tokenizer(out, folder)
    return out


def _files(folder: Path, source: str | Path) -> list[Path]:
    if (folder / SINGLE_FILE).exists() or (folder / INDEX_FILE).exists():
        _refuse(folder, source)
    if (folder / PICKLED_FILE).is_file():
        return [folder / PICKLED_FILE]
    if not (folder / PICKLED_INDEX).is_file():
        _refuse(folder, source)
    index = folder / PICKLED_INDEX
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{at(index, 'weight_map')}should map tensor names to files")
    shards = sorted({str(shard) for shard in weight_map.values()})
    for shard in shards:
        if Path(shard).name != shard:
            raise CheckpointError(f"{at(index, 'weight_map')}{shard!r} is no file name")
        if not (folder / shard).is_file():
            raise CheckpointError(
                f"{folder / shard}: is missing; {PICKLED_INDEX} names it; download it again"
            )
    return [folder / shard for shard in shards]


def _refuse(folder: Path, source: str | Path, *, adapter: bool = False) -> None:
    names = [entry.name for entry in folder.iterdir()]
    raise CheckpointError(f"{source}: {explain_weights(names, str(source), pickled=True, adapter=adapter)}")


def _load(file: Path) -> dict[str, Tensor]:
    """Unpickle a file of tensors by name, mapped into memory where its format can be."""
    try:
        try:
            data = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            data = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        why = (
            f"it would run code to be opened ({code[1]})" if code else "it is damaged, or no file of tensors"
        )
        raise CheckpointError(f"{file}: refused: {why}; use a safetensors version of the model") from None
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, AssertionError) as error:
        said = (
            "" if isinstance(error, KeyError) else str(error).strip()
        )  # a KeyError says a number of the format
        reason = (said.splitlines() or ["it is damaged, or no file of tensors"])[0]
        raise CheckpointError(f"{file}: cannot be read: {reason}; download or copy it again") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{file}: holds {type(data).__name__}, not tensors by name")
    for name, tensor in data.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"{file}: {name!r} is {type(tensor).__name__}, not a tensor; only plain state dicts are converted"
            )
        if tensor.layout != torch.strided or tensor.dtype not in DTYPE_NAMES or tensor.is_quantized:
            kind = tensor.dtype if tensor.layout == torch.strided else tensor.layout
            raise CheckpointError(
                f"{file}: '{name}' is {str(kind).removeprefix('torch.')}, which safetensors has not"
            )
    return {name: tensor.detach() for name, tensor in data.items()}


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """Yield a tensor's elements in order, in flat contiguous pieces."""
    flat = tensor.reshape(-1)
    for start in range(0, flat.numel(), _CHUNK):
        yield flat[start : start + _CHUNK].contiguous()


def _repeats_embedding(name: str, weights: dict[str, Tensor]) -> bool:
    """Whether a head is the embedding itself: the same elements of the same storage."""
    if parse(name).role != "head":
        return False
    tensor = weights[name]
    return any(
        parse(other).role == "embedding"
        and other_tensor.data_ptr() == tensor.data_ptr()
        and other_tensor.shape == tensor.shape
        and other_tensor.stride() == tensor.stride()
        for other, other_tensor in weights.items()
    )
