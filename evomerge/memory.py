"""How much memory this machine has to give, and how fast it is."""

from __future__ import annotations

import os
import time
from pathlib import Path

_MEBI = 1 << 20


def available_memory(root: Path = Path("/")) -> int | None:
    """Return the bytes of host memory that this process and its children may still take; None if nobody says.

    It is the kernel's estimate, which counts the page cache as free, or what a control group (a container, a job
    of a batch system) leaves of its limit, whichever is less.

    Args:
        root: of the file system.
    """
    known = [free for free in (_kernel(root), *_groups(root)) if free is not None]
    if known:
        return max(0, min(known))
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def _kernel(root: Path) -> int | None:
    for line in _lines(root / "proc/meminfo"):
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            return int(rest.split()[0]) * 1024
    return None


def _groups(root: Path) -> list[int | None]:
    """Return what each control group that this process is in leaves of its limit, the root's included."""
    free: list[int | None] = []
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        old = "memory" in controllers.split(",")
        if controllers and not old:
            continue
        top = root / "sys/fs/cgroup" / ("memory" if old else "")
        folder = top / path.lstrip("/")
        # Inside a container the path may be the host's, and its own group is mounted at the top.
        for place in {folder, *folder.parents, top}:
            if place == top or top in place.parents:
                free.append(_left(place, old=old))
    return free


def _left(group: Path, *, old: bool) -> int | None:
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if old else ("memory.max", "memory.current")
    limit, used = (next(iter(_lines(group / name)), "") for name in names)
    if not limit.isdigit() or not used.isdigit():
        return None
    cache = {"total_inactive_file", "total_active_file"} if old else {"inactive_file", "active_file"}
    fields = [line.split() for line in _lines(group / "memory.stat")]
    return int(limit) - int(used) + sum(int(field[1]) for field in fields if field[0] in cache)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def copy_bandwidth(seconds: float = 0.2) -> float:
    """Return how many bytes a thread reads and writes a second when it copies memory that is in no cache.

    Args:
        seconds: how long to measure.
    """
    import torch

    source = torch.ones(32 * _MEBI, dtype=torch.uint8)
    target = torch.zeros_like(source)
    moved, started = 0, time.perf_counter()
    while (spent := time.perf_counter() - started) < seconds or not moved:
        target.copy_(source)
        moved += 2 * source.numel()
    return moved / max(spent, 1e-9) if moved else 0.0
