"""How many threads one torch operation may use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread_per_operation() -> Iterator[None]:
    """Keep each operation on its thread: how a matrix product is cut over several changes its bits."""
    with threads_per_operation(1):
        yield


@contextmanager
def threads_per_operation(count: int) -> Iterator[None]:
    """Let each operation in the block use so many threads."""
    before = torch.get_num_threads()
    if before == count:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
