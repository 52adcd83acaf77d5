#!/usr/bin/env python3
"""What scoring a candidate costs: ours, lm-eval in memory, and the forward passes alone.

    .venv/bin/python experiments/evaluation_cost/run.py --model smollm2/SmolLM2-135M-Instruct --data FOLDER  # real
    .venv/bin/python experiments/evaluation_cost/run.py --model zoo/base --tasks-of zoo/tasks  # the zoo's

A candidate is a linear merge of the model and two copies with a little noise; its coefficients change each time, so
that all its weights are written again. Ours scores it as a worker does. lm-eval scores the same live model through
`simple_evaluate` and `HFLM` with 16 requests a batch, on the same documents: what mergekit-evolve does, without its
batch size of 1. One thread; CPU seconds, children included. FOLDER (default: $EVOMERGE_EVALDATA) holds
arc_easy/search.jsonl and so on, see tasks/. Writes results.jsonl and the tables of README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

os.environ.update(
    HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false"
)

import torch
import yaml
from safetensors.torch import load_file, save_file

from evomerge.checkpoints import Checkpoint
from evomerge.config import Engine
from evomerge.engines import open_host
from evomerge.evaluation.suite import Suite
from evomerge.merging import open_parents, output_tokenizer, pin
from evomerge.recipe import Merge, Output, Recipe, Source
from evomerge.suite_config import Splits
from evomerge.suite_config import Suite as SuiteConfig

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from readme import put_tables  # noqa: E402

RESULTS = HERE / "results.jsonl"
TASKS = ("arc_easy", "arc_easy_5shot", "hellaswag", "wikidata", "wikitext2", "svamp", "gsm8k")
SPLITS = Splits(search="search", validation="validation", test="test")


def cpu_seconds() -> float:
    """Return the CPU seconds of this process and of the children it has waited for."""
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


class Forward:
    """Adds up the CPU seconds inside a model's body and head."""

    def __init__(self, model: Any) -> None:
        self.seconds = 0.0
        self._depth = 0
        for module in (model.base_model, model.get_output_embeddings()):
            module.register_forward_pre_hook(self._enter)
            module.register_forward_hook(self._leave)

    def _enter(self, *_: Any) -> None:
        if self._depth == 0:
            self._started = cpu_seconds()
        self._depth += 1

    def _leave(self, *_: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            self.seconds += cpu_seconds() - self._started


def copies(model: Path, folder: Path) -> list[Path]:
    """Write two copies of a model whose matrices have 0.2 % of noise."""
    made = []
    weights = load_file(model / "model.safetensors")
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        copy = folder / f"copy{seed}"
        shutil.copytree(model, copy, ignore=shutil.ignore_patterns("*.safetensors"))
        noisy = {
            name: (w.float() * (1 + 0.002 * torch.randn(w.shape, generator=generator))).to(w.dtype)
            if w.ndim == 2
            else w
            for name, w in weights.items()
        }
        save_file(noisy, copy / "model.safetensors", metadata={"format": "pt"})
        made.append(copy)
    return made


def candidates(models: list[Path]) -> tuple[dict[str, Checkpoint], Iterator[Recipe]]:
    """Return the opened parents and recipes without end, no two of which agree in a tensor."""
    names = ("base", "first", "second")
    sources = {name: Source(source=str(model)) for name, model in zip(names, models, strict=True)}

    def recipe(step: int) -> Recipe:
        weights = {"base": 0.3, "first": 0.3 + 0.001 * step, "second": 0.4 - 0.001 * step}
        return Recipe(
            models=sources,
            merges={"merged": Merge(method="linear", inputs=names, parameters={"weight": weights})},
            output=Output(tokenizer="base", chat_template="base"),
        )

    opened = open_parents(recipe(0))
    return opened, (pin(recipe(step), opened) for step in range(10**6))


def written_tasks(options: argparse.Namespace, folder: Path) -> list[str]:
    """Write the tasks to a folder, with their documents of the split `search`; return their names."""
    if options.tasks_of is not None:
        sources = sorted(options.tasks_of.glob("*.yaml"))
    else:
        sources = [HERE / "tasks" / f"{name}.yaml" for name in options.tasks.split(",")]
    names = []
    for source in sources:
        config = yaml.safe_load(source.read_text().replace("${DATA}", str(options.data)))
        files = config["dataset_kwargs"]["data_files"]
        config["dataset_kwargs"]["data_files"] = {
            k: str((source.parent / v).resolve()) for k, v in files.items()
        }
        config["test_split"] = "search"
        (folder / source.name).write_text(yaml.safe_dump(config))
        names.append(config["task"])
    return names


@contextmanager
def silence() -> Iterator[None]:
    """Send what lm-eval prints to nowhere."""
    with open(os.devnull, "w") as nowhere:
        out, err = sys.stdout, sys.stderr
        sys.stdout = sys.stderr = nowhere
        try:
            yield
        finally:
            sys.stdout, sys.stderr = out, err


def measured(work: Callable[[], Any]) -> dict[str, float]:
    wall, cpu = time.perf_counter(), cpu_seconds()
    work()
    return {"wall": time.perf_counter() - wall, "cpu": cpu_seconds() - cpu}


def measure(options: argparse.Namespace) -> None:
    """Append one line to results.jsonl for each task, side and repeat."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place, RESULTS.open("a") as stream:
        folder = Path(place)
        tasks = folder / "tasks"
        tasks.mkdir()
        names = written_tasks(options, tasks)
        opened, recipes = candidates([options.model, *copies(options.model, folder)])
        first = next(recipes)
        tokenizer = output_tokenizer(first, opened)
        length = min(int(opened["base"].text_config.get("max_position_embeddings") or 2048), 8192)
        settings = Engine(device="cpu", batch_tokens=options.batch_tokens, max_length=length)
        host = open_host(settings, opened, tokenizer)
        engine: Any = host.hold(first)
        forward = Forward(engine.model)
        lm = HFLM(
            pretrained=engine.model, tokenizer=tokenizer, device="cpu", batch_size=16, max_length=length
        )
        manager = TaskManager(include_path=str(tasks), include_defaults=False)
        for name in names:
            spec: dict[str, Any] = {"task": name, "limit": options.items}
            if name.endswith("gsm8k"):
                spec["metric"] = "exact_match,flexible-extract"
            config = SuiteConfig.model_validate(
                {"include": (str(tasks),), "tasks": [spec], "chat_template": False}
            )
            started = cpu_seconds()
            suite = Suite.build(config, SPLITS, tokenizer, splits_needed=("search",))
            built = cpu_seconds() - started
            items = suite.items("search")
            (block,) = suite.blocks("search", seed=0, block_items=10**6, packing=engine.packing)
            documents = sorted(item.index for item in items)
            for repeat in range(-1, options.repeats):
                recipe = next(recipes)
                forward.seconds = 0.0
                merged = measured(lambda recipe=recipe: host.hold(recipe))
                scored = measured(
                    lambda suite=suite, block=block: suite.score(engine, block, check_degenerate=False)
                )
                common = {
                    "model": options.label,
                    "task": name,
                    "items": len(items),
                    "load": os.getloadavg()[0],
                }
                ours = {
                    "side": "ours",
                    "cpu": merged["cpu"] + scored["cpu"],
                    "wall": merged["wall"] + scored["wall"],
                    "merge": merged["cpu"],
                    "forward": forward.seconds,
                    "build": built,
                }
                lines = [ours]
                if repeat >= 0 and not options.ours_only:
                    forward.seconds = 0.0
                    with silence():
                        theirs = measured(
                            lambda name=name, documents=documents: simple_evaluate(
                                model=lm, tasks=[name], task_manager=manager, samples={name: documents}
                            )
                        )
                    lines.append({"side": "lm-eval", **theirs, "forward": forward.seconds})
                for line in lines:
                    print(
                        f"{name} {line['side']}: {line['cpu']:.2f} s of CPU, {line['forward']:.2f} in forward passes",
                        flush=True,
                    )
                    if repeat >= 0:
                        stream.write(json.dumps({**common, **line}) + "\n")
                        stream.flush()
        host.close()


def table() -> str:
    """Return README.md's tables."""
    lines = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    text = []
    for model in dict.fromkeys(line["model"] for line in lines):
        text += [
            f"\n### {model}\n",
            "| task | items | ours, CPU s (min to max) | items a second | of it merging | other fixed cost | "
            "fixed, of forward | lm-eval, CPU s (min to max) | in its forward passes | faster |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        mine = [line for line in lines if line["model"] == model]
        for task in dict.fromkeys(line["task"] for line in mine):
            ours = [x for x in mine if x["task"] == task and x["side"] == "ours"]
            theirs = [x for x in mine if x["task"] == task and x["side"] == "lm-eval"]
            cpu, merge = (median(x[k] for x in ours) for k in ("cpu", "merge"))
            low, high = (f(x["cpu"] for x in ours) for f in (min, max))
            other = median(x["cpu"] - x["forward"] - x["merge"] for x in ours)
            fixed = median((x["cpu"] - x["forward"]) / x["forward"] for x in ours)
            items = ours[0]["items"]
            row = (
                f"| {task.removeprefix('real_')} | {items} | {cpu:.2f} ({low:.2f} to {high:.2f}) | {items / cpu:.1f} "
                f"| {merge:.2f} | {other:.2f} | {fixed:.0%} | "
            )
            if theirs:
                lm, inside = (median(x[k] for x in theirs) for k in ("cpu", "forward"))
                low, high = (f(x["cpu"] for x in theirs) for f in (min, max))
                row += f"{lm:.2f} ({low:.2f} to {high:.2f}) | {inside:.2f} | **{lm / cpu:.1f}×** |"
            else:
                row += "– | – | – |"
            text.append(row)
    return "\n".join(text) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="a folder with one model.safetensors")
    parser.add_argument(
        "--label", help="the model's name in the tables; default: the folder's and its parent's"
    )
    parser.add_argument("--tasks", default=",".join(TASKS), help="out of tasks/")
    parser.add_argument("--tasks-of", type=Path, help="all tasks of this folder instead, e.g. zoo/tasks")
    parser.add_argument("--data", type=Path, default=os.environ.get("EVOMERGE_EVALDATA"), help="real items")
    parser.add_argument("--items", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch-tokens", type=int, default=512, help="of the hf engine")
    parser.add_argument("--ours-only", action="store_true", help="leave lm-eval out")
    parser.add_argument("--force", action="store_true", help="start results.jsonl over")
    options = parser.parse_args()
    if options.tasks_of is None and options.data is None:
        parser.error("name the folder of real items with --data or EVOMERGE_EVALDATA, or give --tasks-of")
    options.label = options.label or f"{options.model.resolve().parent.name}/{options.model.name}"
    if options.force:
        RESULTS.unlink(missing_ok=True)
    measure(options)
    put_tables(HERE / "README.md", table())


if __name__ == "__main__":
    main()
