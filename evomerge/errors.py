"""The ways in which a command can end other than well, and their exit codes."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


class EvomergeError(Exception):
    """A failure that is told to the user in one sentence, without a traceback."""

    exit_code = 1


class UserError(EvomergeError):
    """The user's mistake: a file, key or value is wrong. Names the place, the value and the fix.

    Args:
        problem: the sentence.
        key: the key of the user's file that it is about ("" for the file as a whole), where the sentence does not
            name the file yet: whoever knows the file adds it, by `in_file`.
    """

    exit_code = 2

    def __init__(self, problem: str, *, key: str | None = None) -> None:
        super().__init__(problem)
        self.problem = problem
        self.key = key

    def __str__(self) -> str:
        return f"{at(None, self.key or '')}{self.problem}"


class CheckpointError(UserError):
    """A checkpoint cannot be used: truncated, mismatched, non-finite, unknown tensors."""


class SourceNotFound(CheckpointError):
    """A model or adapter is not where the user says: no such folder, nor repository on the hub."""


class InfrastructureError(EvomergeError):
    """Workers, disk or memory failed. The run is saved and can be resumed."""

    exit_code = 3


class Stopped(EvomergeError):
    """Stopped by a signal or a time limit. The run is saved and can be resumed."""

    exit_code = 75


class CandidateFailed(Exception):
    """One candidate cannot be scored (non-finite weights, logits, degenerate answers).

    It is an outcome of the search, not an error of the program: the candidate gets the worst rank and
    the reason is recorded.
    """


class EngineLost(Exception):
    """The engine crashed, or memory ran out: what it held is gone, and nothing was scored.

    It is an infrastructure failure, never an outcome: the worker lets engine and model go, the request is
    tried again on new ones, and a request that is lost again and again stops the run, resumable.
    """


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the known name closest to `name`, or an empty string."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean '{matches[0]}'?)" if matches else ""


@contextmanager
def in_file(file: Path | str | None, key_of: Callable[[str], str] = str) -> Iterator[None]:
    """Put a file before the key that an error raised inside is about; once, and only where it is about a key.

    Args:
        file: that the user wrote; None if there is none.
        key_of: returns what a key is called in the file.
    """
    try:
        yield
    except UserError as error:
        if error.key is None:
            raise
        raise type(error)(f"{at(file, key_of(error.key))}{error.problem}") from None


def at(file: Path | str | None, key: str = "") -> str:
    """Return the ``file: key: `` prefix of an error message; either part may be missing."""
    parts = [str(part) for part in (file, key) if part]
    return ": ".join(parts) + (": " if parts else "")
