"""Folders that hold each of a model's tensors once: those of a layer that comes several times, say.

Such a folder has ``evomerge_compact.json`` in place of ``config.json``, so that nothing takes it for a model whose
other layers are missing:

    {"evomerge_compact": 1, "config": {…}, "tensors": {"name in the model": "name in the files", …},
     "outside": ["name of a tensor outside the language model", …]}

Weights, tokenizer and all else are as in any checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from evomerge.checkpoints.files import COMPACT_FILE
from evomerge.checkpoints.header import TensorInfo
from evomerge.checkpoints.locate import check_weights
from evomerge.checkpoints.reader import read_files, read_object
from evomerge.checkpoints.writer import CheckpointWriter
from evomerge.errors import CheckpointError, at

VERSION = 1


@dataclass(frozen=True)
class CompactFolder:
    """What a compact folder holds.

    Attributes:
        path: the folder.
        config: the model's ``config.json``.
        tensors: the model's tensors in order: name → name in the files.
        outside: names of the model's tensors outside its language model.
        infos: the tensors of the files, by name.
    """

    path: Path
    config: dict[str, Any]
    tensors: Mapping[str, str]
    outside: frozenset[str]
    infos: Mapping[str, TensorInfo]

    def read(self, name: str, start: int, out: torch.Tensor) -> torch.Tensor:
        """Fill `out`, in the tensor's own dtype, with a tensor's elements from `start` on; return it.

        Args:
            name: of the tensor in the files.
        """
        info = self.infos[name]
        with info.file.open("rb", buffering=0) as file:
            file.seek(info.offset + start * info.dtype.itemsize)
            data = out.view(-1).view(torch.uint8).numpy().data
            done = 0
            while done < len(data):
                count = file.readinto(data[done:])
                if not count:
                    raise CheckpointError(f"{info.file}: ends before '{name}' does")
                done += count
        return out


def is_compact(folder: Path) -> bool:
    """Whether a folder is a compact one."""
    return (folder / COMPACT_FILE).is_file()


def open_compact(path: Path | str) -> CompactFolder:
    """Open a compact folder.

    Raises:
        CheckpointError: it is none, or damaged.
    """
    folder = Path(path).expanduser()
    data = read_object(folder / COMPACT_FILE)
    if data.get("evomerge_compact") != VERSION:
        raise CheckpointError(
            f"{at(folder / COMPACT_FILE, 'evomerge_compact')}is {data.get('evomerge_compact')!r}; this version "
            f"reads {VERSION}"
        )
    config, tensors = data.get("config"), data.get("tensors")
    if not isinstance(config, dict) or not isinstance(tensors, dict) or not tensors:
        raise CheckpointError(f"{folder / COMPACT_FILE}: should hold a 'config' and 'tensors'")
    check_weights(folder, str(path))
    infos = {info.name: info for info in read_files(folder)}
    missing = next((name for name in tensors.values() if name not in infos), None)
    if missing is not None:
        raise CheckpointError(f"{folder}: tensor '{missing}' is missing; {COMPACT_FILE} names it")
    return CompactFolder(folder, config, tensors, frozenset(data.get("outside", [])), infos)


def description(tensors: Mapping[str, str], outside: Sequence[str]) -> dict[str, Any]:
    """Return what a compact folder's own file says besides the config; see `CompactFolder`."""
    return {"evomerge_compact": VERSION, "tensors": dict(tensors), "outside": list(outside)}


def expand(folder: CompactFolder, out: Path, *, max_shard_size: int) -> Path:
    """Write the ordinary checkpoint that a compact folder stands for: the bytes of one that was never compact.

    Raises:
        UserError: `out` is taken.
        InfrastructureError: the disk is full.
    """
    stored = {name: folder.infos[source] for name, source in folder.tensors.items()}
    layout = [(name, info.shape, info.dtype) for name, info in stored.items()]
    with CheckpointWriter(
        out, layout, config=folder.config, donor=folder.path, max_shard_size=max_shard_size
    ) as writer:
        for name, info in stored.items():
            for start, piece in writer.pieces(name):
                folder.read(info.name, start, piece)
        notes = [file for file in folder.path.glob("evomerge_*") if file.name != COMPACT_FILE]
        return writer.commit({file.name: file.read_text(encoding="utf-8") for file in notes})
