"""The command that computes what fisher and regmean weigh the models with."""

from __future__ import annotations

import argparse
from pathlib import Path

from evomerge.cli.display import stoppable
from evomerge.cli.parser import Commands
from evomerge.environment import prepare
from evomerge.errors import UserError

_STATISTICS_HELP = """\
A merge by fisher or regmean computes them itself where they are missing. Computed ahead, with the settings of
the recipe's data, they are found by every merge of this model on these texts.

examples:
  evomerge statistics ./maths --data maths.jsonl --kind gram --device cuda
  evomerge statistics ./maths --data maths.jsonl --kind fisher --samples 1000 --out maths-fisher
  evomerge statistics --list
  evomerge statistics --prune 30                  removes what no merge or search used for 30 days
"""


def add_commands(commands: Commands) -> None:
    """Declare them."""
    sub = commands.add(
        "statistics", _statistics, "compute what a model's data says of its weights", _STATISTICS_HELP
    )
    sub.add_argument("model", nargs="?", metavar="MODEL", help="model folder or hub id")
    sub.add_argument("--data", type=Path, metavar="FILE", help="JSONL with one text a line")
    sub.add_argument("--kind", choices=("fisher", "gram"), help="for fisher, or for regmean")
    sub.add_argument("--key", default="text", help="key of the text in each line (default: text)")
    sub.add_argument("--prompt", metavar="KEY", help="key of a prompt that the text answers")
    sub.add_argument("--samples", type=int, default=256, metavar="N", help="texts used (default: 256)")
    sub.add_argument("--max-length", type=int, default=512, metavar="N", help="tokens of each (default: 512)")
    sub.add_argument(
        "--labels",
        choices=("given", "sampled"),
        default="given",
        help="of the Fisher information (default: given)",
    )
    sub.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    sub.add_argument("--out", type=Path, metavar="DIR", help="folder to write (default: where merges look)")
    sub.add_argument("--list", action="store_true", dest="list_", help="show what is kept where merges look")
    sub.add_argument("--prune", type=float, metavar="DAYS", help="remove what was not used for so many days")


def _statistics(options: argparse.Namespace) -> int:
    if options.list_ or options.prune is not None:
        return _kept(options)
    missing = [name for name in ("model", "data", "kind") if getattr(options, name) is None]
    if missing:
        what = {"model": "MODEL", "data": "--data", "kind": "--kind"}[missing[0]]
        raise UserError(f"statistics: {what} is missing (see 'evomerge statistics --help')")
    from rich.console import Console

    prepare(offline=Path(options.model).expanduser().exists())
    from evomerge.data_config import Data
    from evomerge.schema import validate
    from evomerge.statistics.collect import collect_statistics
    from evomerge.statistics.needed import in_lines

    settings = {key: getattr(options, key) for key in ("key", "prompt", "samples", "max_length", "labels")}
    data = validate(Data, {"texts": str(options.data), **settings}, None)
    say = Console(stderr=True).print
    with stoppable("nothing was written"):
        statistics = collect_statistics(
            options.model, data, options.kind, options.out, device=options.device, report=in_lines(say)
        )
    print(statistics.folder)
    return 0


def _kept(options: argparse.Namespace) -> int:
    """List what is kept, or remove what was not used for a while; what was computed with --out is neither."""
    given = [name for name in ("model", "data", "kind", "out") if getattr(options, name) is not None]
    if given:
        raise UserError("statistics: --list and --prune are about all that is kept; give nothing else")
    if options.prune is not None and not options.prune >= 0:
        raise UserError(f"--prune {options.prune:g}: give a number of days from 0 on")
    from evomerge.statistics.files import statistics_cache
    from evomerge.statistics.kept import kept_folders, prune

    removed = [] if options.prune is None else prune(options.prune)
    for kept in kept_folders() if options.list_ else removed:
        print(kept)
    if options.prune is not None:
        print(
            f"{len(removed)} removed from {statistics_cache()}, {sum(k.nbytes for k in removed) / 1e6:,.1f} MB"
        )
    return 0
