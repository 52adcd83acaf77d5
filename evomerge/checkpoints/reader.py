"""Opening a Hugging Face checkpoint: its config, its tensors, its content."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from evomerge.checkpoints.canonical import canonical
from evomerge.checkpoints.completeness import (
    check_complete,
    input_embedding,
    layer_count,
    output_head,
)
from evomerge.checkpoints.content import cached_content_hash
from evomerge.checkpoints.files import ADAPTER_CONFIG, COMPACT_FILE, CONFIG_FILE, INDEX_FILE, SINGLE_FILE
from evomerge.checkpoints.header import COPYABLE, DTYPE_NAMES, MERGEABLE, TensorInfo, read_header
from evomerge.checkpoints.locate import check_weights, find, find_adapter, is_adapter
from evomerge.checkpoints.model_config import text_config
from evomerge.checkpoints.names import is_outside
from evomerge.checkpoints.open_files import OpenFiles
from evomerge.errors import CheckpointError, at

if TYPE_CHECKING:
    from evomerge.checkpoints.adapters import Adapter

# Decoders that tie their embeddings where config.json does not say (transformers' defaults).
_TIED_BY_DEFAULT = {
    *("bloom", "cohere", "cohere2", "ernie4_5", "ernie4_5_moe", "falcon", "falcon_mamba", "gemma", "gemma2"),
    *(
        "gemma3",
        "gemma3_text",
        "gemma3n",
        "gemma3n_text",
        "gpt2",
        "gpt_bigcode",
        "gpt_neo",
        "lfm2",
        "lfm2_moe",
    ),
    *("mamba", "mpt", "opt", "paligemma", "recurrent_gemma", "smollm3", "starcoder2", "vaultgemma", "xglm"),
    *("zamba", "zamba2"),
}


_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A checkpoint whose structure has been checked; its weights are read when asked for.

    Picklable: another process opens the files anew. Reading is thread-safe.

    Attributes:
        name: what the user calls it.
        path: its folder, absolute.
        config: ``config.json``.
        tensors: by canonical name (see `evomerge.checkpoints.canonical`), in order of file and offset; without
            known buffers, and without the head where it is tied to the embedding.
        tied: whether the head shares the embedding's weight.
        num_layers: number of layers.
    """

    name: str
    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    tied: bool
    num_layers: int
    _files: OpenFiles = field(default_factory=OpenFiles, repr=False, compare=False)

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype of most weights (by number of elements)."""
        sizes: Counter[torch.dtype] = Counter()
        for info in self.tensors.values():
            sizes[info.dtype] += info.numel
        return sizes.most_common(1)[0][0]

    @property
    def text_config(self) -> Mapping[str, Any]:
        """The language model's part of ``config.json``; the whole of it unless the model is multimodal."""
        return text_config(self.config)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(info.nbytes for info in self.tensors.values())

    def mapped(self, name: str) -> bool:
        """Whether a tensor lies in a file as it is, so that `tensor` costs nothing before it is read."""
        return name in self.tensors

    def view(self, name: str) -> torch.Tensor | None:
        """Return a flat read-only view of the mapped file; None for a tensor that does not lie in it as it is."""
        info = self.tensors[name]
        if not self.mapped(name) or not info.numel or info.offset % info.dtype.itemsize:
            return None
        return self._files.view(info.file, info.offset, info.nbytes, info.dtype)

    def read_dtype(self, name: str) -> torch.dtype:
        """The dtype in which `read_into` and `tensor` deliver: the stored one, wider for computed tensors."""
        return self.tensors[name].dtype

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor in its own shape and dtype, as a read-only view of the mapped file.

        Writing to it kills the process. Its pages count as resident once touched; `read_into` streams.
        """
        info = self.tensors[name]
        return self._files.view(info.file, info.offset, info.nbytes, info.dtype).reshape(info.shape)

    def read_into(self, name: str, start: int, out: torch.Tensor) -> torch.Tensor:
        """Fill `out` with the elements of a tensor from the flat index `start` on, and return it.

        Args:
            name: of the tensor.
            start: flat index of the first element.
            out: one-dimensional, contiguous, on the CPU, of the dtype that `read_dtype` tells.
        """
        self._check_reading(name, start, out)
        info = self.tensors[name]
        if out.numel():
            buffer = out.view(torch.uint8).numpy().data
            self._files.read_into(info.file, info.offset + start * info.dtype.itemsize, buffer)
        return out

    def _check_reading(self, name: str, start: int, out: torch.Tensor) -> None:
        dtype, numel = self.read_dtype(name), self.tensors[name].numel
        if out.dtype != dtype or out.dim() != 1 or not out.is_contiguous():
            raise ValueError(f"'{name}' is {dtype}; the buffer must be flat, contiguous and of that dtype")
        if start < 0 or start + out.numel() > numel:
            raise ValueError(f"'{name}' has {numel} elements, not {start} to {start + out.numel()}")

    @cached_property
    def repeats_embedding(self) -> bool:
        """Whether head and embedding are the same, byte for byte: tied, or two equal tensors."""
        return self.tied or _equal_ends(self)

    @property
    def sha256(self) -> str:
        """Hash of the content, tensors and config: independent of sharding and folder (`content_hash`).

        The first call reads every tensor once, and remembers the result in the user's cache folder.

        Raises:
            CheckpointError: a tensor has NaN or infinite values.
        """
        # A cached_property of Python 3.11 has one lock for all instances; parents are hashed side by side.
        if "_sha256" not in self.__dict__:
            self.__dict__["_sha256"] = self._content_hash()
        return str(self.__dict__["_sha256"])

    def _content_hash(self) -> str:
        sources = {self.path / CONFIG_FILE, *(info.file for info in self.tensors.values())}
        return cached_content_hash(self.tensors, self.config, self._files, sources)

    def close(self) -> None:
        """Close the files; the next read opens them anew."""
        self._files.close()

    def check_finite(self) -> None:
        """Raise CheckpointError, naming file, tensor and count, if a weight is NaN or infinite."""
        _ = self.sha256


def open_checkpoint(
    source: str | Path,
    *,
    revision: str | None = None,
    adapter: str | None = None,
    adapter_revision: str | None = None,
    name: str = "",
    base: Checkpoint | None = None,
) -> Checkpoint:
    """Open a checkpoint and check its structure: headers, index, layers, embedding, head; no weights yet.

    With an adapter, and for a folder that is one, the result reads as the adapted model: changed tensors are
    computed in float32 chunk by chunk (`AdaptedCheckpoint`).

    Args:
        source: a folder or a hub id (see `locate`): of a model, or of a LoRA adapter.
        revision: of a hub id.
        adapter: folder or hub id of a LoRA adapter to lay on it.
        adapter_revision: of the adapter's hub id.
        name: what the user calls it; the folder's or repository's name if empty.
        base: the opened model under the adapter. Without it, an adapter as `source` names its own base, and
            a model as `source` is opened.

    Raises:
        CheckpointError: one sentence that names the file, the tensor or key, and the fix.
    """
    name = name or Path(adapter or source).expanduser().absolute().name
    path = find(str(source), revision)
    if is_adapter(path) and adapter is not None:
        raise CheckpointError(
            f"{source}: is a LoRA adapter itself, and an adapter '{adapter}' is given; name the model under it"
        )
    if adapter is None and not is_adapter(path):
        check_weights(path, str(source))
        return _open_folder(path, name)
    from evomerge.checkpoints.adapted import adapt
    from evomerge.checkpoints.adapters import read_adapter

    if adapter is None:
        read = read_adapter(path)
        under = base or _own_base(read)
    else:
        read = read_adapter(find_adapter(adapter, adapter_revision))
        under = base or open_checkpoint(source, revision=revision)
    return adapt(under, read, name=name)


def _own_base(adapter: Adapter) -> Checkpoint:
    """Open the model that an adapter says it was trained on."""
    key = at(adapter.path / ADAPTER_CONFIG, "base_model_name_or_path")
    if adapter.base is None:
        raise CheckpointError(
            f"{key}this key is missing; say which model is under the adapter (source: MODEL, adapter: FOLDER)"
        )
    try:
        folder = find(adapter.base, None if Path(adapter.base).exists() else adapter.base_revision)
        if is_adapter(folder):
            raise CheckpointError(f"{folder}: is an adapter itself")
        check_weights(folder, adapter.base)
    except CheckpointError as error:
        raise CheckpointError(
            f"{key}the model under the adapter cannot be used: {error} (or say where it is: source: MODEL, "
            "adapter: FOLDER)"
        ) from None
    return _open_folder(folder, folder.name)


def _open_folder(path: Path, name: str) -> Checkpoint:
    if (path / COMPACT_FILE).is_file():
        raise CheckpointError(
            f"{path}: is a compact folder, which holds equal tensors once; 'evomerge convert {path} NEW_FOLDER' writes "
            "the ordinary model"
        )
    config = read_object(path / CONFIG_FILE)
    _refuse_quantised(path, config)
    infos = canonical(read_files(path), config)
    for tensor, info in infos.items():
        if info.dtype not in (COPYABLE if is_outside(tensor) else MERGEABLE):
            raise CheckpointError(
                f"{info.file}: '{info.name}' has dtype {DTYPE_NAMES[info.dtype]}, which cannot be merged; "
                "convert the checkpoint to bfloat16, float16 or float32"
            )
    num_layers = layer_count(config, path / CONFIG_FILE, infos)
    tied = _is_tied(path, config, infos)
    check_complete(infos, config, tied=tied, place=path)
    checkpoint = Checkpoint(name, path, config, infos, tied, num_layers)
    return _without_tied_head(checkpoint) if tied else checkpoint


def read_object(file: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        CheckpointError: it is missing, cannot be read, or holds something else.
    """
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{file}: is missing; the folder is not a complete Hugging Face checkpoint"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{file}: should hold a JSON object, holds {type(data).__name__}")
    return data


