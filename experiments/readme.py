"""The tables in an experiment's README.md, between two marks; what stands around them is written by hand."""

from __future__ import annotations

from pathlib import Path

START, END = "<!-- results -->", "<!-- end -->"


def put_tables(file: Path, tables: str) -> None:
    """Replace what stands between the marks; a file without them is left as it is."""
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if start and end:
        file.write_text(f"{before}{start}\n{tables}{end}{after}", encoding="utf-8")
