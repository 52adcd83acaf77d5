"""The C kernels as a shared library: compiled once for this machine, kept in the user's cache folder."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from evomerge.environment import cache_folder

SOURCE = Path(__file__).with_name("kernels.c")
FLAGS = (
    "-O2",
    "-ftree-vectorize",
    "-fvect-cost-model=dynamic",
    "-std=gnu11",
    "-shared",
    "-fPIC",
    # No fused multiply-add: the bits are those of separate operations, on every machine.
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
)
SWITCH = "EVOMERGE_NATIVE"

_log = logging.getLogger(__name__)


@cache
def library() -> ctypes.CDLL | None:
    """Return the compiled kernels, or None where there is no C compiler or `EVOMERGE_NATIVE` is 0.

    The first call on a machine compiles (about a second). Never raises: everything works without.
    """
    if os.environ.get(SWITCH) == "0":
        return None
    try:
        return ctypes.CDLL(str(_compiled()))
    except (OSError, subprocess.SubprocessError) as error:
        _log.info("no compiled kernels, plain torch is used: %s", error)
        return None


def _compiled() -> Path:
    """Return the library's file; it is named after all that its content depends on."""
    compiler = _compiler()
    key = hashlib.sha256(
        "\x1f".join(
            [SOURCE.read_text(), *FLAGS, *compiler, _compiler_version(compiler), _processor()]
        ).encode()
    ).hexdigest()
    target = cache_folder() / "native" / f"kernels-{key[:32]}.so"
    if target.is_file():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(dir=target.parent)
    except OSError:
        folder = tempfile.TemporaryDirectory()
        target = Path(folder.name).parent / f"evomerge-{os.getuid()}-{target.name}"
    with folder as place:
        made = Path(place) / "kernels.so"
        for tuning in (["-march=native"], ["-mcpu=native"], []):
            command = [*compiler, *FLAGS, *tuning, str(SOURCE), "-o", str(made), "-lm"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
            if done.returncode == 0:
                os.replace(made, target)
                return target
    reason = (done.stderr.strip().splitlines() or ["the compiler gives no reason"])[0]
    raise OSError(f"{shlex.join(compiler)}: {reason}")


def _compiler() -> list[str]:
    named = shlex.split(os.environ.get("CC", ""))
    for command in (named, ["cc"], ["gcc"], ["clang"]):
        if command and shutil.which(command[0]):
            return command
    raise OSError("no C compiler was found (cc, gcc, clang or CC)")


def _compiler_version(compiler: list[str]) -> str:
    done = subprocess.run(
        [*compiler, "-dumpversion"], capture_output=True, text=True, timeout=60, check=False
    )
    return done.stdout.strip()


def _processor() -> str:
    """Return what decides which instructions the library may use."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    wanted = ("flags", "Features", "model name", "CPU part")
    facts = dict(line.split(":", 1) for line in lines if line.startswith(wanted) and ":" in line)
    return "\x1f".join([platform.machine(), platform.processor(), *(facts[key] for key in sorted(facts))])
