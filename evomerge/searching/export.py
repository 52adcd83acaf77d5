"""Taking things out of a run: the winner or a candidate as a model or recipe, tables of all candidates."""

from __future__ import annotations

import csv
from pathlib import Path

from evomerge.errors import UserError
from evomerge.mergekit import to_mergekit
from evomerge.merging import open_parents
from evomerge.recipe import Recipe
from evomerge.searching.run import Run


def export(
    folder: Path | str,
    out: Path | str,
    *,
    format_: str = "hf",
    candidate: int | None = None,
    max_shard_size: str = "5GB",
) -> str:
    """Write a part of a run; return a sentence that says what was written.

    Args:
        folder: the run directory.
        out: the folder (hf) or file to write; must not exist.
        format_: ``hf`` (a model), ``recipe``, ``mergekit`` (a YAML that says the same, differences as comments),
            or ``csv`` / ``parquet`` (one row per candidate).
        candidate: take this candidate; None takes the winner, or the incumbent of an unfinished run.
        max_shard_size: of the model's weight files.
    """
    run, out = Run(folder), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists already; name another with --out")
    if not out.parent.is_dir():
        raise UserError(f"{out.parent}: no such folder; make it first, or name another with --out")
    if format_ in ("csv", "parquet") and candidate is not None:
        raise UserError(f"--candidate: a {format_} table holds all candidates; leave --candidate out")
    try:
        return _write(run, out, format_, candidate, max_shard_size)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror or error}") from None


def _write(run: Run, out: Path, format_: str, candidate: int | None, max_shard_size: str) -> str:
    if format_ in ("csv", "parquet"):
        return _table(run, out, format_)
    what = f"candidate {candidate}" if candidate is not None else _leader(run)
    if format_ == "recipe":
        recipe = _recipe(run, candidate)
        out.write_text(recipe.to_yaml(), encoding="utf-8")
    elif format_ == "mergekit":
        recipe = _recipe(run, candidate)
        written = to_mergekit(recipe, open_parents(recipe))
        out.write_text(written.to_yaml(), encoding="utf-8")
        named = ", with what differs in mergekit as comments" if written.notes else ""
        return f"{what} of {run.path} is in {out} as a mergekit YAML{named}"
    else:
        run.export(out, candidate=candidate, max_shard_size=max_shard_size)
    return f"{what} of {run.path} is in {out}"


def _recipe(run: Run, candidate: int | None) -> Recipe:
    return run.recipe if candidate is None else run.candidate(candidate)


def _leader(run: Run) -> str:
    return "The winner" if run.status.get("state") == "done" else "The incumbent (the search has not ended)"


def _table(run: Run, out: Path, format_: str) -> str:
    rows = run.candidate_rows()
    columns = ["id", "generation", "position", "status", "fitness", "rank", "reason", "recipe"]
    # Layer paths that come after coefficients have other numbers, and more of them.
    dimension = max((len(row.genotype) for row in rows), default=0)
    numbers = [[*row.genotype, *[None] * (dimension - len(row.genotype))] for row in rows]
    if format_ == "parquet":
        frame = run.candidates()
        for i in range(dimension):
            frame[f"x{i}"] = [row[i] for row in numbers]
        frame.drop(columns="genotype").to_parquet(out)
    else:
        with out.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow([*columns, *(f"x{i}" for i in range(dimension))])
            for row, own in zip(rows, numbers, strict=True):
                writer.writerow([*(getattr(row, column) for column in columns), *own])
    return f"{len(rows)} candidates of {run.path} are in {out}"
