"""Scores that several runs share: what one of them has scored, none has to score again.

A file holds what is known of one recipe under one engine, a line for each part of a block, and is only ever
appended to. A line carries a checksum over itself and the file's key, so that whatever becomes of a file (two
drivers on a shared file system, a kill in the middle of a line, a full disk), a line is either right or ignored.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Callable, Collection, Iterable
from dataclasses import astuple
from pathlib import Path
from typing import Any

from evomerge import __version__
from evomerge.environment import cache_folder
from evomerge.evaluation.items import ItemScore, Part, PartOutcome

FORMAT = "v1"
LIMIT_BYTES = 256 << 20
LIMIT_FILES = 50_000
KEPT_SHARE = 0.8
"""Of a limit that is exceeded, the share that is kept: what was used last."""

_BLOCK = 4096


def scores_folder(setting: bool | str) -> Path | None:
    """Return the folder that a config's `cache.scores` means, or None where nothing is to be kept."""
    if setting is False:
        return None
    return cache_folder() / "scores" if setting is True else Path(setting)


class ScoreCache:
    """What is known of recipes under one engine. Trouble with the files is told once and stops nothing.

    Args:
        folder: where the files lie; made when there is something to write. None: nothing is kept.
        fingerprint: of the engine.
        warn: tells a sentence.
        unshared: tasks of which nothing is kept.
        limit_bytes, limit_files: of the folder; above them, the files that were used longest ago go.
    """

    def __init__(
        self,
        folder: Path | None,
        fingerprint: str,
        warn: Callable[[str], None] = lambda _: None,
        *,
        unshared: Collection[str] = (),
        limit_bytes: int = LIMIT_BYTES,
        limit_files: int = LIMIT_FILES,
    ) -> None:
        self._folder = None if folder is None else folder / FORMAT
        self._fingerprint = fingerprint
        self._warn = warn
        self._unshared = unshared
        self._limits = (limit_bytes, limit_files)
        self._writable = True
        self._written = 0
        self.prune()

    def known(self, recipe: str, parts: Iterable[Part]) -> dict[str, PartOutcome]:
        """Return part hash → outcome of those parts that are known.

        Args:
            recipe: what decides the model's answers, see `evomerge.merging.identity`.
            parts: the parts that are of interest.
        """
        if self._folder is None:
            return {}
        key = self._key(recipe)
        path = self._file(key)
        try:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            return {}
        except OSError as error:
            self._give_up(path, error)
            return {}
        with contextlib.suppress(OSError):
            os.utime(path)
        wanted = {part.hash: part for part in parts if part.task not in self._unshared}
        found: dict[str, PartOutcome] = {}
        for line in lines:
            entry = _entry(line, key)
            part = None if entry is None else wanted.get(entry.get("part", ""))
            outcome = None if entry is None or part is None else _outcome(entry, part)
            if part is not None and outcome is not None:
                found.setdefault(part.hash, outcome)
        return found

    def add(self, recipe: str, outcomes: Iterable[tuple[Part, PartOutcome]]) -> None:
        """Keep outcomes of parts for whoever asks for them next."""
        if self._folder is None or not self._writable:
            return
        outcomes = [(part, outcome) for part, outcome in outcomes if part.task not in self._unshared]
        if not outcomes:
            return
        key = self._key(recipe)
        path = self._file(key)
        # A line that was cut off does not spoil the next one, which begins with a line end of its own.
        text = "".join(f"\n{_line(part, outcome, key)}\n" for part, outcome in outcomes)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab", buffering=0) as file:
                file.write(text.encode())
        except OSError as error:
            self._give_up(path, error)
            return
        self._written += len(text) + _BLOCK
        if self._written > self._limits[0] // 8:
            self.prune()

    def prune(self) -> None:
        """Remove what was used longest ago, if the folder is larger than it may be."""
        self._written = 0
        if self._folder is None:
            return
        files = []
        with contextlib.suppress(OSError):
            for shelf in os.scandir(self._folder):
                with contextlib.suppress(OSError):
                    files += [(entry.path, entry.stat()) for entry in os.scandir(shelf)]
        sizes = {path: -(-stat.st_size // _BLOCK) * _BLOCK for path, stat in files}
        room, count = (limit * KEPT_SHARE for limit in self._limits)
        if sum(sizes.values()) <= self._limits[0] and len(files) <= self._limits[1]:
            return
        for path, _ in sorted(files, key=lambda file: file[1].st_mtime_ns, reverse=True):
            room, count = room - sizes[path], count - 1
            if room < 0 or count < 0:
                with contextlib.suppress(OSError):
                    os.unlink(path)

    def _key(self, recipe: str) -> str:
        # A new version may merge or score in another way.
        text = json.dumps([__version__, recipe, self._fingerprint])
        return hashlib.sha256(text.encode()).hexdigest()

    def _file(self, key: str) -> Path:
        assert self._folder is not None
        return self._folder / key[:2] / f"{key[2:34]}.jsonl"

    def _give_up(self, path: Path, error: OSError) -> None:
        if self._writable:
            self._writable = False
            self._warn(
                f"scores are not kept for other runs: {path}: {error.strerror or error}; the search goes on "
                "(cache.scores names another folder, or false)"
            )


def _line(part: Part, outcome: PartOutcome, key: str) -> str:
    scores = [astuple(score)[2:] for score in outcome.scores]
    entry = {"part": part.hash, "scores": scores, "constant": outcome.constant, "failure": outcome.failure}
    text = json.dumps(entry, ensure_ascii=True)
    return f"{_checksum(text, key)} {text}"


def _entry(line: str, key: str) -> dict[str, Any] | None:
    checksum, _, text = line.partition(" ")
    if not text or checksum != _checksum(text, key):
        return None
    entry = json.loads(text)
    return entry if isinstance(entry, dict) else None


def _outcome(entry: dict[str, Any], part: Part) -> PartOutcome | None:
    """Return the outcome that a line tells, if it is one of such a part."""
    constant, failure = entry.get("constant"), entry.get("failure")
    if failure is not None:
        return PartOutcome(failure=str(failure))
    try:
        scores = tuple(
            ItemScore(item, part.task, *score)
            for item, score in zip(part.items, entry["scores"], strict=True)
        )
    except (KeyError, TypeError, ValueError):
        return None
    if not all(math.isfinite(score.raw) and math.isfinite(score.value) for score in scores):
        return None
    return PartOutcome(scores, None if constant is None else str(constant))


def _checksum(text: str, key: str) -> str:
    return hashlib.sha256(f"{key}{text}".encode()).hexdigest()[:16]
