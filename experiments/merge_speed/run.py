#!/usr/bin/env python3
"""Merging to disk, ours against mergekit 0.1.5: the same YAML, in turn, several times.

    .venv/bin/python experiments/merge_speed/run.py --sizes 135m,1b --repeats 3 --folder /a/large/disk

Makes synthetic checkpoints (see checkpoints.py), runs `evomerge merge` and `mergekit-yaml` on mergekit YAMLs with
`dtype: float32, out_dtype: bfloat16`, page cache warm, and measures the whole command: wall time, CPU time, peak
resident memory. `ours, plain` is without the C kernels. Writes results.jsonl, README.md and speed.png (if matplotlib
is installed).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml
from checkpoints import make

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from readme import put_tables  # noqa: E402

RESULTS = HERE / "results.jsonl"
METHODS: dict[str, dict[str, Any]] = {
    "linear": {},
    "slerp": {"parameters": {"t": 0.4}},
    "task_arithmetic": {},
    "dare_linear": {"density": 0.5},
    "dare_ties": {"density": 0.5},
    "ties": {"density": 0.5},
    "breadcrumbs": {"density": 0.5},
    "model_stock": {},
    "karcher": {},
}
SIDES = ("ours", "ours, plain", "mergekit")


def config(method: str, models: list[Path]) -> dict[str, Any]:
    """Return the mergekit YAML of a method over a base and two fine-tunes."""
    base, *experts = models
    settings = METHODS[method]
    own = {"weight": 0.5, **({"density": settings["density"]} if "density" in settings else {})}
    listed: list[Path] = [base, experts[0]] if method == "slerp" else experts
    if method in ("linear", "karcher"):
        listed = models
    plain = method in ("slerp", "karcher", "model_stock")
    entries = [{"model": str(m)} if plain else {"model": str(m), "parameters": own} for m in listed]
    body: dict[str, Any] = {
        "merge_method": method,
        "models": entries,
        "dtype": "float32",
        "out_dtype": "bfloat16",
    }
    if method not in ("linear", "karcher"):
        body["base_model"] = str(base)
    if "parameters" in settings:
        body["parameters"] = settings["parameters"]
    return body


def timed(command: list[str], environment: dict[str, str]) -> dict[str, float]:
    """Run a command; return its wall and CPU seconds and its peak resident bytes."""
    started = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - started
    if status:
        sys.exit(f"{' '.join(command)} failed:\n{output.decode()[-3000:]}")
    return {"wall": wall, "cpu": usage.ru_utime + usage.ru_stime, "rss": usage.ru_maxrss * 1024}


def copy_bandwidth() -> float:
    """Return bytes copied a second by one thread between two buffers that are in memory."""
    source, target = torch.zeros(1 << 28, dtype=torch.uint8), torch.zeros(1 << 28, dtype=torch.uint8)
    best = min(_seconds(lambda: target.copy_(source)) for _ in range(5))
    return float(source.numel() / best)


def _seconds(work: Any) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measure(size: str, methods: list[str], repeats: int, folder: Path, plain: bool) -> None:
    """Append one line to results.jsonl for each run."""
    models = make(folder, size, 3)
    scripts = Path(sys.executable).parent
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "EVOMERGE_CACHE": str(folder / "cache")}
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        environment.pop(name, None)
    sides = [side for side in SIDES if plain or side != "ours, plain"]
    bandwidth = copy_bandwidth()
    with RESULTS.open("a") as stream, tempfile.TemporaryDirectory(dir=folder) as place:
        out = Path(place) / "out"
        for method in methods:
            recipe = Path(place) / f"{method}.yaml"
            body = config(method, models)
            recipe.write_text(yaml.safe_dump(body, sort_keys=False))
            read = sum((model / "model.safetensors").stat().st_size for model in map(Path, _sources(body)))
            for repeat in range(-1, repeats):
                for side in sides:
                    if repeat < 0 and side != "ours":
                        continue
                    shutil.rmtree(out, ignore_errors=True)
                    for model in models:
                        _touch(model / "model.safetensors")
                    command = (
                        [str(scripts / "mergekit-yaml"), str(recipe), str(out), "--allow-crimes"]
                        if side == "mergekit"
                        else [sys.executable, "-m", "evomerge", "merge", str(recipe), str(out)]
                    )
                    own = {**environment, **({"EVOMERGE_NATIVE": "0"} if side == "ours, plain" else {})}
                    # One run of ours goes first, uncounted: it hashes the parents and compiles the kernels.
                    line = timed(command, own)
                    label = "ours, first" if repeat < 0 else side
                    record = {"size": size, "method": method, "side": label, **line, "read": read}
                    record |= {"bandwidth": bandwidth, "load": os.getloadavg()[0]}
                    print(
                        f"{size} {method} {label}: {line['wall']:.1f} s, {line['cpu']:.1f} s of CPU",
                        flush=True,
                    )
                    if label != "ours, first" or method == methods[0]:
                        stream.write(json.dumps(record) + "\n")
                        stream.flush()


def _sources(body: dict[str, Any]) -> set[str]:
    return {entry["model"] for entry in body["models"]} | (
        {body["base_model"]} if "base_model" in body else set()
    )


def _touch(file: Path) -> None:
    """Read a file once, so that it is in the page cache."""
    with file.open("rb", buffering=0) as stream:
        buffer = bytearray(4 << 20)
        while stream.readinto(buffer):
            pass


def table() -> str:
    """Return README.md's tables."""
    lines = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    text = []
    for size in dict.fromkeys(line["size"] for line in lines):
        mine = [line for line in lines if line["size"] == size]
        copying = median(line["bandwidth"] for line in mine) / 1e9
        text += [
            f"\n### {size}\n",
            "| method | ours, s (min to max) | CPU s | peak GiB | GB/s read | share of copy | plain, s | mergekit, s | "
            "CPU s | peak GiB | faster, wall | faster, CPU |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for method in dict.fromkeys(line["method"] for line in mine):
            sides = {
                side: [line for line in mine if line["method"] == method and line["side"] == side]
                for side in SIDES
            }
            ours, plain, theirs = (sides[side] for side in SIDES)
            if not ours or not theirs:
                continue
            wall, other = median(x["wall"] for x in ours), median(x["wall"] for x in theirs)
            cpu, other_cpu = median(x["cpu"] for x in ours), median(x["cpu"] for x in theirs)
            speed = ours[0]["read"] / wall / 1e9
            text.append(
                f"| {method} | {wall:.1f} ({min(x['wall'] for x in ours):.1f} to {max(x['wall'] for x in ours):.1f}) "
                f"| {cpu:.1f} | {max(x['rss'] for x in ours) / 2**30:.2f} | {speed:.2f} | {speed / copying:.0%} "
                f"| {format(median(x['wall'] for x in plain), '.1f') if plain else '–'} "
                f"| {other:.1f} ({min(x['wall'] for x in theirs):.1f} to {max(x['wall'] for x in theirs):.1f}) "
                f"| {other_cpu:.1f} | {max(x['rss'] for x in theirs) / 2**30:.2f} | **{other / wall:.1f}×** "
                f"| {other_cpu / cpu:.1f}× |"
            )
        text.append(f"\nOne thread copies {copying:.1f} GB/s here.")
    return "\n".join(text) + "\n"


def plot() -> None:
    """Draw wall times, if matplotlib is there."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        return
    lines = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    sizes = list(dict.fromkeys(line["size"] for line in lines))
    figure, axes = plt.subplots(1, len(sizes), figsize=(6 * len(sizes), 4), squeeze=False)
    for axis, size in zip(axes[0], sizes, strict=True):
        methods = list(dict.fromkeys(line["method"] for line in lines if line["size"] == size))
        for i, side in enumerate(("ours", "mergekit")):
            values = [
                [x["wall"] for x in lines if (x["size"], x["method"], x["side"]) == (size, method, side)]
                for method in methods
            ]
            centers = [median(v) if v else 0 for v in values]
            axis.bar([j + 0.4 * i for j in range(len(methods))], centers, 0.4, label=side)
        axis.set_xticks([j + 0.2 for j in range(len(methods))], methods, rotation=40, ha="right")
        axis.set_yscale("log")
        axis.set_ylabel("seconds, whole command")
        axis.set_title(size)
        axis.legend()
    figure.tight_layout()
    figure.savefig(HERE / "speed.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", default="135m,1b", help="out of 135m, 1b, 8b")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--folder", type=Path, help="where checkpoints go, and stay; default: a temporary folder"
    )
    parser.add_argument("--plain", action="store_true", help="measure the plain torch path too")
    parser.add_argument("--force", action="store_true", help="start results.jsonl over")
    options = parser.parse_args()
    if options.force:
        RESULTS.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        for size in options.sizes.split(","):
            measure(size, options.methods.split(","), options.repeats, folder, options.plain)
    machine = f"{platform.machine()}, {os.cpu_count()} CPUs, torch {torch.__version__}.\n"
    put_tables(HERE / "README.md", machine + table())
    plot()


if __name__ == "__main__":
    main()
