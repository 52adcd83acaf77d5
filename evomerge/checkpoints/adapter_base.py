"""Whether an adapter lies on the model that it was trained on, as far as names tell."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from evomerge.checkpoints.adapted import AdaptedCheckpoint
from evomerge.checkpoints.adapters import Adapter
from evomerge.checkpoints.files import ADAPTER_CONFIG
from evomerge.checkpoints.hub import commit_of
from evomerge.checkpoints.locate import is_hub_id

# What is appended to a model's name where its weights are quantised: adapters are often trained on such a copy.
_QUANTISED = re.compile(r"(-unsloth)?-(bnb-[48]bit|gptq(-int[48])?|awq|[48]bit)$")
_CACHED = re.compile(r"models--([^/\\]+)[/\\]snapshots[/\\]")
_COMMIT = re.compile(r"[0-9a-f]{7,40}")


def base_doubt(adapted: AdaptedCheckpoint, source: str, revision: str | None = None) -> str | None:
    """Return a warning where an adapter says that it was trained on another model than the one it lies on.

    Names agree if they are equal or end alike, in whatever case; the base is known by what the user calls it,
    its folder, its hub repository and ``_name_or_path`` of its config. Folders get renamed: where a name is that
    of a folder, the warning says that it may be the same model.

    Args:
        adapted: the base with the adapter on it.
        source: what the user calls the base: a folder or a hub id.
        revision: of the hub id.

    Returns:
        One sentence, or None where the names agree or the adapter names no base.
    """
    adapter, base = adapted.adapter, adapted.base
    said = adapter.base
    if said is None or _same_folder(said, base.path):
        return None
    place = f"{adapter.path}: the adapter was trained on '{said}' ({ADAPTER_CONFIG})"
    names = list(_names(source, base.path, base.config.get("_name_or_path")))
    if any(_agree(said, name) for name in names):
        return _revision_doubt(adapter, place, source, {revision, commit_of(source, base.path)})
    if is_hub_id(said) and any(is_hub_id(name) for name in names):
        return f"{place}, here it lies on '{source}'; changes made to one model mean nothing on another"
    return f"{place}, here it lies on '{source}'; that is right only if both are the same model"


def _names(source: str, folder: Path, original: object) -> Iterator[str]:
    yield source
    yield _repository(str(folder))
    if isinstance(original, str) and original:
        yield original


def _repository(path: str) -> str:
    """Return the hub id of a folder in the Hugging Face cache; what is none as it is."""
    cached = _CACHED.search(path)
    return cached[1].replace("--", "/") if cached else path


def _agree(one: str, other: str) -> bool:
    return _last(one) == _last(other)


def _last(name: str) -> str:
    """Return the part of a path or hub id that names the model."""
    parts = [part for part in re.split(r"[/\\]", _repository(name).lower()) if part not in ("", ".")]
    return _QUANTISED.sub("", parts[-1]) if parts else ""


def _same_folder(said: str, folder: Path) -> bool:
    try:
        return Path(said).expanduser().samefile(folder)
    except (OSError, RuntimeError, ValueError):
        return False


def _revision_doubt(adapter: Adapter, place: str, source: str, found: set[str | None]) -> str | None:
    """Compare commits with commits, and names of revisions with such."""
    said = adapter.base_revision
    if said is None:
        return None
    alike = [
        name for name in found if name and bool(_COMMIT.fullmatch(name)) == bool(_COMMIT.fullmatch(said))
    ]
    if not alike or any(name.startswith(said) or said.startswith(name) for name in alike):
        return None
    return f"{place} at revision '{said}', here it lies on revision '{alike[0]}' of '{source}'"
