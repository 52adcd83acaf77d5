"""Environment variables that have to be set before torch, ray, datasets and lm-eval are imported."""

from __future__ import annotations

import gc
import importlib.metadata
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "DISABLE_MULTIPROC": "1",
}
QUIET_IF_LOADED = (
    ("datasets.config", "HF_UPDATE_DOWNLOAD_COUNTS", False),
    ("huggingface_hub.constants", "HF_HUB_DISABLE_TELEMETRY", True),
)
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def prepare(*, offline: bool = True, threads: int | None = 1) -> None:
    """Set telemetry, network and thread variables of this process and of those it starts.

    Call it before the first import of torch, ray, datasets or lm-eval: most of them read their variables
    once. Variables that the user has set win (``HF_HUB_OFFLINE=0`` allows the network), except the telemetry
    switches, which also reach libraries that a notebook has imported before.

    Args:
        offline: forbid hub access (no model of the config is a hub id).
        threads: cap of the arithmetic libraries' thread pools; None leaves them alone.
    """
    os.environ.update(QUIET)
    for module, constant, state in QUIET_IF_LOADED:
        if module in sys.modules:
            setattr(sys.modules[module], constant, state)
    if offline and "HF_HUB_OFFLINE" not in os.environ:
        os.environ.update(OFFLINE)
    if threads is not None:
        for name in THREAD_VARIABLES:
            os.environ.setdefault(name, str(threads))


@contextmanager
def imports_uncollected() -> Iterator[None]:
    """Keep the garbage collector out of the imports in the block, and out of what they made from then on.

    Importing torch makes hundreds of thousands of objects that live as long as the process: looking through them
    again and again, and once more at the end, takes a good part of a short command's time.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@cache
def library_versions(*names: str) -> tuple[str, ...]:
    """Return ``name=version`` of installed packages; their metadata are parsed once, which takes milliseconds."""
    return tuple(f"{name}={importlib.metadata.version(name)}" for name in names)


def cache_folder() -> Path:
    """Return where what can be made again is kept: ``$EVOMERGE_CACHE``, else the user's cache folder."""
    if own := os.environ.get("EVOMERGE_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "evomerge"
