"""Fetching a model or an adapter from the Hugging Face hub: only what is needed, and only if it fits."""

from __future__ import annotations

import fnmatch
import json
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomerge.checkpoints.files import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    CONFIG_FILE,
    INDEX_FILE,
    PICKLED_ADAPTER,
    PICKLED_FILE,
    PICKLED_INDEX,
    SINGLE_FILE,
    explain_weights,
)
from evomerge.checkpoints.tokenizer import CHAT_TEMPLATE_FILES, PROCESSOR_FILES, TOKENIZER_FILES
from evomerge.errors import CheckpointError, SourceNotFound

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo, RepoSibling

_COMPANIONS = (
    CONFIG_FILE,
    ADAPTER_CONFIG,
    "generation_config.json",
    *TOKENIZER_FILES,
    *CHAT_TEMPLATE_FILES,
    *PROCESSOR_FILES,
)
_SAFETENSORS = (SINGLE_FILE, INDEX_FILE, "model-*-of-*.safetensors", ADAPTER_FILE)
_PICKLES = (PICKLED_FILE, PICKLED_INDEX, "pytorch_model-*-of-*.bin", PICKLED_ADAPTER)


def download(source: str, revision: str | None, *, pickled: bool = False) -> Path:
    """Return the local folder of a hub repository, fetching what is not in the Hugging Face cache yet.

    Of several forms of the weights one is fetched: `model.safetensors`, or the shards that the index names.
    What is missing is known before anything large is fetched: access, and the space that it takes.

    Args:
        source: ``org/name`` or ``name``.
        revision: branch, tag or commit.
        pickled: fetch pickled weights (to convert them) instead.

    Raises:
        CheckpointError: no such repository or revision, no access, no network, no such weights, no space.
    """
    from huggingface_hub import constants
    from huggingface_hub import errors as hub

    try:
        return _fetch(source, revision, pickled)
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
    raise SourceNotFound(f"{source}: {reason}")


def commit_of(source: str, folder: Path) -> str | None:
    """Return the commit that a hub id was found at, or None for a folder of the user's."""
    from_hub = folder.parent.name == "snapshots" and not Path(source).expanduser().exists()
    return folder.name if from_hub else None


def _fetch(source: str, revision: str | None, pickled: bool) -> Path:
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub import errors as hub

    patterns = [*_COMPANIONS, *(_PICKLES if pickled else _SAFETENSORS)]
    info: ModelInfo | None = None
    if not constants.HF_HUB_OFFLINE:
        try:
            info = HfApi().model_info(source, revision=revision, files_metadata=True)
        except hub.RevisionNotFoundError:
            raise
        except Exception:
            # Whatever keeps the hub from answering: what is in the cache may do, else snapshot_download tells.
            info = None
    if info is not None:
        files = {sibling.rfilename: sibling for sibling in info.siblings or ()}
        chosen = _chosen(source, str(info.sha), files, pickled)
        missing = _missing([files[name] for name in chosen], _storage(source))
        if missing and info.gated:
            HfApi().auth_check(source)
        _check_space(source, missing)
        patterns = [name.replace("[", "[[]") for name in chosen]
    return Path(snapshot_download(source, revision=revision, allow_patterns=patterns))


def _chosen(source: str, commit: str, names: Collection[str], pickled: bool) -> list[str]:
    """Return the files to fetch, of those that the repository has.

    Raises:
        CheckpointError: it has no weights in the wanted form.
    """
    companions = [name for name in names if any(fnmatch.fnmatchcase(name, p) for p in _COMPANIONS)]
    adapter = ADAPTER_CONFIG in names and CONFIG_FILE not in names
    if adapter:
        file = PICKLED_ADAPTER if pickled else ADAPTER_FILE
        if file not in names:
            raise CheckpointError(
                f"{source}: {explain_weights(names, source, pickled=pickled, adapter=True)}"
            )
        return [*companions, file]
    single, index = (PICKLED_FILE, PICKLED_INDEX) if pickled else (SINGLE_FILE, INDEX_FILE)
    if single in names:
        return [*companions, single]
    if index not in names:
        raise CheckpointError(f"{source}: {explain_weights(names, source, pickled=pickled)}")
    shards = _shards(source, commit, index)
    absent = sorted(set(shards) - set(names))
    if absent:
        raise CheckpointError(f"{source}: {index} names {absent[0]}, which the repository does not have")
    return [*companions, index, *shards]


def _shards(source: str, commit: str, index: str) -> list[str]:
    """Fetch a repository's index and return the files that it names."""
    from huggingface_hub import hf_hub_download

    file = Path(hf_hub_download(source, index, revision=commit))
    try:
        weight_map: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
        return sorted(set(map(str, weight_map.values())))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{source}: {index}: weight_map: should map tensor names to files") from None


def _storage(source: str) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser() / f"models--{source.replace('/', '--')}"


def _missing(files: Iterable[RepoSibling], storage: Path) -> dict[str, int]:
    """Return the bytes still to be fetched of each file that the cache has not got as a whole."""
    missing = {}
    for file in files:
        etag = file.lfs.sha256 if file.lfs is not None else file.blob_id
        if etag is not None and (storage / "blobs" / etag).exists():
            continue
        begun = [part.stat().st_size for part in storage.glob(f"blobs/{etag}*.incomplete")] if etag else []
        missing[file.rfilename] = max(0, (file.size or 0) - max(begun, default=0))
    return missing


def _check_space(source: str, missing: dict[str, int]) -> None:
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE).expanduser()
    place = next(folder for folder in (cache, *cache.parents) if folder.exists())
    needed, free = sum(missing.values()), shutil.disk_usage(place).free
    if needed > free:
        raise CheckpointError(
            f"{source}: needs {needed:,} bytes in the Hugging Face cache {cache}, {free:,} are free; make room, or "
            "let HF_HOME name a folder on another disk"
        )
