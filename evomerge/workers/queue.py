"""Which queued request a free worker takes."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection

from evomerge.workers.work import Work


def take(queue: deque[Work], held: str, elsewhere: Collection[str]) -> Work:
    """Remove and return the request that suits a free worker best.

    First one whose weights the worker holds, so that nothing has to be merged; then the oldest whose
    weights no other worker holds; then the oldest.

    Args:
        queue: waiting requests, not empty.
        held: hash of the recipe that the worker holds.
        elsewhere: hashes of the recipes that busy workers hold.
    """
    choice = next((i for i, work in enumerate(queue) if work.recipes[0].hash == held), None)
    if choice is None:
        choice = next((i for i, work in enumerate(queue) if work.recipes[0].hash not in elsewhere), 0)
    work = queue[choice]
    del queue[choice]
    return work
