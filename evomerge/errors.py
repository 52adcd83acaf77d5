"""The ways in which a command can end other than well, and their exit codes."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


class EvomergeError(Exception):
    """A failure that is told to the user in one sentence, without a traceback."""

    exit_code = 1


class UserError(EvomergeError):
    """The user's mistake: a file, key or value is wrong. Names the place, the value and the fix."""

    exit_code = 2


class CheckpointError(UserError):
    """A checkpoint cannot be used: truncated, mismatched, non-finite, unknown tensors."""


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


def at(file: Path | str | None, key: str = "") -> str:
    """Return the ``file: key: `` prefix of an error message; either part may be missing."""
    parts = [str(part) for part in (file, key) if part]
    return ": ".join(parts) + (": " if parts else "")
