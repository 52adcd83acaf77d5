"""A task's documents: always those in the files now, never those of an older cache."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from evomerge.errors import UserError

_FILE_BUILDERS = {"json", "csv", "parquet", "arrow", "text", "pandas", "xml"}


def load_documents(config: Mapping[str, Any], file: Path) -> Mapping[str, Any]:
    """Load the data splits of a task.

    `datasets` keys its cache by path and modification time, so that an edited file with its old time
    gives the old rows. Here local files are cached under the hash of their content.

    Args:
        config: the task's keys, functions resolved, data files absolute.
        file: the task's YAML, for messages.

    Returns:
        Data split name → `datasets.Dataset`.

    Raises:
        UserError: a file is missing or cannot be read, or the data would come from the network.
    """
    import datasets

    kwargs = dict(config.get("dataset_kwargs") or {})
    kwargs.pop("trust_remote_code", None)
    custom = config.get("custom_dataset")
    if custom is not None:
        loaded = custom(**(config.get("metadata") or {}), **kwargs)
    else:
        builder = config.get("dataset_path")
        if not builder:
            raise UserError(
                f"{file}: dataset_path: this key is required, e.g. json with dataset_kwargs.data_files"
            )
        if builder in _FILE_BUILDERS:
            content = _content(kwargs, file)
            kwargs["cache_dir"] = str(Path(datasets.config.HF_DATASETS_CACHE) / "by-content" / content)
        try:
            with quiet():
                loaded = datasets.load_dataset(builder, config.get("dataset_name"), **kwargs)
        except Exception as error:
            cause = error.__cause__ or error
            reason = " ".join(str(cause).split()) or type(cause).__name__
            hint = (
                "; the network is off because no model is a hub id: set HF_HUB_OFFLINE=0 once to fetch the data"
                if builder not in _FILE_BUILDERS and datasets.config.HF_HUB_OFFLINE
                else ""
            )
            raise UserError(f"{file}: cannot load the data of '{builder}': {reason:.300}{hint}") from None
    if not isinstance(loaded, Mapping):
        raise UserError(f"{file}: dataset_kwargs: load all data splits, without 'split'")
    return loaded


def _content(kwargs: Mapping[str, Any], file: Path) -> str:
    """Return the hash of the content of a task's local data files."""
    digest = hashlib.sha256()
    for path in _local_files(kwargs, file):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:32]


def _local_files(kwargs: Mapping[str, Any], file: Path) -> list[Path]:
    paths: list[Path] = []
    if kwargs.get("data_files") is None and kwargs.get("data_dir") is not None:
        paths = sorted(p for p in Path(kwargs["data_dir"]).rglob("*") if p.is_file())
        if not paths:
            raise UserError(
                f"{file}: dataset_kwargs.data_dir: {kwargs['data_dir']}: no such folder, or no files in it"
            )
    for key, entry in _entries(kwargs.get("data_files")):
        place = f"{file}: dataset_kwargs.{key}: {entry}"
        if "://" in entry:
            raise UserError(f"{place}: data files are local; download it first")
        found = (
            [Path(p) for p in sorted(glob.glob(entry, recursive=True))]
            if glob.has_magic(entry)
            else [Path(entry)]
        )
        if not found or not all(path.is_file() for path in found):
            raise UserError(f"{place}: no such file (it is relative to the YAML)")
        if not any(path.read_bytes().strip() for path in found):
            raise UserError(f"{place}: this file holds no rows")
        paths += found
    return paths


def _entries(data_files: Any) -> Iterator[tuple[str, str]]:
    if isinstance(data_files, Mapping):
        for split, value in data_files.items():
            yield from (
                (f"data_files.{split}", str(v)) for v in (value if isinstance(value, list) else [value])
            )
    elif data_files is not None:
        yield from (
            ("data_files", str(v)) for v in (data_files if isinstance(data_files, list) else [data_files])
        )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the progress bars of `datasets` and the chatter of lm-eval; errors are still raised."""
    import datasets

    logger = logging.getLogger("lm_eval")
    level, bars = logger.level, not datasets.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()
