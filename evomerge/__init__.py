"""evomerge: evolutionary search for the best model that can be merged from fine-tuned checkpoints.

Examples:
    >>> import evomerge
    >>> run = evomerge.search("configs/quickstart.yaml")      # doctest: +SKIP
    >>> run.results["winner"]["test"]["mean"]                 # doctest: +SKIP
    >>> run.candidates().sort_values("fitness").tail()        # doctest: +SKIP
    >>> run.export("merged")                                  # doctest: +SKIP
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "search": "evomerge.searching.run",
    "resume": "evomerge.searching.run",
    "Run": "evomerge.searching.run",
    "merge": "evomerge.merging",
    "evaluate": "evomerge.scoring",
    "evaluate_tasks": "evomerge.task_scoring",
    "extract_lora": "evomerge.extraction",
    "convert": "evomerge.checkpoints.conversion",
    "collect_statistics": "evomerge.statistics.collect",
    "Config": "evomerge.config",
    "load_compact": "evomerge.merging.compact",
    "load_config": "evomerge.config",
    "Recipe": "evomerge.recipe",
    "load_recipe": "evomerge.recipe",
}

__all__ = [
    "Config",
    "Recipe",
    "Run",
    "collect_statistics",
    "convert",
    "evaluate",
    "evaluate_tasks",
    "extract_lora",
    "load_compact",
    "load_config",
    "load_recipe",
    "merge",
    "resume",
    "search",
]

if TYPE_CHECKING:
    from evomerge.checkpoints.conversion import convert
    from evomerge.config import Config, load_config
    from evomerge.extraction import extract_lora
    from evomerge.merging import merge
    from evomerge.merging.compact import load_compact
    from evomerge.recipe import Recipe, load_recipe
    from evomerge.scoring import evaluate
    from evomerge.searching.run import Run, resume, search
    from evomerge.statistics.collect import collect_statistics
    from evomerge.task_scoring import evaluate_tasks


def __getattr__(name: str) -> Any:
    """Import public names on first use, so that `import evomerge` is cheap and sets no thread counts late."""
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'evomerge' has no attribute '{name}'")
