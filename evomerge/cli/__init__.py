"""The commands. Thin: each one reads its arguments, calls the Python face and prints."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from evomerge import __version__
from evomerge.cli import beginnings, evaluation, merges, searches, statistics
from evomerge.cli.parser import Commands, Parser
from evomerge.environment import prepare
from evomerge.errors import EvomergeError

DESCRIPTION = """\
Find the best model that can be merged from a handful of fine-tuned checkpoints.

You write one YAML file: a base, its fine-tunes, what may vary, the tasks that matter, a budget. A search
proposes merges, scores them on your tasks and ends with a recipe, an honest number on items it never saw,
and a plain Hugging Face checkpoint.
"""

EPILOG = """\
a first session:
  evomerge plan    configs/quickstart.yaml        what the search will be, before it starts
  evomerge search  configs/quickstart.yaml        run it; Ctrl-C at any time
  evomerge resume  runs/quickstart                go on where it stopped
  evomerge export  runs/quickstart --out merged   write the winner as a Hugging Face folder

exit codes: 0 done; 2 a mistake in the config or its files; 3 workers or disk failed, the run can be
resumed; 75 stopped by a signal, the run can be resumed.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code. Whether it may use the network is decided once its models are known."""
    prepare(offline=False)
    try:
        options = _parser().parse_args(arguments)
        return int(options.run_command(options) or 0)
    except EvomergeError as error:
        print(f"evomerge: {error}" if error.exit_code != 75 else str(error), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return 75
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="evomerge",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"evomerge {__version__}")
    commands = Commands(parser)
    for group in (searches, merges, statistics, evaluation, beginnings):
        group.add_commands(commands)
    return parser
