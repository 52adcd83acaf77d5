"""Folders that appear as a whole: they are made under a hidden name beside the place, locked by who makes them."""

from __future__ import annotations

import fcntl
import glob
import os
import secrets
import shutil
from pathlib import Path


def hidden_beside(out: Path) -> Path:
    """Return a new hidden name beside a folder that is to be made."""
    return out.with_name(f".{out.name}.{secrets.token_hex(4)}.partial")


def remove_abandoned(out: Path, *, all_names: bool = False) -> None:
    """Remove hidden folders that were to become `out`, or any folder beside it, and whose process is gone."""
    name = "*" if all_names else glob.escape(out.name)
    for folder in out.parent.glob(f".{name}." + "[0-9a-f]" * 8 + ".partial"):
        lock = lock_folder(folder)
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def lock_folder(folder: Path) -> int | None:
    """Lock a folder until the returned descriptor is closed or the process ends.

    Returns None where somebody else holds the lock, or where the file system has none.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
