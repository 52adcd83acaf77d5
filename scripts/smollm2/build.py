"""Build SmolLM2-135M-Instruct, three LoRA experts of it, and tasks that measure them. Nothing is downloaded here."""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError
from pathlib import Path

os.environ.update(
    HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1", MKL_NUM_THREADS="1"
)

from convert import build_base, sha256
from experts import EXPERTS, Settings, forget_progress, is_built
from tasks import write_tasks

REPOSITORY = Path(__file__).resolve().parents[2]
BASE = "SmolLM2-135M-Instruct"


class Busy(RuntimeError):
    """Somebody else is building in a folder."""


@contextmanager
def alone_in(folder: Path) -> Iterator[int]:
    """Keep other builds out of a folder until this process and all that hold the yielded descriptor have ended.

    The lock is on a file, not on the folder: network file systems lock only what can be written.

    Raises:
        Busy: another build is there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Busy(f"{folder}: another build is at work here; wait until it ends, or stop it") from error
        yield lock.fileno()


def build_experts(base: Path, folder: Path, settings: Settings, *, jobs: int, force: bool, lock: int) -> None:
    """Train the experts that are not there yet, `jobs` at a time, and print their hashes.

    Trainings hold the `lock` too: should this process be killed, they keep other builds out while they go on.

    Raises:
        ChildProcessError: a training failed; its output was shown.
    """
    waiting = [n for n in EXPERTS if force or not is_built(folder / n, base, settings)]
    if force:
        forget_progress(folder)
    if waiting:
        print(f"training {', '.join(waiting)} (about 10 minutes on two idle cores)", flush=True)
    running: dict[str, subprocess.Popen[bytes]] = {}
    script = Path(__file__).with_name("experts.py")
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                name = waiting.pop(0)
                command = [sys.executable, script, name, base, folder / name, json.dumps(asdict(settings))]
                running[name] = subprocess.Popen(command, pass_fds=[lock])
            for name in [name for name, process in running.items() if process.poll() is not None]:
                if running.pop(name).returncode:
                    raise ChildProcessError(f"training the expert '{name}' failed")
            time.sleep(0.1)
    finally:
        for process in running.values():
            process.kill()
            process.wait()
    for name in EXPERTS:
        print(f"{folder / name}: sha256 {sha256(folder / name / 'adapter_model.safetensors')[:16]}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/build_smollm2", description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=REPOSITORY / "smollm2", help="where it goes (default: smollm2/)"
    )
    parser.add_argument("--base-only", action="store_true", help="convert the base and train nothing")
    parser.add_argument("--force", action="store_true", help="build again what is already there")
    parser.add_argument("--jobs", type=int, default=2, help="experts trained at once, one thread each")
    parser.add_argument("--steps", type=int, default=Settings.steps, help="training steps of each expert")
    options = parser.parse_args()
    if options.jobs < 1 or options.steps < 1:
        parser.error("--jobs and --steps are at least 1")
    # So that `finally` stops the trainings, which would go on by themselves.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    out = options.out.resolve()
    settings = Settings(steps=options.steps)
    try:
        with alone_in(out) as lock:
            base = build_base(out / BASE, force=options.force)
            if not options.base_only:
                write_tasks(out / "tasks", settings.seed)
                print(f"{out / 'tasks'}: written")
                build_experts(
                    base, out / "experts", settings, jobs=options.jobs, force=options.force, lock=lock
                )
    except PackageNotFoundError as error:
        print(
            f"build_smollm2: {sys.executable} lacks the package {error.name}; run scripts/build_smollm2, "
            "which installs it",
            file=sys.stderr,
        )
        return 2
    except Busy as error:
        print(f"build_smollm2: {error}", file=sys.stderr)
        return 2
    except ChildProcessError as error:
        print(f"build_smollm2: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"build_smollm2: {out}: {error.strerror or error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
