"""Commands of a search and of the run directory that it leaves."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evomerge.cli.parser import Commands, add_json, add_set, add_shard_size, add_yes
from evomerge.errors import UserError

_SEARCH_HELP = """\
examples:
  evomerge search configs/quickstart.yaml
  evomerge search my.yaml --run runs/second --set seed=1 --set budget.candidates=600
  evomerge search my.yaml --continue              in a job script: starts or resumes

The run directory keeps everything: stop it at any time (Ctrl-C, kill, power), then 'evomerge resume'.
"""
_RESUME_HELP = """\
examples:
  evomerge resume runs/quickstart
  evomerge resume runs/quickstart --budget candidates=600     600 in all, not 600 more

A run that had ended opens the test items a second time when it is prolonged; results.json counts it.
"""
_EXPORT_HELP = """\
examples:
  evomerge export runs/quickstart --out merged                        a Hugging Face folder
  evomerge export runs/quickstart --out recipe.yaml --format recipe   for 'evomerge merge'
  evomerge export runs/quickstart --out merge.yml --format mergekit   the same for mergekit, differences named
  evomerge export runs/quickstart --out candidates.csv --format csv   one row per candidate
"""
_PLAN_HELP = """\
It tells the number of searched parameters, population and generations, items per split, the smallest
difference that the items can resolve, the cost in item evaluations, what will be where in memory and how long
a swap of the weights takes. Models that cannot fit are refused.
"""


def add_commands(commands: Commands) -> None:
    """Declare them."""
    sub = commands.add("search", _search, "run a search described by a config", _SEARCH_HELP)
    sub.add_argument("config", type=Path, metavar="CONFIG", help="the YAML file")
    sub.add_argument("--run", type=Path, metavar="DIR", help="the run directory (default: runs/NAME)")
    add_set(sub)
    sub.add_argument("--continue", dest="continue_", action="store_true", help="resume the run if it exists")
    add_yes(sub)

    sub = commands.add("resume", _resume, "continue a run where it stopped", _RESUME_HELP)
    sub.add_argument("directory", type=Path, metavar="RUN", help="the run directory")
    sub.add_argument("--budget", action="append", default=[], metavar="KEY=VALUE", help="a new total ceiling")
    add_yes(sub)

    sub = commands.add("status", _status, "say how a run stands")
    sub.add_argument("directory", type=Path, metavar="RUN", help="the run directory")
    add_json(sub)

    sub = commands.add("export", _export, "write a run's winner, or one of its candidates", _EXPORT_HELP)
    sub.add_argument("directory", type=Path, metavar="RUN", help="the run directory")
    sub.add_argument("--out", type=Path, required=True, metavar="PATH", help="folder or file to write")
    sub.add_argument("--candidate", type=int, metavar="ID", help="this candidate (default: the winner)")
    sub.add_argument(
        "--format", choices=("hf", "recipe", "mergekit", "csv", "parquet"), default="hf", help="default: hf"
    )
    add_shard_size(sub)

    sub = commands.add(
        "plan", _plan, "show what a search is going to be, before any weights are read", _PLAN_HELP
    )
    sub.add_argument("config", type=Path, metavar="CONFIG", help="the YAML file")
    add_set(sub)
    add_json(sub)


def _search(options: argparse.Namespace) -> int:
    from evomerge.searching.progress import display_for
    from evomerge.searching.run import search

    run = search(
        options.config,
        run=options.run,
        overrides=options.overrides,
        continue_=options.continue_,
        yes=options.yes,
        display=display_for(),
    )
    return _conclude(run.path, run.results)


def _resume(options: argparse.Namespace) -> int:
    from evomerge.searching.progress import display_for
    from evomerge.searching.run import resume

    run = resume(options.directory, budget=_budget(options.budget), yes=options.yes, display=display_for())
    return _conclude(run.path, run.results)


def _conclude(path: Path, results: dict[str, Any]) -> int:
    from evomerge.recipe import Recipe
    from evomerge.searching.results import summary
    from evomerge.spaces import describe_recipe

    print("\n" + describe_recipe(Recipe.from_dict(results["winner"]["recipe"])))
    print(summary(results))
    print(f"\nThe recipe is in {path}/recipe.yaml. Write the model with: evomerge export {path} --out MODEL")
    return 0


def _budget(entries: Sequence[str]) -> dict[str, Any]:
    from evomerge.schema import parse_yaml

    budget = {}
    for entry in entries:
        key, separator, value = entry.partition("=")
        if not separator:
            raise UserError(f"--budget {entry}: write it as key=value, e.g. --budget candidates=600")
        budget[key] = parse_yaml(value, f"--budget {key}")
    return budget


def _status(options: argparse.Namespace) -> int:
    from evomerge.searching.progress import sentence
    from evomerge.searching.rundir import read_status

    status = read_status(options.directory)
    print(json.dumps(status, indent=2) if options.json else sentence(status))
    return 0


def _export(options: argparse.Namespace) -> int:
    from evomerge.searching.export import export

    print(
        export(
            options.directory,
            options.out,
            format_=options.format,
            candidate=options.candidate,
            max_shard_size=options.max_shard_size,
        )
    )
    return 0


def _plan(options: argparse.Namespace) -> int:
    from evomerge.config import load_config
    from evomerge.searching.plan import plan_search
    from evomerge.searching.setup import set_up

    config = load_config(options.config, options.overrides)
    plan = plan_search(set_up(config, file=options.config, weights=False), config.budget)
    print(json.dumps(plan.to_dict(), indent=2) if options.json else str(plan))
    return 0