def _refuse_quantised(path: Path, config: dict[str, Any]) -> None:
    settings = config.get("quantization_config")
    if settings:
        kind = settings.get("quant_method", "unknown") if isinstance(settings, dict) else "unknown"
        raise CheckpointError(
            f"{at(path / CONFIG_FILE, 'quantization_config')}the weights are quantised ({kind}) and cannot "
            "be merged; use the checkpoint they were quantised from, or dequantise it first"
        )


def read_files(path: Path) -> Iterable[TensorInfo]:
    """Return all tensors of the single file or of the index's shards, by file and offset.

    A `model.safetensors` wins over an index, as it does in transformers.
    """
    if (path / SINGLE_FILE).exists():
        return read_header(path / SINGLE_FILE)
    index = path / INDEX_FILE
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{at(index, 'weight_map')}should map tensor names to files")
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(
                f"{at(index, 'weight_map')}'{tensor}' lies in {shard!r}, which is no file name"
            )
    found: dict[str, TensorInfo] = {}
    for shard in sorted(set(weight_map.values())):
        if not (path / shard).exists():
            tensor = next(name for name, file in weight_map.items() if file == shard)
            raise CheckpointError(
                f"{path / shard}: is missing; {INDEX_FILE} says that it holds '{tensor}' and others; "
                "download it again"
            )
        for info in read_header(path / shard):
            if weight_map.get(info.name) != shard:
                said = weight_map.get(info.name)
                where = "does not list it" if said is None else f"says it lies in {said}"
                raise CheckpointError(
                    f"{path / shard}: holds the tensor '{info.name}', but {INDEX_FILE} {where}"
                )
            found[info.name] = info
    for tensor, shard in weight_map.items():
        if tensor not in found:
            raise CheckpointError(
                f"{path / shard}: lacks the tensor '{tensor}' that {INDEX_FILE} says it holds"
            )
    return found.values()


