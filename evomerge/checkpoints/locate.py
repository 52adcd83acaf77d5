"""From what a user writes, a path or a hub id, to a local folder with safetensors weights."""

from __future__ import annotations

import re
from pathlib import Path

from evomerge.checkpoints.tokenizer import CHAT_TEMPLATE_FILES, PROCESSOR_FILES, TOKENIZER_FILES
from evomerge.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_DOWNLOADED = (
    "*.safetensors",
    INDEX_FILE,
    CONFIG_FILE,
    ADAPTER_CONFIG,
    "generation_config.json",
    *TOKENIZER_FILES,
    *CHAT_TEMPLATE_FILES,
    *PROCESSOR_FILES,
)
# Mistral's own format beside the Hugging Face one, and folders with other variants of the model.
_NOT_DOWNLOADED = ("consolidated*.safetensors", "*/*.safetensors")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


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


def find(source: str, revision: str | None = None) -> Path:
    """Return the folder of a model or an adapter, like `locate`, whatever it holds."""
    path = Path(source).expanduser()
    if path.exists():
        if revision is not None:
            raise CheckpointError(
                f"{source}: revision '{revision}' is given, but this is a local folder; remove it"
            )
        folder = path.absolute()
    elif source.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(source):
        raise CheckpointError(
            f"{source}: no such folder; name a folder with a checkpoint, or a hub id like org/name"
        )
    else:
        folder = _download(source, revision)
    if not folder.is_dir():
        raise CheckpointError(f"{source}: is a file; name the folder that holds config.json and the weights")
    return folder


def find_adapter(source: str, revision: str | None = None) -> Path:
    """Return the folder of a LoRA adapter, like `find`."""
    folder = find(source, revision)
    if not (folder / ADAPTER_CONFIG).is_file():
        raise CheckpointError(f"{source}: is not a LoRA adapter: there is no {ADAPTER_CONFIG}")
    return folder


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no model."""
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / CONFIG_FILE).is_file()


def _download(source: str, revision: str | None) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub import errors as hub

    try:
        folder = snapshot_download(
            source,
            revision=revision,
            allow_patterns=list(_DOWNLOADED),
            ignore_patterns=list(_NOT_DOWNLOADED),
        )
        return Path(folder)
    except hub.GatedRepoError:
        reason = "access is restricted; accept the repository's terms on the hub, then run 'hf auth login'"
    except hub.RevisionNotFoundError:
        reason = f"the hub repository has no revision '{revision}'"
    except hub.LocalEntryNotFoundError:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        at = f" at revision '{revision}'" if revision else ""
        reason = f"no such folder, and not in the Hugging Face cache{at} while {why}; download it first"
    except hub.RepositoryNotFoundError:
        reason = (
            "neither a folder nor a repository on the hub (or a private one: log in with 'hf auth login')"
        )
    except (OSError, ValueError, hub.HfHubHTTPError) as error:
        reason = f"cannot be downloaded: {(str(error).splitlines() or [type(error).__name__])[0]}"
    raise CheckpointError(f"{source}: {reason}")


def check_weights(folder: Path, source: str) -> None:
    """Refuse what is not a folder of safetensors weights, with the way out of it."""
    if (folder / SINGLE_FILE).exists() or (folder / INDEX_FILE).exists():
        return
    pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{source}: has only pickled weights ({pickles[0]}), which are never opened because they can "
            "run code; convert them to safetensors "
            "(transformers: from_pretrained(folder).save_pretrained(new_folder))"
        )
    gguf = sorted(file.name for file in folder.glob("*.gguf"))
    if gguf:
        raise CheckpointError(
            f"{source}: has only GGUF weights ({gguf[0]}); name the original safetensors checkpoint, or "
            "convert it (transformers: from_pretrained(folder, gguf_file=...).save_pretrained(new_folder))"
        )
    raise CheckpointError(f"{source}: holds no weights: there is neither {SINGLE_FILE} nor {INDEX_FILE}")
