"""Where a merge in the dialect ``mergekit`` is not bit for bit what mergekit 0.1.5 makes of the same YAML."""

from __future__ import annotations

from evomerge.methods.registry import get_method

_TRIM = (
    "entries as large as the smallest one that is kept are all kept; mergekit keeps exactly as many as the density "
    "says and leaves the choice among equal ones to its sort"
)
_MASKS = "random masks have the same distribution as mergekit's but are other masks; they follow from the recipe's seed"

_OF_METHOD: dict[str, tuple[str, ...]] = {
    "ties": (_TRIM,),
    "breadcrumbs": (_TRIM,),
    "breadcrumbs_ties": (_TRIM,),
}


def of_method(name: str) -> tuple[str, ...]:
    """Return the differences that every merge by a method has, one sentence each."""
    return (*_OF_METHOD.get(name, ()), *((_MASKS,) if get_method(name).random else ()))