def _is_tied(path: Path, config: dict[str, Any], tensors: dict[str, TensorInfo]) -> bool:
    said = config.get("tie_word_embeddings")
    if said is None:
        said = text_config(config).get("tie_word_embeddings")
    if said is None:
        return config.get("model_type") in _TIED_BY_DEFAULT or output_head(tensors) is None
    if not isinstance(said, bool):
        raise CheckpointError(
            f"{at(path / CONFIG_FILE, 'tie_word_embeddings')}{said!r} is neither true nor false"
        )
    return said


def _without_tied_head(checkpoint: Checkpoint) -> Checkpoint:
    """Drop a head that repeats the embedding; one that differs from it makes the checkpoint untied.

    transformers decides the same when it loads such a folder.
    """
    head, embedding = output_head(checkpoint.tensors), input_embedding(checkpoint.tensors)
    if head is None or embedding is None:
        return checkpoint
    if not _equal_ends(checkpoint):
        _log.warning(
            "%s: config.json says that the embeddings are tied, but '%s' differs from '%s'; both are used",
            *(checkpoint.path, head, embedding),
        )
        return replace(checkpoint, tied=False)
    del checkpoint.tensors[head]
    return checkpoint


def _equal_ends(checkpoint: Checkpoint) -> bool:
    head, embedding = output_head(checkpoint.tensors), input_embedding(checkpoint.tensors)
    if head is None or embedding is None or not (checkpoint.mapped(head) and checkpoint.mapped(embedding)):
        return False
    ours, theirs = checkpoint.tensors[head], checkpoint.tensors[embedding]
    same = (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    step = 1 << 24
    for start in range(0, ours.numel if same else 0, step):
        one, other = (
            checkpoint.tensor(name).view(-1)[start : start + step].view(torch.uint8)
            for name in (head, embedding)
        )
        if not torch.equal(one, other):
            return False
    return same
