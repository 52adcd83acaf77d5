"""Every random number of a run comes from a generator derived here from the run's seed."""

from __future__ import annotations

import hashlib

import numpy as np


def generator(seed: int, purpose: str, *keys: int | str) -> np.random.Generator:
    """Return the generator of one purpose of a run, independent of all others.

    Args:
        seed: the run's seed.
        purpose: what the numbers are for, e.g. ``"blocks"``.
        keys: further distinctions, e.g. the generation.

    The stream depends on the arguments alone, so it can be opened again at any point of a resumed run.
    """
    text = "\x1f".join([str(seed), purpose, *map(str, keys)])
    digest = hashlib.sha256(text.encode()).digest()
    words = [int.from_bytes(digest[i : i + 4], "little") for i in range(0, 32, 4)]
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(words)))
