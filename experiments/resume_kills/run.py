#!/usr/bin/env python3
"""kill -9 at 50 random instants: does the resumed run end with the tables of an undisturbed one?

    .venv/bin/python scripts/build_zoo
    .venv/bin/python experiments/resume_kills/run.py

Each trial starts a small search over the zoo's models in a process of its own, kills it -9 at a random instant of
its life (creation, preview, generations, selection, test), resumes it, and compares all canonical tables of run.db
and the recipe file with those of a run that nothing disturbed. Writes README.md.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path

from evomerge.environment import prepare

prepare()

import evomerge  # noqa: E402
from evomerge.errors import EvomergeError  # noqa: E402
from evomerge.searching.rundir import open_run, read_status  # noqa: E402

HERE = Path(__file__).resolve().parent
CONFIG = HERE.parents[1] / "configs" / "quickstart.yaml"
OVERRIDES = [
    "workers.type=local",
    "budget.candidates=36",
    "suite.items_per_candidate=24",
    "suite.block_items=12",
    *(f"suite.tasks.{i}.limit=12" for i in range(6)),
]


def drive(folder: Path) -> None:
    """Start or resume the search in `folder`."""
    evomerge.search(CONFIG, run=folder, overrides=OVERRIDES, continue_=True)


def in_child(folder: Path, kill_after: float | None) -> bool:
    """Drive a run in a forked process; return whether it was killed before its end."""
    pid = os.fork()
    if pid == 0:
        try:
            drive(folder)
        except BaseException:
            os._exit(1)
        os._exit(0)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    if not os.WIFSIGNALED(status) and os.WEXITSTATUS(status) != 0:
        raise SystemExit(f"{folder}: the driver failed by itself")
    return os.WIFSIGNALED(status)


def contents(folder: Path) -> tuple[dict[str, list[tuple[object, ...]]], str]:
    """Return a run's canonical tables and its recipe."""
    store = open_run(folder)
    try:
        return store.canonical(), (folder / "recipe.yaml").read_text()
    finally:
        store.close()


def state_of(folder: Path) -> str:
    """Return in which phase a killed run was."""
    try:
        status = read_status(folder)
    except EvomergeError:
        return "before the run directory existed"
    phase = str(status.get("phase", "created"))
    return "generations" if phase.startswith("generation") else phase


def main() -> None:
    """Run the trials and write the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    options = parser.parse_args()
    instants = random.Random(0)
    phases: Counter[str] = Counter()
    kills = identical = 0
    with tempfile.TemporaryDirectory() as temporary:
        undisturbed = Path(temporary) / "undisturbed"
        drive(undisturbed)
        started = time.monotonic()
        in_child(Path(temporary) / "timed", None)
        whole = time.monotonic() - started
        expected = contents(undisturbed)
        while kills < options.kills:
            folder = Path(temporary) / f"killed-{kills}"
            if in_child(folder, instants.uniform(0.0, 1.0) * whole):
                kills += 1
                phases[state_of(folder)] += 1
                in_child(folder, None)
                identical += contents(folder) == expected
                print(f"{identical} of {kills} identical", flush=True)
    lines = [
        "# kill -9 at random instants",
        "",
        "Made by `.venv/bin/python experiments/resume_kills/run.py`.",
        "",
        f"After `kill -9` at a random instant and one resume, {identical} of {kills} runs ended with the canonical "
        "tables and the recipe of an undisturbed run.",
        "",
        "| where the kill fell | kills |",
        "|---|---|",
        *(f"| {phase} | {count} |" for phase, count in phases.most_common()),
    ]
    (HERE / "README.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
