"""How commands and the arguments that several of them share are declared."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NoReturn

from evomerge.errors import UserError


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are the user's mistakes, in one sentence like all others."""

    def error(self, message: str) -> NoReturn:
        """Raise `UserError` with the command and where its help is."""
        command = self.prog.removeprefix("evomerge").strip()
        raise UserError(f"{command + ': ' if command else ''}{message} (see '{self.prog} --help')")


class Commands:
    """The commands of the program, in the order in which they are added."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self._commands = parser.add_subparsers(
            title="commands", metavar="COMMAND", required=True, parser_class=Parser
        )

    def add(
        self, name: str, function: Callable[[argparse.Namespace], int], summary: str, epilog: str = ""
    ) -> argparse.ArgumentParser:
        """Declare a command that runs `function`; return its parser, for its arguments."""
        parser = self._commands.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.set_defaults(run_command=function)
        return parser


def add_set(parser: argparse.ArgumentParser) -> None:
    """Add --set, which overrides a key of the config."""
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="A.B=C",
        help="override a key of the config, e.g. --set budget.candidates=100",
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add --json, for programs that read the answer."""
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")


def add_shard_size(parser: argparse.ArgumentParser) -> None:
    """Add --max-shard-size, of what is written."""
    parser.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="of a weights file (default: 5GB)"
    )


def add_yes(parser: argparse.ArgumentParser) -> None:
    """Add --yes, for searches whose preview finds answers that cannot be extracted."""
    parser.add_argument(
        "--yes", action="store_true", help="go on although answers to a task cannot be extracted"
    )
