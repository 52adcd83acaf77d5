"""The command that scores one model outside a search."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from evomerge.cli.parser import Commands, add_json, add_set

_EVALUATE_HELP = """\
examples:
  evomerge evaluate ./my-model --config my.yaml
  evomerge evaluate runs/quickstart --config my.yaml --split test --json
"""


def add_commands(commands: Commands) -> None:
    """Declare them."""
    sub = commands.add("evaluate", _evaluate, "score a model or a recipe on a config's suite", _EVALUATE_HELP)
    sub.add_argument("model", metavar="MODEL_OR_RECIPE", help="model folder, recipe file or run directory")
    sub.add_argument("--config", type=Path, required=True, metavar="CONFIG", help="whose suite is used")
    sub.add_argument(
        "--split", choices=("search", "validation", "test"), default="validation", help="default: validation"
    )
    add_set(sub)
    add_json(sub)


def _evaluate(options: argparse.Namespace) -> int:
    from evomerge.scoring import evaluate

    result = evaluate(options.model, options.config, split=options.split, overrides=options.overrides)
    print(json.dumps(result.to_dict(), indent=2) if options.json else str(result))
    return 0
