"""Commands that write a model's or an adapter's weights."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from evomerge.cli.display import progress_bar, stoppable
from evomerge.cli.parser import Commands, add_json, add_shard_size
from evomerge.environment import imports_uncollected, prepare

if TYPE_CHECKING:
    from evomerge.mergekit import Reading


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
  evomerge convert ./compact ./model                     written by evomerge merge --compact

Reads pytorch_model.bin (or its shards) or adapter_model.bin with an unpickler that makes tensors and runs no
code; a file that needs more is refused. Tensors keep their bytes.
"""


def add_commands(commands: Commands) -> None:
    """Declare them."""
    sub = commands.add("merge", _merge, "merge models by a recipe into a Hugging Face folder", _MERGE_HELP)
    sub.add_argument("recipe", type=Path, metavar="RECIPE", help="a recipe, or a mergekit YAML; - for stdin")
    sub.add_argument("out", type=Path, metavar="OUT", help="folder to write; must not exist")
    add_shard_size(sub)
    sub.add_argument("--device", default="cpu", metavar="DEVICE", help="does the arithmetic (default: cpu)")
    sub.add_argument(
        "--compact",
        action="store_true",
        help="write equal tensors once (repeated layers); for evomerge.load_compact and evomerge convert",
    )

    sub = commands.add(
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
    add_json(sub)

    sub = commands.add(
        "convert",
        _convert,
        "write pickled weights (.bin), or a compact folder, as a plain one",
        _CONVERT_HELP,
    )
    sub.add_argument("source", metavar="SOURCE", help="model or adapter: a folder or hub id")
    sub.add_argument("out", type=Path, metavar="OUT", help="folder to write; must not exist")
    sub.add_argument("--revision", metavar="R", help="of a hub id: branch, tag or commit")
    add_shard_size(sub)


def _merge(options: argparse.Namespace) -> int:
    with imports_uncollected():
        from evomerge.merging import merge
        from evomerge.statistics.needed import in_lines

    reading = _read_recipe(options.recipe)
    with (
        stoppable(f"{options.out} was not written"),
        progress_bar("reading the parents", "merging", in_bytes=True) as (show, say),
    ):
        out = merge(
            reading,
            options.out,
            max_shard_size=options.max_shard_size,
            progress=show,
            report=in_lines(say),
            device=options.device,
            compact=options.compact,
        )
    print(out)
    return 0


def _read_recipe(path: Path) -> Reading:
    """Read a recipe of either kind; say on stderr how it is understood."""
    from evomerge.mergekit import open_recipe

    reading = open_recipe(path)
    dialects = dict.fromkeys(merge.dialect for merge in reading.recipe.merges.values())
    if dialects:
        print(f"dialect: {' and '.join(dialects)}", file=sys.stderr)
    for note in reading.notes:
        print(f"note: {note}", file=sys.stderr)
    return reading


def _extract_lora(options: argparse.Namespace) -> int:
    prepare(offline=all(Path(place).expanduser().exists() for place in (options.model, options.base)))
    from evomerge.extraction import extract_lora

    with (
        stoppable(f"{options.out} was not written"),
        progress_bar("reading the models", "decomposing", in_bytes=False) as (show, _),
    ):
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
    print(json.dumps(extraction.to_dict(), indent=2) if options.json else f"{extraction.path}\n{extraction}")
    return 0


def _convert(options: argparse.Namespace) -> int:
    prepare(offline=Path(options.source).expanduser().exists())
    from evomerge.checkpoints.conversion import convert

    with stoppable(f"{options.out} was not written"):
        out = convert(
            options.source, options.out, revision=options.revision, max_shard_size=options.max_shard_size
        )
    print(out)
    return 0
