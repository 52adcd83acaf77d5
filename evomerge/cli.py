"""The commands. Thin: each one reads its arguments, calls the Python face and prints."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from evomerge import __version__
from evomerge.environment import prepare
from evomerge.errors import EvomergeError, Stopped, UserError
from evomerge.signals import stopped_by_signals

if TYPE_CHECKING:
    from evomerge.recipe import Recipe

DESCRIPTION = """\
Find the best model that can be merged from a handful of fine-tuned checkpoints.

You write one YAML file: a base, its fine-tunes, what may vary, the tasks that matter, a budget. A search
proposes merges, scores them on your tasks and ends with a recipe, an honest number on items it never saw,
and a plain Hugging Face checkpoint.
"""

EPILOG = """\
a first session:
  evomerge plan    configs/quickstart.yaml        what the search will be, before it starts
  evomerge search  configs/quickstart.yaml        run it; Ctrl-C at any time
  evomerge resume  runs/quickstart                go on where it stopped
  evomerge export  runs/quickstart --out merged   write the winner as a Hugging Face folder

exit codes: 0 done; 2 a mistake in the config or its files; 3 workers or disk failed, the run can be
resumed; 75 stopped by a signal, the run can be resumed.
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        command = self.prog.removeprefix("evomerge").strip()
        raise UserError(f"{command + ': ' if command else ''}{message} (see '{self.prog} --help')")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code. Whether it may use the network is decided once its models are known."""
    prepare(offline=False)
    try:
        options = _parser().parse_args(arguments)
        return int(options.run_command(options) or 0)
    except EvomergeError as error:
        print(f"evomerge: {error}" if error.exit_code != 75 else str(error), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return 75
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="evomerge",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"evomerge {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_Parser)

    def command(name: str, function: Any, summary: str, epilog: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run_command=function)
        return sub

    sub = command("search", _search, "run a search described by a config", _SEARCH_HELP)
    sub.add_argument("config", type=Path, metavar="CONFIG", help="the YAML file")
    sub.add_argument("--run", type=Path, metavar="DIR", help="the run directory (default: runs/NAME)")
    _add_set(sub)
    sub.add_argument("--continue", dest="continue_", action="store_true", help="resume the run if it exists")
    sub.add_argument(
        "--yes", action="store_true", help="go on although answers to a task cannot be extracted"
    )

    sub = command("resume", _resume, "continue a run where it stopped", _RESUME_HELP)
    sub.add_argument("directory", type=Path, metavar="RUN", help="the run directory")
    sub.add_argument("--budget", action="append", default=[], metavar="KEY=VALUE", help="a new total ceiling")
    sub.add_argument(
        "--yes", action="store_true", help="go on although answers to a task cannot be extracted"
    )

    sub = command("status", _status, "say how a run stands", "")
    sub.add_argument("directory", type=Path, metavar="RUN", help="the run directory")
    sub.add_argument("--json", action="store_true", help="one JSON object on stdout")

    sub = command("export", _export, "write a run's winner, or one of its candidates", _EXPORT_HELP)
    sub.add_argument("directory", type=Path, metavar="RUN", help="the run directory")
    sub.add_argument("--out", type=Path, required=True, metavar="PATH", help="folder or file to write")
    sub.add_argument("--candidate", type=int, metavar="ID", help="this candidate (default: the winner)")
    sub.add_argument(
        "--format", choices=("hf", "recipe", "mergekit", "csv", "parquet"), default="hf", help="default: hf"
    )
    sub.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="of a weights file (default: 5GB)"
    )

    sub = command("merge", _merge, "merge models by a recipe into a Hugging Face folder", _MERGE_HELP)
    sub.add_argument("recipe", type=Path, metavar="RECIPE", help="a recipe, or a mergekit YAML")
    sub.add_argument("out", type=Path, metavar="OUT", help="folder to write; must not exist")
    sub.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="of a weights file (default: 5GB)"
    )
    sub.add_argument("--device", default="cpu", metavar="DEVICE", help="does the arithmetic (default: cpu)")

    sub = command(
        "extract-lora", _extract_lora, "write what a fine-tune changed as a LoRA adapter", _EXTRACT_HELP
    )
    sub.add_argument("model", metavar="MODEL", help="the fine-tune: a folder or hub id")
    sub.add_argument("base", metavar="BASE", help="what it was trained from")
    sub.add_argument("out", type=Path, metavar="OUT", help="PEFT folder to write; must not exist")
    sub.add_argument("--rank", type=int, required=True, metavar="R", help="rank of the factors")
    sub.add_argument(
        "--error",
        type=float,
        default=0.0,
        metavar="E",
        help="relative error at which a smaller rank is enough",
    )
    sub.add_argument("--alpha", type=float, metavar="A", help="lora_alpha (default: the rank)")
    sub.add_argument("--dtype", default="float32", help="of the factors (default: float32)")
    sub.add_argument(
        "--save-rest", action="store_true", help="write embeddings, norms and biases that changed whole"
    )
    sub.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    sub.add_argument("--json", action="store_true", help="one JSON object on stdout")

    sub = command("convert", _convert, "write pickled weights (.bin) as safetensors", _CONVERT_HELP)
    sub.add_argument("source", metavar="SOURCE", help="model or adapter: a folder or hub id")
    sub.add_argument("out", type=Path, metavar="OUT", help="folder to write; must not exist")
    sub.add_argument("--revision", metavar="R", help="of a hub id: branch, tag or commit")
    sub.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="of a weights file (default: 5GB)"
    )

    sub = command(
        "statistics", _statistics, "compute what a model's data says of its weights", _STATISTICS_HELP
    )
    sub.add_argument("model", metavar="MODEL", help="model folder or hub id")
    sub.add_argument("--data", type=Path, required=True, metavar="FILE", help="JSONL with one text a line")
    sub.add_argument("--kind", choices=("fisher", "gram"), required=True, help="for fisher, or for regmean")
    sub.add_argument("--key", default="text", help="key of the text in each line (default: text)")
    sub.add_argument("--prompt", metavar="KEY", help="key of a prompt that the text answers")
    sub.add_argument("--samples", type=int, default=256, metavar="N", help="texts used (default: 256)")
    sub.add_argument("--max-length", type=int, default=512, metavar="N", help="tokens of each (default: 512)")
    sub.add_argument(
        "--labels",
        choices=("given", "sampled"),
        default="given",
        help="of the Fisher information (default: given)",
    )
    sub.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    sub.add_argument("--out", type=Path, metavar="DIR", help="folder to write (default: where merges look)")

    sub = command("evaluate", _evaluate, "score a model or a recipe on a config's suite", _EVALUATE_HELP)
    sub.add_argument("model", metavar="MODEL_OR_RECIPE", help="model folder, recipe file or run directory")
    sub.add_argument("--config", type=Path, required=True, metavar="CONFIG", help="whose suite is used")
    sub.add_argument(
        "--split", choices=("search", "validation", "test"), default="validation", help="default: validation"
    )
    _add_set(sub)
    sub.add_argument("--json", action="store_true", help="one JSON object on stdout")

    sub = command("plan", _plan, "show what a search is going to be, before any weights are read", _PLAN_HELP)
    sub.add_argument("config", type=Path, metavar="CONFIG", help="the YAML file")
    _add_set(sub)
    sub.add_argument("--json", action="store_true", help="one JSON object on stdout")

    sub = command(
        "init", _init, "write a search config around a published merge, or for a few models", _INIT_HELP
    )
    sub.add_argument(
        "sources", nargs="+", metavar="SOURCE", help="a mergekit YAML; or models, the base first"
    )
    sub.add_argument(
        "--tasks", required=True, metavar="A,B", help="names of lm-eval tasks, with commas between"
    )
    sub.add_argument(
        "--include", action="append", default=[], metavar="DIR", help="folder with task files of your own"
    )
    sub.add_argument(
        "--method", default="task_arithmetic", help="how models are merged (default: task_arithmetic)"
    )
    sub.add_argument("-o", "--out", type=Path, metavar="FILE", help="the config to write (default: stdout)")

    sub = command("methods", _methods, "list the merge methods and their parameters", "")
    sub.add_argument("name", nargs="?", metavar="METHOD", help="show this one alone")
    sub.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return parser


def _add_set(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="A.B=C",
        help="override a key of the config, e.g. --set budget.candidates=100",
    )


_SEARCH_HELP = """\
examples:
  evomerge search configs/quickstart.yaml
  evomerge search my.yaml --run runs/second --set seed=1 --set budget.candidates=600
  evomerge search my.yaml --continue              in a job script: starts or resumes

