"""Tasks that a function of the user's scores."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib
import importlib.machinery
import importlib.util
import json
import math
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from evomerge.errors import UserError, at, nearest
from evomerge.evaluation.entries import Entry, Reply
from evomerge.evaluation.guards import Answers
from evomerge.evaluation.items import Item, Split
from evomerge.evaluation.metrics import Metric
from evomerge.evaluation.model import Model
from evomerge.evaluation.preview import Preview
from evomerge.evaluation.requests import Engine
from evomerge.evaluation.rows import Row, deal, field_of, rows_in
from evomerge.losses import loss
from evomerge.suite_config import PythonSpec, Splits

SCORE = Metric("score", "none", "share", higher_is_better=True)


@dataclass(frozen=True)
class Function:
    """A user's scoring function.

    Attributes:
        name: ``module:function``.
        folder: where its module is looked for first, when it is imported and while it runs.
        call: the function.
        source: sha256 of its module's source.
    """

    name: str
    folder: str
    call: Callable[..., Any]
    source: str


def check_python(spec: PythonSpec, *, trusted: bool, file: Path | str | None) -> None:
    """Refuse to import anything unless the config says that its tasks may run code."""
    if not trusted:
        raise UserError(
            f"{at(file, 'suite.trust_task_code')}task '{spec.name}' calls Python ({spec.python}); "
            "read it, then set suite.trust_task_code: true"
        )


class PythonTask:
    """A suite's `python` entry; see `evomerge.evaluation.entries.Task`.

    Args:
        spec: the entry.
        splits: whose fractions cut the files, unless the entry says how.
        tokenizer: handed to the function with the model.
        place: where the entry stands in the config, for messages.

    Raises:
        UserError: the function cannot be imported, a file cannot be read, or a split is empty.
    """

    metric = SCORE
    output_type = "python"

    def __init__(self, spec: PythonSpec, splits: Splits, tokenizer: Any, *, place: str) -> None:
        self._name = spec.name
        self._function = load_function(spec, f"{place}task '{spec.name}': ")
        self._tokenizer = tokenizer

        def read(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
            for row in rows_in(path):
                yield row, _canonical(row if spec.group is None else field_of(row, spec.group, path))

        self._rows = deal(
            spec.items,
            read,
            fractions=spec.fractions or splits.fractions,
            limit=spec.limit,
            name=spec.name,
            place=place,
        )

    @property
    def documents(self) -> Mapping[Split, Sequence[Row]]:
        """See `Task.documents`."""
        return self._rows

    def entries(self, split: Split) -> list[Entry]:
        """See `Task.entries`."""
        scorer = PythonScorer(self._name, self._function, self._tokenizer)
        return [
            Entry(
                item=Item(_identity(self._function, row.content), self._name, split, row.index),
                requests=(),
                scorer=scorer,
                reference=None,
                material=row.content,
            )
            for row in self._rows[split]
        ]


class PythonScorer:
    """Scores by calling the function; see `evomerge.evaluation.entries.Scorer`."""

    def __init__(self, task: str, function: Function, tokenizer: Any) -> None:
        self._task = task
        self._function = function
        self._tokenizer = tokenizer

    def score(self, replies: Sequence[Reply], engine: Engine) -> list[tuple[float, float]]:
        """See `Scorer.score`."""
        return [(score, score) for score, _ in self._call(replies, engine)]

    def given(self, replies: Sequence[Reply]) -> Answers | None:
        """Return None: only the function knows what was asked."""
        return None

    def preview(self, reply: Reply, engine: Engine) -> Preview:
        """See `Scorer.preview`."""
        ((score, answer),) = self._call([reply], engine)
        row = json.dumps(reply.entry.material, ensure_ascii=False)
        return Preview(self._task, row, answer, "", "", score, True)

    def _call(self, replies: Sequence[Reply], engine: Engine) -> list[tuple[float, str]]:
        items = [copy.deepcopy(reply.entry.material) for reply in replies]
        model = Model(engine, self._tokenizer)
        try:
            with importable(self._function.folder):
                returned = self._function.call(model, items)
                returned = returned if isinstance(returned, list) else _listed(returned)
        except (Exception, SystemExit) as error:
            # What the engine says of the model passes as it is, whatever the function made of it.
            if model.failure is not None:
                raise model.failure from None
            if loss(error) is not None:
                raise
            raise self._refusal(f"fails{_where(error, self._function.folder)}: {_said(error)}") from error
        finally:
            model.close()
        if model.failure is not None:
            raise model.failure
        if len(returned) != len(replies):
            raise self._refusal(
                f"returned {len(returned)} scores for {len(replies)} items; return one for each"
            )
        return [self._read(entry, number) for number, entry in enumerate(returned)]

    def _read(self, entry: Any, number: int) -> tuple[float, str]:
        """Return (score, answer) of what the function returned for one item."""
        answer = ""
        if isinstance(entry, Mapping):
            if "score" not in entry:
                raise self._refusal(
                    f"returned {entry!r:.80} for item {number} of its list; a mapping needs the key 'score'"
                )
            entry, answer = entry["score"], str(entry.get("answer", ""))
        try:
            if not hasattr(entry, "__float__"):
                raise TypeError
            score = float(entry)
        except (TypeError, ValueError, RuntimeError):
            raise self._refusal(
                f"returned {entry!r:.80} for item {number} of its list; a score is a number from 0 to 1"
            ) from None
        if not math.isfinite(score) or not 0 <= score <= 1:
            raise self._refusal(
                f"returned {score:g} for item {number} of its list; a score is a number from 0 to 1"
            )
        return score, answer

    def _refusal(self, what: str) -> UserError:
        return UserError(f"task '{self._task}': {self._function.name} {what}")


def load_function(spec: PythonSpec, place: str) -> Function:
    """Import the function that an entry names.

    A module of the entry's folder that has changed since it was imported in this process is imported anew.

    Args:
        spec: the entry.
        place: begins messages.

    Raises:
        UserError: there is no such module or function, or importing it fails.
    """
    name, _, function = spec.python.partition(":")
    with importable(spec.folder):
        _forget_if_changed(name, spec.folder)
        try:
            module = importlib.import_module(name)
        except (Exception, SystemExit) as error:
            missing = isinstance(error, ModuleNotFoundError) and name.startswith(str(error.name))
            if missing:
                raise UserError(
                    f"{place}there is no module '{name}', neither in {spec.folder} nor installed; "
                    f"put {name.replace('.', '/')}.py there"
                ) from None
            raise UserError(
                f"{place}importing {name} fails{_where(error, spec.folder)}: {_said(error)}"
            ) from error
    call = getattr(module, function, None)
    if not callable(call):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UserError(f"{place}the module '{name}' has no function '{function}'{nearest(function, known)}")
    digest = hashlib.sha256(_source(module)).hexdigest()
    _IMPORTED[name] = (_file(module), digest)
    return Function(spec.python, spec.folder, call, digest)


@contextlib.contextmanager
def importable(folder: str) -> Iterator[None]:
    """Let modules of a folder be imported, before those of other places, and leave no trace in it."""
    path, silent = list(sys.path), sys.dont_write_bytecode
    sys.path.insert(0, folder)
    sys.dont_write_bytecode = True
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path[:] = path
        sys.dont_write_bytecode = silent


_IMPORTED: dict[str, tuple[Path, str]] = {}
"""Module → (file, sha256 of its source) of what was imported here; the module itself only knows its file."""


def _forget_if_changed(name: str, folder: str) -> None:
    """Forget a module, with its package, that is not the one in the folder, or no longer what it was."""
    top = name.partition(".")[0]
    if importlib.machinery.PathFinder.find_spec(top, [folder]) is None or top in sys.stdlib_module_names:
        return
    loaded = {key: sys.modules[key] for key in (top, name) if key in sys.modules}
    elsewhere = any(not _file(module).is_relative_to(Path(folder).resolve()) for module in loaded.values())
    changed = name in loaded and _IMPORTED.get(name) != (
        _file(loaded[name]),
        hashlib.sha256(_source(loaded[name])).hexdigest(),
    )
    if elsewhere or changed:
        for known in [key for key in sys.modules if key == top or key.startswith(f"{top}.")]:
            del sys.modules[known]


def _file(module: ModuleType) -> Path:
    """Return a module's file, or the folder of a package without one."""
    places = [getattr(module, "__file__", None), *getattr(module, "__path__", ())]
    return Path(next((place for place in places if place), "/")).resolve()


def _source(module: ModuleType) -> bytes:
    file = _file(module)
    return file.read_bytes() if file.is_file() else b""


def _listed(returned: Any) -> list[Any]:
    if isinstance(returned, str | bytes | Mapping) or not hasattr(returned, "__iter__"):
        raise TypeError(f"it returned {returned!r:.80}, not a list of scores")
    return list(returned)


def _where(error: BaseException, folder: str) -> str:
    """Return `` in file.py, line 3`` for the innermost line of the user's code."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(Path(folder).resolve())]
    return f" in {own[-1].filename}, line {own[-1].lineno}" if own else ""


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split()):.200}".removesuffix(": ")


def _identity(function: Function, row: Any) -> str:
    content = json.dumps(["python", function.name.rpartition(":")[2], function.source, _canonical(row)])
    return hashlib.sha256(content.encode()).hexdigest()


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)
