"""The command that scores one model outside a search."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from evomerge.cli.display import item_progress, stoppable
from evomerge.cli.parser import Commands, add_json, add_set
from evomerge.errors import UserError
from evomerge.evaluation.items import SPLITS

_EVALUATE_HELP = """\
MODEL is a model folder or hub id, a LoRA adapter, a recipe or mergekit YAML, or a run directory (its winner).

With --config, the model answers one split of that config's suite. With --tasks it answers the documents that
'lm_eval' evaluates, so that the numbers can be compared with those of 'lm_eval --tasks ... --limit ...'.

examples:
  evomerge evaluate ./my-model --config my.yaml
  evomerge evaluate runs/quickstart --config my.yaml --split test --json
  evomerge evaluate ./my-model --tasks arc_easy,hellaswag --limit 100
  evomerge evaluate ./lora --base ./base --tasks ./my_task.yaml --set suite.trust_task_code=true
"""

_WITH_TASKS = ("limit", "num_fewshot", "include")


def add_commands(commands: Commands) -> None:
    """Declare them."""
    sub = commands.add(
        "evaluate", _evaluate, "score a model on a config's suite, or on tasks by name", _EVALUATE_HELP
    )
    sub.add_argument("model", metavar="MODEL", help="model, adapter, recipe or run directory")
    what = sub.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", type=Path, metavar="CONFIG", help="whose suite is used")
    what.add_argument("--tasks", metavar="A,B", help="lm-eval's tasks, groups or tags, or paths of YAMLs")
    sub.add_argument(
        "--split",
        help="search, validation or test of the config (default: validation); of tasks, another data split",
    )
    sub.add_argument(
        "--limit", type=float, metavar="N", help="first documents of each task; below 1, this share of them"
    )
    sub.add_argument("--num-fewshot", type=int, metavar="N", help="examples in each prompt of --tasks")
    sub.add_argument(
        "--include", action="append", default=[], metavar="DIR", help="folder with task files of your own"
    )
    sub.add_argument(
        "--chat-template", metavar="true|false", help="whether prompts go through it, or through which"
    )
    sub.add_argument("--base", metavar="PATH", help="what an adapter lies on, if not the model that it names")
    sub.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights")
    sub.add_argument("--device", choices=("auto", "cpu", "cuda"), help="where the model runs")
    sub.add_argument("--engine", choices=("hf", "vllm"), help="what runs it")
    sub.add_argument(
        "--all-metrics",
        action="store_true",
        help="with --config: all metrics of its tasks, as lm-eval has them",
    )
    add_set(sub)
    add_json(sub)


def _evaluate(options: argparse.Namespace) -> int:
    with (
        stoppable("nothing was scored to the end"),
        item_progress("answering", quiet=options.json) as progress,
    ):
        result = _with_tasks(options, progress) if options.config is None else _with_config(options, progress)
    print(json.dumps(result.to_dict(), indent=2) if options.json else str(result))
    return 0


def _with_config(options: argparse.Namespace, progress: Any) -> Any:
    from evomerge.scoring import evaluate

    for name in _WITH_TASKS:
        if getattr(options, name) not in (None, []):
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag}: it is for --tasks; a config says so itself, for a task or with --set")
    split = options.split or "validation"
    if split not in SPLITS:
        raise UserError(f"--split {split}: a config has the splits {', '.join(SPLITS)}")
    keys = {"engine.device": options.device, "engine.type": options.engine}
    keys["suite.chat_template"] = options.chat_template
    overrides = [f"{key}={value}" for key, value in keys.items() if value is not None]
    return evaluate(
        options.model,
        options.config,
        split=split,
        overrides=[*overrides, *options.overrides],
        base=options.base,
        dtype=options.dtype,
        all_metrics=options.all_metrics,
        progress=progress,
    )


def _with_tasks(options: argparse.Namespace, progress: Any) -> Any:
    from evomerge.schema import parse_yaml
    from evomerge.task_scoring import evaluate_tasks

    template = options.chat_template
    return evaluate_tasks(
        options.model,
        [name for entry in options.tasks.split(",") if (name := entry.strip())],
        limit=options.limit,
        num_fewshot=options.num_fewshot,
        include=options.include,
        split=options.split,
        chat_template=None if template is None else parse_yaml(template, "--chat-template"),
        base=options.base,
        dtype=options.dtype,
        engine=options.engine or "hf",
        device=options.device or "auto",
        overrides=options.overrides,
        progress=progress,
    )