The run directory keeps everything: stop it at any time (Ctrl-C, kill, power), then 'evomerge resume'.
"""
_RESUME_HELP = """\
examples:
  evomerge resume runs/quickstart
  evomerge resume runs/quickstart --budget candidates=600     600 in all, not 600 more

A run that had ended opens the test items a second time when it is prolonged; results.json counts it.
"""
_EXPORT_HELP = """\
examples:
  evomerge export runs/quickstart --out merged                        a Hugging Face folder
  evomerge export runs/quickstart --out recipe.yaml --format recipe   for 'evomerge merge'
  evomerge export runs/quickstart --out merge.yml --format mergekit   the same for mergekit, differences named
  evomerge export runs/quickstart --out candidates.csv --format csv   one row per candidate
"""
_MERGE_HELP = """\
a recipe:
  evomerge: 1
  models: {base: ./base, maths: ./maths, code: ./code}
  merges:
    merged: {method: ties, base: base, inputs: [maths, code], parameters: {weight: 0.6, density: 0.5}}
  output: {dtype: bfloat16, tokenizer: base, chat_template: base}

Paths are relative to the recipe file. 'evomerge methods' lists methods and parameters. A parameter may also be
a list of values over depth, or entries for tensors whose name contains a text:
  weight: {maths: [0.2, 0.8], code: [{filter: self_attn, value: 0.3}, {value: 0.6}]}

