"""Building the zoo's folder: what is missing or outdated is made, each part whole or not at all."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import json
import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from settings import Settings, Training

STAMP = "zoo_stamp.json"
"""Lies in every part of a zoo and says which code and settings made it."""

REPORT_SPLIT = "validation"

Call = Callable[[Callable[..., Any], list[tuple[Any, ...]]], list[Any]]


def build_zoo(out: Path, settings: Settings, jobs: int, force: bool) -> None:
    """Bring the zoo in `out` up to date and print what it holds.

    Raises FileExistsError where a part's place is taken by a folder that this script did not make.
    """
    start = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    stamp = stamp_of(settings)
    with lock(out):
        report = out / STAMP
        if force or read_stamp(out) != stamp or missing(out, settings, stamp):
            report.unlink(missing_ok=True)
            with workers(jobs) as call:
                build_parts(out, settings, stamp, call, force)
                write_report(out, settings, stamp, call)
            print(f"{out}: built in {time.monotonic() - start:.0f} s")
        else:
            print(f"{out}: up to date")
    print_report(json.loads(report.read_text()))


def stamp_of(settings: Settings) -> str:
    """A hash of the generator's code, its settings and the versions of the libraries that train."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    digest.update(json.dumps(asdict(settings), sort_keys=True).encode())
    for library in ("torch", "transformers", "tokenizers"):
        digest.update(f"{library} {importlib.metadata.version(library)}\n".encode())
    return digest.hexdigest()


def read_stamp(folder: Path) -> str | None:
    """The stamp in a folder, or None where it holds none."""
    path = folder / STAMP
    return json.loads(path.read_text())["stamp"] if path.is_file() else None


def part_names(settings: Settings) -> list[str]:
    """The folders of a zoo: the tasks and the models."""
    return ["tasks", *(model.name for model in settings.models)]


def missing(out: Path, settings: Settings, stamp: str) -> list[str]:
    """The parts of the zoo that are absent or were made by other code or settings."""
    return [part for part in part_names(settings) if read_stamp(out / part) != stamp]


@contextmanager
def lock(out: Path) -> Iterator[None]:
    """Hold the folder alone: a second build waits for the first."""
    with (out / ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@contextmanager
def workers(jobs: int) -> Iterator[Call]:
    """Call functions once for each tuple of arguments, in `jobs` processes (one job: in this one), results in order."""
    if jobs == 1:
        yield lambda function, arguments: [function(*each) for each in arguments]
        return
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield lambda function, arguments: list(pool.map(function, *zip(*arguments, strict=True)))


@contextmanager
def whole(folder: Path, stamp: str) -> Iterator[Path]:
    """A temporary folder that takes the place of `folder` at once when the block ends well."""
    if folder.exists() and not (folder / STAMP).is_file():
        raise FileExistsError(
            f"{folder} exists and was not made by this script; move it or choose another --out"
        )
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        temporary.chmod(0o755)
        yield temporary
        (temporary / STAMP).write_text(json.dumps({"stamp": stamp}) + "\n")
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def build_parts(out: Path, settings: Settings, stamp: str, call: Call, force: bool) -> None:
    """Make the tasks and the models that are missing (with `force`, all of them), parents before their children."""
    from tasks import write_tasks

    parts = part_names(settings)
    for leftover in (path for part in parts for path in out.glob(f".{part}-????????")):
        shutil.rmtree(leftover, ignore_errors=True)
    todo = parts if force else missing(out, settings, stamp)
    if "tasks" in todo:
        with whole(out / "tasks", stamp) as folder:
            write_tasks(folder, settings.splits, settings.seed)
    waiting = [model for model in settings.models if model.name in todo]
    while waiting:
        names = {model.name for model in waiting}
        ready = [model for model in waiting if model.parent not in names]
        ready.sort(key=lambda model: -model.steps)
        waiting = [model for model in waiting if model not in ready]
        call(build_model, [(out, model, settings, stamp) for model in ready])


def build_model(out: Path, training: Training, settings: Settings, stamp: str) -> None:
    """Train one model into its folder."""
    from train import train

    with whole(out / training.name, stamp) as folder:
        train(training, settings, out / training.parent if training.parent else None, folder)


def score(folder: Path, settings: Settings) -> dict[str, float]:
    """Scores of the model in `folder`, per skill; imported here so that an up-to-date zoo needs no torch."""
    from score import score_model

    return score_model(folder, settings, REPORT_SPLIT)


def write_report(out: Path, settings: Settings, stamp: str, call: Call) -> None:
    """Hash and score the models, and say in `out` that the zoo is complete."""
    names = [model.name for model in settings.models]
    scores = call(score, [(out / name, settings) for name in names])
    report = {
        "stamp": stamp,
        "split": REPORT_SPLIT,
        "scores": dict(zip(names, scores, strict=True)),
        "sha256": {
            f"{name}/{file.name}": hashlib.sha256(file.read_bytes()).hexdigest()
            for name in names
            for file in sorted((out / name).glob("*.safetensors"))
        },
    }
    temporary = out / f"{STAMP}.new"
    temporary.write_text(json.dumps(report, indent=2) + "\n")
    temporary.rename(out / STAMP)


def print_report(report: dict[str, Any]) -> None:
    """Print the weight files' hashes and the table of scores."""
    for file, digest in report["sha256"].items():
        print(f"{digest}  {file}")
    skills = list(next(iter(report["scores"].values())))
    print(f"\nexact match, {report['split']} items")
    print("".join([f"{'':<12}", *(f"{skill:>9}" for skill in [*skills, "mean"])]))
    for name, scores in report["scores"].items():
        values = [*scores.values(), sum(scores.values()) / len(scores)]
        print("".join([f"{name:<12}", *(f"{value:>9.3f}" for value in values)]))
