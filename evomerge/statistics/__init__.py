"""Statistics: what data says of a model's weights, for the methods that weigh their inputs with it.

`files` keeps and opens them, and `provide` hands a merge what it needs; only computing what is missing
(`collect`) runs models and imports transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evomerge.statistics.collect import collect_statistics
    from evomerge.statistics.files import Statistics
    from evomerge.statistics.needed import provide

__all__ = ["Statistics", "collect_statistics", "provide"]

_PLACES = {"Statistics": "files", "collect_statistics": "collect", "provide": "needed"}


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