Models may have other tokens than each other: rows of embedding and head belong together by token. What the
output has says tokenizer: base, union (the base's tokens, then what the experts have besides), a model's name
or a folder; chat_template: a model's name, auto, chatml, llama3, mistral, alpaca, exaone or a *.jinja file.

A mergekit YAML is merged as mergekit would, in float32; what differs is said on stderr.
"""
_EXTRACT_HELP = """\
examples:
  evomerge extract-lora ./my-model ./base my-lora --rank 32
  evomerge extract-lora ./my-model ./base my-lora --rank 256 --error 0.05     ranks as small as 5 % allow
  evomerge extract-lora ./my-model org/base my-lora --rank 16 --save-rest

The folder loads with peft, and can be named as an expert. The table shows how much of the change each kind
of layer keeps; what is not a linear layer is named, and written only with --save-rest.
"""
_CONVERT_HELP = """\
examples:
  evomerge convert ./old-model ./model
  evomerge convert org/old-adapter ./adapter

Reads pytorch_model.bin (or its shards) or adapter_model.bin with an unpickler that makes tensors and runs no
code; a file that needs more is refused. Tensors keep their bytes.
"""
_STATISTICS_HELP = """\
A merge by fisher or regmean computes them itself where they are missing. Computed ahead, with the settings of
the recipe's data, they are found by every merge of this model on these texts.

examples:
  evomerge statistics ./maths --data maths.jsonl --kind gram --device cuda
  evomerge statistics ./maths --data maths.jsonl --kind fisher --samples 1000 --out maths-fisher
"""
_EVALUATE_HELP = """\
examples:
  evomerge evaluate ./my-model --config my.yaml
  evomerge evaluate runs/quickstart --config my.yaml --split test --json
"""
_PLAN_HELP = """\
It tells the number of searched parameters, population and generations, items per split, the smallest
difference that the items can resolve, the cost in item evaluations, and the memory.
"""


_INIT_HELP = """\
examples:
  evomerge init merge.yml --tasks gsm8k,arc_challenge -o my.yaml
  evomerge init ./base ./maths ./code --tasks zoo_add --include ./zoo/tasks -o my.yaml

Then read and edit it; 'evomerge plan' shows what the search will be.
"""


def _search(options: argparse.Namespace) -> int:
    from evomerge.searching.progress import display_for
    from evomerge.searching.run import search

    run = search(
        options.config,
        run=options.run,
        overrides=options.overrides,
        continue_=options.continue_,
        yes=options.yes,
        display=display_for(),
    )
    return _conclude(run.path, run.results)


def _resume(options: argparse.Namespace) -> int:
    from evomerge.searching.progress import display_for
    from evomerge.searching.run import resume

    run = resume(options.directory, budget=_budget(options.budget), yes=options.yes, display=display_for())
    return _conclude(run.path, run.results)


def _conclude(path: Path, results: dict[str, Any]) -> int:
    from evomerge.recipe import Recipe
    from evomerge.searching.results import summary
    from evomerge.spaces import describe_recipe

    print("\n" + describe_recipe(Recipe.from_dict(results["winner"]["recipe"])))
    print(summary(results))
    print(f"\nThe recipe is in {path}/recipe.yaml. Write the model with: evomerge export {path} --out MODEL")
    return 0


def _budget(entries: Sequence[str]) -> dict[str, Any]:
    from evomerge.schema import parse_yaml

    budget = {}
    for entry in entries:
        key, separator, value = entry.partition("=")
        if not separator:
            raise UserError(f"--budget {entry}: write it as key=value, e.g. --budget candidates=600")
        budget[key] = parse_yaml(value, f"--budget {key}")
    return budget


def _status(options: argparse.Namespace) -> int:
    from evomerge.searching.progress import sentence
    from evomerge.searching.rundir import read_status

    status = read_status(options.directory)
    print(json.dumps(status, indent=2) if options.json else sentence(status))
    return 0


def _export(options: argparse.Namespace) -> int:
    from evomerge.searching.export import export

    print(
        export(
            options.directory,
            options.out,
            format_=options.format,
            candidate=options.candidate,
            max_shard_size=options.max_shard_size,
        )
    )
    return 0


def _merge(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    from evomerge.merging import merge
    from evomerge.statistics.needed import in_lines

    recipe = _read_recipe(options.recipe)
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    try:
        with (
            stopped_by_signals(),
            Progress(*columns, console=console, disable=not console.is_terminal) as display,
        ):
            task = display.add_task("reading the parents", total=None)

            def show(done: int, total: int) -> None:
                display.update(task, description="merging", completed=done, total=total)

            out = merge(
                recipe,
                options.out,
                max_shard_size=options.max_shard_size,
                progress=show,
                report=in_lines(console.print),
                device=options.device,
            )
    except KeyboardInterrupt:
        raise Stopped(f"Stopped; {options.out} was not written.") from None
    print(out)
    return 0


def _read_recipe(path: Path) -> Recipe:
    """Read a recipe of either kind; say on stderr how it is understood."""
    from evomerge.mergekit import open_recipe

    reading = open_recipe(path)
    dialects = dict.fromkeys(merge.dialect for merge in reading.recipe.merges.values())
    if dialects:
        print(f"dialect: {' and '.join(dialects)}", file=sys.stderr)
    for note in reading.notes:
        print(f"note: {note}", file=sys.stderr)
    return reading.recipe


def _extract_lora(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    prepare(offline=all(Path(place).expanduser().exists() for place in (options.model, options.base)))
    from evomerge.extraction import extract_lora

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        with (
            stopped_by_signals(),
            Progress(*columns, console=console, disable=not console.is_terminal) as display,
        ):
            task = display.add_task("reading the models", total=None)

            def show(done: int, total: int) -> None:
                display.update(task, description="decomposing", completed=done, total=total)

            extraction = extract_lora(
                options.model,
                options.base,
                options.out,
                rank=options.rank,
                error=options.error,
                alpha=options.alpha,
                dtype=options.dtype,
                save_rest=options.save_rest,
                device=options.device,
                progress=show,
            )
    except KeyboardInterrupt:
        raise Stopped(f"Stopped; {options.out} was not written.") from None
    print(json.dumps(extraction.to_dict(), indent=2) if options.json else f"{extraction.path}\n{extraction}")
    return 0


def _convert(options: argparse.Namespace) -> int:
    prepare(offline=Path(options.source).expanduser().exists())
    from evomerge.checkpoints.conversion import convert

    try:
        with stopped_by_signals():
            out = convert(
                options.source, options.out, revision=options.revision, max_shard_size=options.max_shard_size
            )
    except KeyboardInterrupt:
        raise Stopped(f"Stopped; {options.out} was not written.") from None
    print(out)
    return 0


def _statistics(options: argparse.Namespace) -> int:
    from rich.console import Console

    prepare(offline=Path(options.model).expanduser().exists())
    from evomerge.data_config import Data
    from evomerge.schema import validate
    from evomerge.statistics.collect import collect_statistics
    from evomerge.statistics.needed import in_lines

    settings = {key: getattr(options, key) for key in ("key", "prompt", "samples", "max_length", "labels")}
    data = validate(Data, {"texts": str(options.data), **settings}, None)
    say = Console(stderr=True).print
    try:
        with stopped_by_signals():
            statistics = collect_statistics(
                options.model, data, options.kind, options.out, device=options.device, report=in_lines(say)
            )
    except KeyboardInterrupt:
        raise Stopped("Stopped; nothing was written.") from None
    print(statistics.folder)
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from evomerge.scoring import evaluate

    result = evaluate(options.model, options.config, split=options.split, overrides=options.overrides)
    print(json.dumps(result.to_dict(), indent=2) if options.json else str(result))
    return 0


def _plan(options: argparse.Namespace) -> int:
    from evomerge.config import load_config
    from evomerge.searching.plan import plan_search
    from evomerge.searching.setup import set_up

    config = load_config(options.config, options.overrides)
    plan = plan_search(set_up(config, file=options.config, weights=False), config.budget)
    print(json.dumps(plan.to_dict(), indent=2) if options.json else str(plan))
    return 0


def _init(options: argparse.Namespace) -> int:
    from evomerge.initial_config import initial_config

    if options.out is not None and options.out.exists():
        raise UserError(f"{options.out}: exists already; name another file with -o")
    tasks = [task for entry in options.tasks.split(",") if (task := entry.strip())]
    if not tasks:
        raise UserError("--tasks: is empty; name at least one lm-eval task")
    text = initial_config(options.sources, tasks, include=options.include, method=options.method)
    if options.out is None:
        print(text, end="")
        return 0
    try:
        options.out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{options.out}: cannot be written: {error.strerror or error}") from None
    print(f"{options.out} is written. See what it will be with: evomerge plan {options.out}")
    return 0


def _methods(options: argparse.Namespace) -> int:
    from evomerge.methods.describe import describe_methods, methods_table
    from evomerge.methods.registry import get_method

    if options.name is not None:
        try:
            get_method(options.name)
        except ValueError as error:
            raise UserError(f"METHOD: {error}") from None
    if options.json:
        table = methods_table()
        print(json.dumps([m for m in table if options.name in (None, m["name"])], indent=2))
    else:
        print(describe_methods(options.name))
    return 0


if __name__ == "__main__":
    sys.exit(main())
