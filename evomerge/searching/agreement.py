"""What a run records of its surroundings, and the refusal to go on when they are no longer the same."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from evomerge.errors import UserError
from evomerge.searching.store import Store
from evomerge.spaces.genotype import Genotype

if TYPE_CHECKING:
    from evomerge.searching.setup import Setup


def record_setup(store: Store, setup: Setup, folder: Path) -> None:
    """Record models, items and blocks at the start of a run; at a resume compare them.

    Raises:
        UserError: a model, the items or their cutting into blocks is not what it was.
    """
    blocks = [block for split in setup.blocks.values() for block in split]
    sources = {name: source.sha256 for name, source in setup.sources.items()}
    splits = {split: setup.suite.sha256(split) for split in setup.blocks}
    if store.meta("sources") is None:
        with store.transaction():
            store.add_items(setup.items, blocks)
            for recipe in setup.baselines.values():
                store.add_recipe(recipe)
            store.set_meta(sources=sources, splits=splits, dimension=setup.dimension, seed=setup.config.seed)
            store.event("created", name=setup.config.name)
        return
    for name, digest in store.meta("sources").items():
        if sources.get(name) != digest:
            raise UserError(
                f"{folder}: the model '{name}' is not what it was when the run started "
                f"({setup.sources[name].source}); restore it, or start a new run"
            )
    for split, digest in store.meta("splits").items():
        if splits.get(split) != digest:
            raise UserError(
                f"{folder}: the {split} items are not what they were when the run started; restore the task "
                "files, or start a new run"
            )
    if store.block_hashes() != {block.hash for block in blocks}:
        raise UserError(f"{folder}: the items are cut into other blocks than before; start a new run")
    store.event("resumed")


def record_fingerprint(store: Store, fingerprint: str, folder: Path) -> None:
    """Record the engine's fingerprint at the start; at a resume refuse another one."""
    known = store.meta("fingerprint")
    if known is None:
        store.set_meta(fingerprint=fingerprint)
    elif known != fingerprint:
        raise UserError(
            f"{folder}: this engine is not the one that the run was scored with, and scores of two engines are "
            f"never compared (then: {known}; now: {fingerprint}); resume it with the versions, the kind of "
            f"machine and the workers.cpus it had, or start a new run from {folder}/config.yaml"
        )


def check_replay(store: Store, generation: int, asked: Sequence[Genotype], folder: Path) -> None:
    """Refuse to go on unless the optimiser asks exactly what is recorded."""
    if [row.genotype for row in store.candidates(generation)] != [tuple(genotype) for genotype in asked]:
        raise not_reproduced(generation, folder)


def not_reproduced(generation: int, folder: Path) -> UserError:
    """Return the error for a generation that the recorded scores do not lead to again."""
    return UserError(
        f"{folder}: replaying the recorded scores does not reproduce generation {generation + 1} exactly "
        "(other versions, or another kind of machine); resume it where it was started, or start a new run from "
        f"{folder}/config.yaml"
    )
