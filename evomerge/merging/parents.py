"""Opening the models of a recipe, adapters on their bases, and checking that they go together."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from evomerge.checkpoints import (
    AdaptedCheckpoint,
    Checkpoint,
    check_compatible,
    check_tokenizers,
    open_checkpoint,
)
from evomerge.checkpoints.adapter_base import base_doubt
from evomerge.errors import SourceNotFound
from evomerge.merging.vocabulary import donor_of
from evomerge.recipe import Recipe, Source

_log = logging.getLogger(__name__)


def open_parents(recipe: Recipe) -> dict[str, Checkpoint]:
    """Open every model of a recipe, by name, and check that they can be merged with one another.

    What is odd but not wrong (another context length, no tokenizer) goes to the log as a warning.

    Raises:
        CheckpointError: a model cannot be read, or differs from the others in tensors, shapes or tokenizer.
    """
    under = _under(recipe)
    checkpoints = open_sources(recipe.models, under, key_of="models.{}".format)
    merged, speaking = _merged_together(recipe), _token_users(recipe)
    warnings = adapter_doubts(recipe.models, checkpoints, under)
    for (first, *others), any_depth in merged:
        warnings += check_compatible(
            checkpoints[first], {name: checkpoints[name] for name in others}, any_depth=any_depth
        )
    for first, *others in [*(names for names, _ in merged), speaking]:
        warnings += check_tokenizers(checkpoints[first], {name: checkpoints[name] for name in others})
    for warning in dict.fromkeys(warnings):
        _log.warning("%s", warning)
    return checkpoints


def open_sources(
    sources: Mapping[str, Source], under: Mapping[str, str], *, key_of: Callable[[str], str] | None = None
) -> dict[str, Checkpoint]:
    """Open models and adapted models by name; a base that several adapters lie on is opened once.

    Args:
        sources: where they come from.
        under: for the name of a model that may be an adapter alone, the name of the model it then lies on.
        key_of: returns the key of the user's file that says where a model is, named where there is none.

    Raises:
        CheckpointError: a model cannot be read, or an adapter does not fit its base.
    """
    opened: dict[str, Checkpoint] = {}
    plain: dict[tuple[str, str | None], Checkpoint] = {}
    for name in sorted(sources, key=lambda name: (name in under, sources[name].adapter is not None)):
        source = sources[name]
        place = (source.source, source.revision)
        base = opened.get(under.get(name, "")) if source.adapter is None else plain.get(place)
        try:
            opened[name] = open_checkpoint(
                source.source,
                revision=source.revision,
                adapter=source.adapter,
                adapter_revision=source.adapter_revision,
                name=name,
                base=base,
            )
        except SourceNotFound as error:
            key = None if key_of is None else key_of(name)
            raise SourceNotFound(error.problem, key=key) from None
        if source.adapter is None:
            plain[place] = opened[name]
    return {name: opened[name] for name in sources}


def adapter_doubts(
    sources: Mapping[str, Source], checkpoints: Mapping[str, Checkpoint], under: Mapping[str, str]
) -> list[str]:
    """Return a warning for each adapter that says it was trained on another model than the one it lies on.

    Args:
        sources, under: as for `open_sources`.
        checkpoints: what that returned.
    """
    doubts = []
    for name, source in sources.items():
        checkpoint = checkpoints[name]
        base = source if source.adapter is not None else sources.get(under.get(name, ""))
        if isinstance(checkpoint, AdaptedCheckpoint) and base is not None:
            doubts.append(base_doubt(checkpoint, base.source, base.revision))
    return list(dict.fromkeys(doubt for doubt in doubts if doubt is not None))


def _under(recipe: Recipe) -> dict[str, str]:
    """Return the base of the merge that a model is an input of, by the model's name."""
    bases = {merge.base for merge in recipe.merges.values()}
    return {
        name: merge.base
        for merge in recipe.merges.values()
        for name in merge.inputs
        if merge.base is not None and name not in bases
    }


def _merged_together(recipe: Recipe) -> list[tuple[list[str], bool]]:
    """The models of each merge, its donor first, and whether they may differ in their number of layers."""
    chosen = {hop.merge for hop in recipe.path or () if hop.layers}
    return [
        (list(dict.fromkeys([donor_of(recipe, name), *merge.inputs])), name in chosen)
        for name, merge in recipe.merges.items()
    ]


def _token_users(recipe: Recipe) -> list[str]:
    """Models that must agree on tokens: those of the embedding and the head, and the tokenizer's donor."""
    ends = [recipe.path[0], recipe.path[-1]] if recipe.path else []
    sources = [str(hop.model or hop.merge) for hop in ends] or list(recipe.merges)
    donors = [donor_of(recipe, source) for source in sources]
    source = recipe.output.vocabulary.source
    named = [source] if recipe.output.tokenizer is not None and source in recipe.models else []
    return list(dict.fromkeys([*donors, *named]))
