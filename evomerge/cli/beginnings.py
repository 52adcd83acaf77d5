"""Commands for who begins: a config to edit, and the list of methods."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from evomerge.cli.parser import Commands, add_json
from evomerge.errors import UserError

_INIT_HELP = """\
examples:
  evomerge init merge.yml --tasks gsm8k,arc_challenge -o my.yaml
  evomerge init ./base ./maths ./code --tasks zoo_add --include ./zoo/tasks -o my.yaml

Then read and edit it; 'evomerge plan' shows what the search will be.
"""


def add_commands(commands: Commands) -> None:
    """Declare them."""
    sub = commands.add(
        "init", _init, "write a search config around a published merge, or for a few models", _INIT_HELP
    )
    sub.add_argument(
        "sources", nargs="+", metavar="SOURCE", help="a mergekit YAML; or models, the base first"
    )
    sub.add_argument(
        "--tasks", required=True, metavar="A,B", help="names of lm-eval tasks, with commas between"
    )
    sub.add_argument(
        "--include", action="append", default=[], metavar="DIR", help="folder with task files of your own"
    )
    sub.add_argument(
        "--method", default="task_arithmetic", help="how models are merged (default: task_arithmetic)"
    )
    sub.add_argument("-o", "--out", type=Path, metavar="FILE", help="the config to write (default: stdout)")

    sub = commands.add("methods", _methods, "list the merge methods and their parameters")
    sub.add_argument("name", nargs="?", metavar="METHOD", help="show this one alone")
    add_json(sub)


def _init(options: argparse.Namespace) -> int:
    from evomerge.initial_config import initial_config

    if options.out is not None and options.out.exists():
        raise UserError(f"{options.out}: exists already; name another file with -o")
    tasks = [task for entry in options.tasks.split(",") if (task := entry.strip())]
    if not tasks:
        raise UserError("--tasks: is empty; name at least one lm-eval task")
    text = initial_config(options.sources, tasks, include=options.include, method=options.method)
    if options.out is None:
        print(text, end="")
        return 0
    try:
        options.out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{options.out}: cannot be written: {error.strerror or error}") from None
    print(f"{options.out} is written. See what it will be with: evomerge plan {options.out}")
    return 0


def _methods(options: argparse.Namespace) -> int:
    from evomerge.methods.describe import describe_methods, methods_table
    from evomerge.methods.registry import get_method

    if options.name is not None:
        try:
            get_method(options.name)
        except ValueError as error:
            raise UserError(f"METHOD: {error}") from None
    if options.json:
        table = methods_table()
        print(json.dumps([m for m in table if options.name in (None, m["name"])], indent=2))
    else:
        print(describe_methods(options.name))
    return 0
