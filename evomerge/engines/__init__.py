"""Engines: models that answer a suite's requests, and the hosts that keep them on one recipe after another."""

from evomerge.engines.host import (
    NO_LAYERS,
    Host,
    LayerEvaluations,
    check_engine,
    default_batch_tokens,
    open_host,
    packing_name,
)

__all__ = [
    "NO_LAYERS",
    "Host",
    "LayerEvaluations",
    "check_engine",
    "default_batch_tokens",
    "open_host",
    "packing_name",
]
