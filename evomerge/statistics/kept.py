"""The statistics in the user's cache folder: which there are, and removing those that are no longer used."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from evomerge.errors import UserError
from evomerge.folders import remove_abandoned
from evomerge.statistics.files import ABOUT, statistics_cache

_DAY = 86_400
_KEY = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Kept:
    """Statistics of one model.

    Attributes:
        folder: where they lie.
        kind: as in `Statistics.about`; ``damaged`` if that cannot be read.
        model, texts: what they were made of.
        nbytes: size on disk.
        days: since a merge, a search or the command last used or made them.
    """

    folder: Path
    kind: str
    model: str
    texts: str
    nbytes: int
    days: float

    def __str__(self) -> str:
        size = f"{self.nbytes / 1e6:12,.1f} MB {self.days:6.0f} d"
        return f"{size}  {self.kind:7}  {self.model}  {self.texts}  {self.folder}"


def kept_folders() -> list[Kept]:
    """Return all statistics in the cache folder, the latest used first."""
    cache = statistics_cache()
    # Whatever else somebody keeps there is not ours to list, let alone to remove.
    folders = [f for f in cache.iterdir() if f.is_dir() and _KEY.fullmatch(f.name)] if cache.is_dir() else []
    return sorted((_kept(folder) for folder in folders), key=lambda kept: (kept.days, kept.folder))


def prune(days: float) -> list[Kept]:
    """Remove statistics that were not used for some days, and what killed processes left; return the former.

    Raises:
        UserError: a folder cannot be removed.
    """
    remove_abandoned(statistics_cache() / "any", all_names=True)
    removed = [kept for kept in kept_folders() if kept.days >= days]
    for kept in removed:
        try:
            shutil.rmtree(kept.folder)
        except OSError as error:
            raise UserError(f"{kept.folder}: cannot be removed: {error.strerror}") from None
    return removed


def _kept(folder: Path) -> Kept:
    about = {}
    with contextlib.suppress(OSError, ValueError):
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    about = about if isinstance(about, dict) else {}
    files = [file.stat() for file in folder.iterdir() if file.is_file()]
    used = (folder / ABOUT if (folder / ABOUT).exists() else folder).stat().st_mtime
    return Kept(
        folder,
        str(about.get("kind", "damaged")),
        str(about.get("model", "")),
        str(about.get("texts", "")),
        sum(stat.st_size for stat in files),
        max(0.0, (time.time() - used) / _DAY),
    )
