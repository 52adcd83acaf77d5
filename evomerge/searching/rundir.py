"""The run directory: what lies in it, how it comes into being, and how its files are rebuilt."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from evomerge.config import Config, parse_config
from evomerge.errors import InfrastructureError, UserError
from evomerge.schema import read_yaml
from evomerge.searching.store import Store

CONFIG = "config.yaml"
RESOLVED = "config.resolved.yaml"
DATABASE = "run.db"
RECIPE = "recipe.yaml"
RESULTS = "results.json"
STATUS = "status.json"
LOG = "log.jsonl"
PREVIEW = "preview.md"


def refuse_taken(folder: Path) -> None:
    """Refuse a place for a new run unless it does not exist or is an empty folder."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if (folder / DATABASE).exists():
            raise UserError(
                f"{folder}: this run exists already; continue it with 'evomerge resume {folder}', "
                "or name another folder with --run"
            )
        raise UserError(f"{folder}: is not empty and not a run; name another folder with --run")


def create_run(folder: Path, config: Config, original: str, *, given: Config | None = None) -> Store:
    """Make a run directory and open its database.

    It is made under another name and renamed when it is whole, so that a run directory that exists can be
    resumed.

    Args:
        folder: must not exist, or be empty.
        config: validated, paths absolute.
        original: the config file's text, kept verbatim.
        given: the same with its overrides, nothing decided yet; by default `config`.
    """
    refuse_taken(folder)
    place = folder.resolve()
    if place == Path.cwd():
        raise UserError(f"{folder}: is the current folder; name another folder with --run")
    partial = place.parent / f".{place.name}.partial-{os.getpid()}"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        (partial / CONFIG).write_text(original, encoding="utf-8")
        (partial / RESOLVED).write_text(config.to_yaml(), encoding="utf-8")
        store = Store(partial / DATABASE, create=True)
        try:
            store.set_meta(given=(given or config).model_dump(mode="json"))
        finally:
            store.close()
        partial.rename(place)
    except (NotADirectoryError, FileExistsError, PermissionError) as error:
        raise UserError(
            f"{folder}: the run cannot be kept here ({error.strerror}); name another folder with --run"
        ) from None
    except OSError as error:
        raise InfrastructureError(f"{folder}: cannot be made: {error.strerror or error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Store(folder / DATABASE, create=False)


def open_run(folder: Path) -> Store:
    """Open an existing run for driving."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run")
    if not (folder / DATABASE).exists():
        raise UserError(f"{folder}: is not a run (it has no {DATABASE})")
    return Store(folder / DATABASE, create=False)


def load_resolved(folder: Path) -> Config:
    """Read a run's normalised config."""
    path = folder / RESOLVED
    return parse_config(read_yaml(path, "config"), path)


def write_atomically(path: Path, text: str) -> None:
    """Replace a file's contents so that readers see the old or the new one, never half."""
    temporary = path.with_name(f".{path.name}.new")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise InfrastructureError(f"{path}: cannot be written: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, data: Any) -> None:
    """Write one JSON object, indented."""
    write_atomically(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def read_status(folder: Path) -> dict[str, Any]:
    """Return a run's status as last written by its driver."""
    path = folder / STATUS
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict):
            raise ValueError("not an object")
    except FileNotFoundError:
        if (folder / DATABASE).exists():
            return {"state": "created", "run": str(folder)}
        raise UserError(f"{folder}: is not a run (it has no {DATABASE})") from None
    except ValueError:
        raise UserError(f"{path}: is not a status; 'evomerge resume {folder}' writes it anew") from None
    if data.get("state") in ("starting", "running", "selecting") and not _alive(data):
        data["state"] = "interrupted"
    # A run may have been moved since.
    return {**data, "run": str(folder)}


def _alive(status: dict[str, Any]) -> bool:
    """Whether the driver that wrote a status still runs; on another machine it is taken for alive."""
    if status.get("host") != os.uname().nodename:
        return True
    try:
        os.kill(int(status["pid"]), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, KeyError, TypeError, ValueError, OverflowError):
        return True
    return True
