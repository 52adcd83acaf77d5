"""From what a user writes, a path or a hub id, to a local folder with safetensors weights."""

from __future__ import annotations

import re
from pathlib import Path

from evomerge.checkpoints.files import ADAPTER_CONFIG, CONFIG_FILE, INDEX_FILE, SINGLE_FILE, explain_weights
from evomerge.errors import CheckpointError, SourceNotFound

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def locate(source: str, revision: str | None = None) -> Path:
    """Return the local folder of a checkpoint, downloading it if `source` is a hub id.

    Args:
        source: an existing folder, or a hub id (``org/name`` or ``name``). What starts with ``.``, ``/`` or
            ``~`` is always a path.
        revision: branch, tag or commit of a hub id.

    Returns:
        The absolute path of a folder that holds safetensors weights. Of a hub repository only safetensors,
        configuration, tokenizer and chat template files are fetched, into the standard Hugging Face cache.

    Raises:
        CheckpointError: no such folder or repository, no network, or the weights are in another format.
    """
    folder = find(source, revision)
    if is_adapter(folder):
        raise CheckpointError(f"{source}: is a LoRA adapter, not a model")
    check_weights(folder, source)
    return folder


def find(source: str, revision: str | None = None, *, pickled: bool = False) -> Path:
    """Return the folder of a model or an adapter, like `locate`, whatever it holds.

    Args:
        source: an existing folder, or a hub id.
        revision: of a hub id.
        pickled: of a hub repository, fetch pickled weights instead of safetensors.
    """
    path = Path(source).expanduser()
    if path.exists():
        if revision is not None:
            raise CheckpointError(
                f"{source}: revision '{revision}' is given, but this is a local folder; remove it"
            )
        folder = path.absolute()
    elif not is_hub_id(source):
        raise SourceNotFound(
            f"{source}: no such folder; name a folder with a checkpoint, or a hub id like org/name"
        )
    else:
        from evomerge.checkpoints.hub import download

        folder = download(source, revision, pickled=pickled)
    if not folder.is_dir():
        raise SourceNotFound(f"{source}: is a file; name the folder that holds config.json and the weights")
    return folder


def is_hub_id(source: str) -> bool:
    """Whether what is no folder here has the form of a hub id, ``org/name`` or ``name``."""
    return not Path(source).expanduser().exists() and bool(_HUB_ID.fullmatch(source))


def find_adapter(source: str, revision: str | None = None) -> Path:
    """Return the folder of a LoRA adapter, like `find`."""
    folder = find(source, revision)
    if not (folder / ADAPTER_CONFIG).is_file():
        raise CheckpointError(f"{source}: is not a LoRA adapter: there is no {ADAPTER_CONFIG}")
    return folder


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no model."""
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / CONFIG_FILE).is_file()


def check_weights(folder: Path, source: str) -> None:
    """Refuse what is not a folder of safetensors weights, with the way out of it."""
    if (folder / SINGLE_FILE).exists() or (folder / INDEX_FILE).exists():
        return
    names = [file.relative_to(folder).as_posix() for file in folder.glob("*")]
    raise CheckpointError(f"{source}: {explain_weights(names, source)}")
