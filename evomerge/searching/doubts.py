"""What of a search is likely to be a slip: it runs, but not as its author may think."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from evomerge.checkpoints.names import parse
from evomerge.config import Config, OptimizerConfig, Workers
from evomerge.layers_config import LayerSpace
from evomerge.recipe import Source
from evomerge.searching.draws import wanted_items
from evomerge.spaces.coefficients import CoefficientSpace

if TYPE_CHECKING:
    from evomerge.checkpoints import Checkpoint
    from evomerge.spaces import SearchSpace


def without_effect(config: Config) -> tuple[str, ...]:
    """Name the settings that belong to another choice than the one that is made."""
    return tuple(_without_effect(config))


def _without_effect(config: Config) -> Iterator[str]:
    default = OptimizerConfig().sigma
    for key, optimizer in (("optimizer", config.optimizer), ("optimizer.layers", config.optimizer.layers)):
        if optimizer is not None and optimizer.sigma != default and optimizer.type not in ("cma", "catcma"):
            yield f"{key}.sigma: {optimizer.sigma:g} has no effect: {optimizer.type} takes no first step"
    paths = config.layers
    if (
        paths is not None
        and paths.genome == "indicators"
        and paths.max_edits != LayerSpace.model_fields["max_edits"].default
    ):
        where = "space" if config.coefficients is None else "space.layers"
        yield f"{where}.max_edits: {paths.max_edits} has no effect: genome is indicators"
    if config.workers.type == "local":
        for key in ("count", "gpus", "address"):
            value = getattr(config.workers, key)
            if value not in (Workers.model_fields[key].default, 1 if key == "count" else None):
                yield (
                    f"workers.{key}: {value} has no effect: workers.type is local, which is this process alone; "
                    "write type: ray"
                )


def idle_numbers(space: SearchSpace, base: Checkpoint) -> tuple[str, ...]:
    """Name the searched numbers that no tensor depends on."""
    if not isinstance(space, CoefficientSpace):
        return ()
    return tuple(
        f"space.parameters: {name} is searched, but no tensor of the models is selected by it; look at its tensors and "
        "roles"
        for name in space.idle(parse(tensor) for tensor in base.tensors)
    )


def whole_blocks(sizes: Mapping[str, int], blocks: int, drawn: int, config: Config) -> tuple[str, ...]:
    """Warn where candidates answer far more or fewer items than they are to, since they answer whole blocks.

    Args:
        sizes: search items of each task.
        blocks: that they are cut into.
        drawn: blocks of a generation.
        config: of the search.
    """
    smallest = min(sizes, key=lambda task: sizes[task])
    answered = round(drawn * sum(sizes.values()) / blocks)
    wanted = min(sum(sizes.values()), wanted_items(len(sizes), config.suite.items_per_candidate))
    if answered <= 0.8 * wanted:
        return (
            f"each candidate answers {answered} items instead of {wanted}: it answers whole blocks, {drawn} of "
            f"{blocks}; set suite.block_items to {wanted}, or another items_per_candidate",
        )
    if wanted < len(sizes):
        return (
            f"each candidate answers {answered} items instead of {wanted}, one of each of the {len(sizes)} tasks at "
            "least; raise suite.items_per_candidate",
        )
    if blocks < sizes[smallest] or answered <= 1.5 * wanted:
        return ()
    return (
        f"each candidate answers {answered} items instead of {wanted}: every block holds some of every task, and "
        f"'{smallest}' has {sizes[smallest]} search items; give it more, or leave it out",
    )


def same_content(sources: Mapping[str, Source]) -> tuple[str, ...]:
    """Warn of models that are copies of each other."""
    first: dict[str | None, str] = {}
    warnings = []
    for name, source in sources.items():
        if source.sha256 in first:
            warnings.append(f"'{name}' has the same weights as '{first[source.sha256]}'")
        first.setdefault(source.sha256, name)
    return tuple(warnings)
