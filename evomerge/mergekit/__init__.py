"""mergekit's YAML, in and out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from evomerge.mergekit.reading import Reading, from_mergekit, is_mergekit, open_recipe, read_mergekit

if TYPE_CHECKING:
    from evomerge.mergekit.writing import Written, to_mergekit

__all__ = [
    "Reading",
    "Written",
    "from_mergekit",
    "is_mergekit",
    "open_recipe",
    "read_mergekit",
    "to_mergekit",
]


def __getattr__(name: str) -> Any:
    # Writing plans the merge, and merging reads mergekit YAMLs.
    if name in ("Written", "to_mergekit"):
        from evomerge.mergekit import writing

        return getattr(writing, name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
