"""Items that users keep in files of their own: texts and JSONL rows, and the splits that they fall into."""

from __future__ import annotations

import glob
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evomerge.errors import UserError, nearest
from evomerge.evaluation.items import SPLITS, Split
from evomerge.evaluation.splits import share_of, uniform
from evomerge.schema import read_text, shown
from evomerge.suite_config import FilesOfSplits, ItemFiles, SplitFractions

JSONL = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class Row:
    """One item as its file has it.

    Attributes:
        index: position among the rows of its split's files, or of all files where they are cut by hash.
        content: a text, or a JSONL row.
        group: rows of one group never fall into different splits.
    """

    index: int
    content: Any
    group: str


def deal(
    files: ItemFiles,
    read: Callable[[Path], Iterator[tuple[Any, str]]],
    *,
    fractions: SplitFractions,
    limit: int | None,
    name: str,
    place: str,
) -> dict[Split, list[Row]]:
    """Read a task's files and put every row into a split.

    Args:
        files: those of each split, or files that are cut by hash of each row's group.
        read: yields (content, group) of a file's rows.
        fractions: of the cut.
        limit: the most rows of each split; a hash of the group chooses, whatever the order of the file.
        name: of the task.
        place: where it stands in the config, for messages.

    Raises:
        UserError: a file is missing or cannot be read, a split has no rows, two splits share groups.
    """
    named = isinstance(files, FilesOfSplits)
    if isinstance(files, FilesOfSplits):
        rows = {split: _rows(getattr(files, split), read, f"{place}{split}: ") for split in SPLITS}
    else:
        every = _rows(files, read, place)
        rows = {split: [row for row in every if share_of(row.group, fractions) == split] for split in SPLITS}
    for split, own in rows.items():
        if not own:
            raise UserError(
                f"{place}task '{name}' has no {split} items"
                + ("" if named else f" among its {len(every)}; give it more, or three files")
            )
        if limit is not None:
            kept = sorted(own, key=lambda row: (uniform("limit", row.group), row.index))[:limit]
            rows[split] = sorted(kept, key=lambda row: row.index)
    _check_disjoint(rows, name, place)
    return rows


def texts_in(path: Path, *, field: str | None, unit: str | None) -> Iterator[str]:
    """Yield the documents of a file: a JSONL file's rows, or a text file's paragraphs, lines or whole.

    Args:
        path: JSONL if its name ends so, otherwise plain text.
        field: of a JSONL row, ``text`` by default.
        unit: paragraph (the default: separated by blank lines), line or file.

    Raises:
        UserError: the file or one of its rows cannot be read, or the wrong one of `field` and `unit` is given.
    """
    if path.suffix in JSONL:
        if unit is not None:
            raise UserError(f"{path}: unit: {unit}: rows of a JSONL file are the documents; leave 'unit' out")
        yield from _texts_of_rows(path, field or "text")
        return
    if field is not None:
        raise UserError(
            f"{path}: field: {field}: only JSONL files have fields; name the file .jsonl, or leave it out"
        )
    content = read_text(path, "text file")
    if unit == "file":
        yield content
    elif unit == "line":
        yield from content.split("\n")
    else:
        yield from _paragraphs(content)


def rows_in(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a JSONL file.

    Raises:
        UserError: the file or a row cannot be read; names the line.
    """
    if path.suffix not in JSONL:
        raise UserError(f"{path}: items are rows of a JSONL file; one whose name ends in .jsonl")
    for number, line in enumerate(read_text(path, "file of items").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: line {number} is not JSON: {str(error).split(':')[0]}") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}: line {number}: a row is an object of fields, this is {shown(row)}")
        yield row


def field_of(row: Mapping[str, Any], field: str, path: Path) -> Any:
    """Return a field of a row; `path` is named where there is none.

    Raises:
        UserError: the row has no such field.
    """
    if field not in row:
        raise UserError(f"{path}: a row has no field '{field}'{nearest(field, row)}; it has {', '.join(row)}")
    return row[field]


def _texts_of_rows(path: Path, field: str) -> Iterator[str]:
    for row in rows_in(path):
        text = field_of(row, field, path)
        if not isinstance(text, str):
            raise UserError(
                f"{path}: the field '{field}' of a row is no text but {shown(text)}; name another field"
            )
        yield text


def _paragraphs(content: str) -> Iterator[str]:
    lines: list[str] = []
    for line in [*content.split("\n"), ""]:
        if line.strip():
            lines.append(line)
        elif lines:
            yield "\n".join(lines)
            lines = []


def _rows(
    patterns: Sequence[str], read: Callable[[Path], Iterator[tuple[Any, str]]], place: str
) -> list[Row]:
    rows: list[Row] = []
    for path in _files(patterns, place):
        for content, group in read(path):
            rows.append(Row(len(rows), content, group))
    return rows


def _files(patterns: Sequence[str], place: str) -> Iterator[Path]:
    for pattern in patterns:
        found = sorted(glob.glob(pattern, recursive=True)) if glob.has_magic(pattern) else [pattern]
        paths = [Path(path) for path in found]
        if not glob.has_magic(pattern) and not paths[0].exists():
            raise UserError(f"{place}{pattern}: no such file")
        paths = [path for path in paths if path.is_file()]
        if not paths:
            raise UserError(
                f"{place}{pattern}: no file has such a name; a folder needs a pattern such as {pattern}/*.txt"
            )
        yield from paths


def _check_disjoint(rows: Mapping[Split, Sequence[Row]], name: str, place: str) -> None:
    groups = {split: {row.group for row in own} for split, own in rows.items()}
    for first, second in (("search", "validation"), ("search", "test"), ("validation", "test")):
        shared = groups[first] & groups[second]  # type: ignore[index]
        if shared:
            raise UserError(
                f"{place}task '{name}': {len(shared)} of {len(groups[second])} {second} items are "  # type: ignore[index]
                f"{first} items too, e.g. {min(shared)!r:.80}; take them out of one file"
            )
