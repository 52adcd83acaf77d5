"""Telling an engine that is gone from a program that is wrong."""

from __future__ import annotations

import contextlib
import errno
import gc
import sys

from evomerge.errors import EngineLost

_OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "cannot allocate memory", "alloc_failed")


def loss(error: BaseException) -> str | None:
    """Return in one sentence what was lost if an error means that the engine or its memory is gone, else None.

    Such are `EngineLost`, exhausted memory of host or device in all the forms that Python, torch and its
    libraries give it, and errors of the device, after which it answers nothing more.
    """
    said = (str(error).strip() or type(error).__name__).splitlines()[0]
    if isinstance(error, EngineLost):
        return said
    if isinstance(error, MemoryError):
        return f"out of memory: {said}"
    if isinstance(error, OSError):
        return f"out of memory: {said}" if error.errno == errno.ENOMEM else None
    if not isinstance(error, RuntimeError):
        return None
    torch = sys.modules.get("torch")
    if isinstance(error, getattr(torch, "OutOfMemoryError", ())) or any(
        sign in said.lower() for sign in _OUT_OF_MEMORY
    ):
        return f"out of memory: {said}"
    if isinstance(error, getattr(torch, "AcceleratorError", ())) or said.startswith("CUDA error"):
        return f"the device failed: {said}"
    return None


def free_memory() -> None:
    """Give back what nobody holds any more, on the host and on the device."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        # A device that has failed cannot even be emptied.
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()
