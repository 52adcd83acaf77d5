"""Where a merge in the dialect ``mergekit`` is not what mergekit 0.1.5 makes of the same YAML."""

from __future__ import annotations

from evomerge.methods.registry import get_method

_TRIM = (
    "entries as large as the smallest one that is kept are all kept, and a density of 0.29 keeps 29 of 100; "
    "mergekit leaves the choice among equal entries to its sort, and rounds 0.29 * 100 down to 28"
)
_MASKS = "random masks have the same distribution as mergekit's but are other masks; they follow from the recipe's seed"

_OF_METHOD: dict[str, tuple[str, ...]] = {
    "ties": (_TRIM,),
    "breadcrumbs": (_TRIM,),
    "breadcrumbs_ties": (_TRIM,),
    "model_stock": (
        "where the task vectors oppose each other the base is kept; mergekit walks away from their average, "
        "without bound",
    ),
    "sce": (
        "models weigh in proportion to the squares of their task vectors, however small; mergekit weighs them "
        "equally in tensors where these add up to less than 1e-6",
    ),
    "arcee_fusion": (
        "quartiles are exact; mergekit takes those of a random sample of tensors with more than a million elements",
    ),
    "nearswap": ("differences under 1e-6 are what they are; mergekit treats them as 1e-6",),
    "multislerp": ("models whose directions cancel out are averaged; mergekit gives up on them",),
}


def of_method(name: str) -> tuple[str, ...]:
    """Return the differences that every merge by a method has, one sentence each."""
    return (*_OF_METHOD.get(name, ()), *((_MASKS,) if get_method(name).random else ()))
