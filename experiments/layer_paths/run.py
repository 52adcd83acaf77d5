#!/usr/bin/env python3
"""Searches over layer paths against a search over coefficients, and against one another, at one budget.

    .venv/bin/python scripts/build_zoo --deep
    .venv/bin/python experiments/layer_paths/run.py

Each arm is one search a seed, kept in runs/layer_paths (what is there is not repeated, what was
interrupted goes on; `--force` starts over). Every winner is exported as a Hugging Face folder and answers the test
items there, loaded by AutoModelForCausalLM without any code of evomerge. Writes results.jsonl, path.svg and README.md's
table; `--table` only writes the last two again from results.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import time
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import numpy as np
import yaml

from evomerge import merge, search

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from bench import packed, unpacked  # noqa: E402
from readme import put_tables  # noqa: E402

REPOSITORY = HERE.parents[1]
CONFIGS = REPOSITORY / "configs"
RUNS = REPOSITORY / "runs" / "layer_paths"
RESULTS = HERE / "results.jsonl"

ITEMS = 28_800
"""Search items that a run may ask: its budget."""

Table = dict[str, dict[str, float]]
"""Task → item → 1 where the answer is right."""


def arms() -> dict[str, dict[str, Any]]:
    """Return the arms: name → the config of a search."""
    both = yaml.safe_load((CONFIGS / "coefficients_layers.yaml").read_text())
    layers = yaml.safe_load((CONFIGS / "layers.yaml").read_text())
    edits = layers["space"]
    indicators = {key: edits[key] for key in ("type", "pool", "repeats", "scale")} | {"genome": "indicators"}
    paper = indicators | {"start": "paper"}
    cma = {"type": "cma"}
    return {
        "coefficients": both
        | {"space": {"type": "coefficients", **both["space"]["coefficients"]}, "optimizer": cma},
        "layers: edits": layers,
        "layers: edits, random": layers | {"optimizer": {"type": "random", "population": 24}},
        "layers: indicators, catcma": layers | {"space": indicators, "optimizer": {"type": "catcma"}},
        "layers: indicators, cma, paper's start": layers | {"space": paper, "optimizer": cma},
        "coefficients + layers": both,
    }


def one_run(arm: str, config: dict[str, Any], seed: int, items: int) -> dict[str, Any]:
    """Run or go on with one search; return its results and the table of its winner's answers."""
    words = re.sub("[^a-z]+", "_", arm.replace("'", ""))
    folder = RUNS / f"{words}_{seed}"
    config = config | {"name": folder.name, "seed": seed, "workers": {"type": "local"}}
    config["cache"] = {"scores": str(RUNS / "scores")}
    budget = {"item_evaluations": items}
    if config["space"]["type"] == "coefficients+layers":
        budget["layers"] = config["budget"]["layers"]
    config = absolute(config | {"budget": budget})
    file = RUNS / f"{folder.name}.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    run = search(file, run=folder, continue_=True)
    results = run.results
    model = RUNS / f"{folder.name}_model"
    shutil.rmtree(model, ignore_errors=True)
    run.export(model)
    zoo = Path(config["models"]["base"]).parent
    right, probability = answers(model, zoo / "tasks")
    ours = results["winner"]["test"]["mean"]
    return {
        "arm": arm,
        "seed": seed,
        "winner": results["winner"]["name"],
        "path": results["winner"]["recipe"].get("path"),
        "candidates": results["candidates"],
        "screened": results["screened_candidates"],
        "items": results["item_evaluations"] + results["cached_item_evaluations"],
        "wall_seconds": results["wall_seconds"],
        "validation": results["winner"]["validation"]["mean"],
        "test": ours,
        "test_exported": probability,
        "right": right,
        "comparisons": results["comparisons"],
        "versions": results["versions"],
    }


def absolute(config: dict[str, Any]) -> dict[str, Any]:
    """Return the config with absolute paths."""

    def at(path: str) -> str:
        return str((CONFIGS / path).resolve())

    models = config["models"]
    experts = {name: at(path) for name, path in models["experts"].items()}
    suite = config["suite"] | {"include": [at(path) for path in config["suite"]["include"]]}
    return config | {"models": {"base": at(models["base"]), "experts": experts}, "suite": suite}


def answers(folder: Path, tasks: Path) -> tuple[Table, float]:
    """Return which test items a model answers right, and how probable it finds a byte of the right answers.

    The model is loaded by transformers alone. Free answers are right if each token, and the line end, is the likeliest
    after the prompt and the answer so far: what greedy generation would write. The second number is the mean over
    tasks of exp(−nats / bytes), which the searches see as fitness.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    right: Table = {}
    probabilities = []
    for file in sorted((tasks / "data").glob("*_test.jsonl")):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        groups = defaultdict(list)
        for number, row in enumerate(rows):
            for choice in row.get("choices", [row.get("answer")]):
                prompt, answer = tokenizer.encode(row["prompt"]), tokenizer.encode(choice)
                groups[len(prompt), len(answer)].append((number, choice, prompt + answer))
        nats: dict[tuple[int, str], float] = {}
        greedy: dict[tuple[int, str], bool] = {}
        for (start, _), group in groups.items():
            ids = torch.tensor([tokens for _, _, tokens in group])
            with torch.inference_mode():
                log_p = model(input_ids=ids, use_cache=False).logits[:, start - 1 :].log_softmax(-1)
            told = log_p[:, :-1].gather(-1, ids[:, start:, None]).sum((1, 2))
            end = torch.full((len(group), 1), tokenizer.encode("\n")[0])
            same = (log_p.argmax(-1) == torch.cat([ids[:, start:], end], 1)).all(1)
            for (number, choice, _), value, hit in zip(group, told.tolist(), same.tolist(), strict=True):
                nats[number, choice], greedy[number, choice] = -value, hit
        values, hits = [], {}
        for number, row in enumerate(rows):
            gold = row["answer"] if "answer" in row else row["choices"][row["gold"]]
            values.append(float(np.exp(-nats[number, gold] / len(gold.encode()))))
            best = min(row["choices"], key=lambda c: nats[number, c]) if "choices" in row else None
            hits[str(number)] = float(greedy[number, gold] if best is None else best == gold)
        right[file.name.removesuffix("_test.jsonl")] = hits
        probabilities.append(mean(values))
    return right, mean(probabilities)


def share(table: Table) -> float:
    """Return the mean over tasks of the share of right answers."""
    return mean(mean(hits.values()) for hits in table.values())


def difference(ours: list[Table], theirs: list[Table], draws: int = 10_000) -> tuple[float, float, float]:
    """Return the mean difference of two lists of models, one a seed (or one for all seeds), and its 95 % interval.

    Paired: a draw resamples the items of each task, the same for all models, and the seeds.
    """
    rng = np.random.default_rng(0)
    longest = max(len(ours), len(theirs))
    pairs = list(
        zip(*(tables * longest if len(tables) == 1 else tables for tables in (ours, theirs)), strict=False)
    )
    seeds = rng.multinomial(len(pairs), [1 / len(pairs)] * len(pairs), size=draws) / len(pairs)
    total, delta = np.zeros(draws), 0.0
    for task in ours[0]:
        gaps = np.array([[a[task][item] - b[task][item] for item in a[task]] for a, b in pairs])
        items = gaps.shape[1]
        drawn = rng.multinomial(items, [1 / items] * items, size=draws) / items
        total += ((drawn @ gaps.T) * seeds).sum(1) / len(ours[0])
        delta += gaps.mean() / len(ours[0])
    low, high = np.quantile(total, [0.025, 0.975])
    return float(delta), float(low), float(high)


def main() -> None:
    """Run what is missing and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--items", type=int, default=ITEMS, help=f"budget of a run (default: {ITEMS})")
    parser.add_argument("--arm", action="append", help="only this arm; may be given several times")
    parser.add_argument("--force", action="store_true", help="repeat what is there")
    parser.add_argument("--table", action="store_true", help="only write README.md and path.svg again")
    options = parser.parse_args()
    if options.force:
        shutil.rmtree(RUNS, ignore_errors=True)
        RESULTS.unlink(missing_ok=True)
    rows = load()
    if not options.table:
        RUNS.mkdir(parents=True, exist_ok=True)
        configs = arms()
        if not rows:
            rows = references(configs["coefficients"])
            save(rows)
        done = {(row["arm"], row["seed"]) for row in rows}
        wanted = options.arm or list(configs)
        todo = [(arm, seed) for seed in range(options.seeds) for arm in wanted if (arm, seed) not in done]
        for number, (arm, seed) in enumerate(todo, start=1):
            started = time.monotonic()
            row = one_run(arm, configs[arm], seed, options.items)
            rows.append(row)
            save(rows)
            print(
                f"{number}/{len(todo)}  {arm}, seed {seed}: {row['winner']}, {share(row['right']):.3f} right on test "
                f"(fitness {row['test']:.3f}), {time.monotonic() - started:.0f} s",
                flush=True,
            )
    write_report(rows)


def references(config: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of the parents and of their average."""
    models = absolute(config)["models"]
    folders = {"base": Path(models["base"])} | {name: Path(path) for name, path in models["experts"].items()}
    tasks = folders["base"].parent / "tasks"
    average = RUNS / "uniform_model"
    shutil.rmtree(average, ignore_errors=True)
    experts = list(models["experts"])
    recipe = {
        "evomerge": 1,
        "models": {name: str(folders[name]) for name in experts},
        "merges": {
            "merged": {"method": "linear", "inputs": experts, "parameters": {"weight": 1 / len(experts)}}
        },
    }
    file = RUNS / "uniform.yaml"
    file.write_text(yaml.safe_dump(recipe, sort_keys=False))
    merge(file, average)
    rows = []
    for name, folder in (folders | {"uniform": average}).items():
        right, probability = answers(folder, tasks)
        rows.append({"arm": name, "seed": None, "test_exported": probability, "right": right})
    return rows


def save(rows: list[dict[str, Any]]) -> None:
    """Write results.jsonl at once, each task's answers as a string of zeros and ones."""
    new = RESULTS.with_suffix(".new")
    new.write_text("".join(json.dumps(row | {"right": packed(row["right"])}) + "\n" for row in rows))
    new.rename(RESULTS)


def load() -> list[dict[str, Any]]:
    """Return what results.jsonl holds."""
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    return [row | {"right": unpacked(row["right"])} for row in rows]


def write_report(rows: list[dict[str, Any]]) -> None:
    """Write README.md's table and the picture of the best path."""
    by_arm: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        by_arm[row["arm"]].append(row)
    parents = [arm for arm, found in by_arm.items() if found[0]["seed"] is None and arm != "uniform"]
    best = max(parents, key=lambda arm: share(by_arm[arm][0]["right"]))
    for found in by_arm.values():
        found.sort(key=lambda row: row["seed"] or 0)
    tables = {arm: [row["right"] for row in found] for arm, found in by_arm.items()}
    lines = [
        f"| | fitness | − {best}, weakest run | right | each seed | − {best} | − coefficients "
        "| asked | stopped | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for arm, found in by_arm.items():
        cells = [
            arm,
            f"{mean(row['test_exported'] for row in found):.3f}",
            "",
            f"{mean(share(table) for table in tables[arm]):.3f}",
            "",
            "" if arm == best else shown(difference(tables[arm], tables[best])),
            "" if arm == "coefficients" else shown(difference(tables[arm], tables["coefficients"])),
            *[""] * 3,
        ]
        if found[0]["seed"] is not None:
            weakest = min(
                (row["comparisons"][best] for row in found), key=lambda c: c["ci95_simultaneous"][0]
            )
            cells[2] = shown((weakest["delta"], *weakest["ci95_simultaneous"]))
            cells[4] = " ".join(f"{share(table):.3f}" for table in tables[arm])
            cells[7:] = [
                f"{mean(row['candidates'] for row in found):.0f}",
                f"{mean(row['screened'] / row['candidates'] for row in found):.1%}",
                f"{mean(row['wall_seconds'] for row in found):.0f}",
            ]
        lines.append("| " + " | ".join(cells) + " |")
    table = "\n".join(lines)
    paths = [row for row in rows if row.get("path")]
    drawn = max(paths, key=lambda row: row["validation"]) if paths else None
    if drawn:
        (HERE / "path.svg").write_text(picture(drawn["path"], f"{drawn['arm']}, seed {drawn['seed']}"))
    put_tables(HERE / "README.md", f"\n{table}\n\n")


def shown(interval: tuple[float, float, float]) -> str:
    """Return a difference with its interval, bold where that excludes zero."""
    delta, low, high = interval
    text = f"{delta:+.3f} [{low:+.3f}, {high:+.3f}]"
    return f"**{text}**" if low > 0 or high < 0 else text


COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3")


def picture(path: list[dict[str, Any]], title: str) -> str:
    """Return an SVG of a path: hops from left to right, layers upwards, a colour for each model, scales at jumps."""
    names = list(dict.fromkeys(hop.get("model") or hop["merge"] for hop in path))
    colour = dict(zip(names, COLOURS, strict=False))
    step, left, top, size = 34, 70, 46, 24
    deepest = max(hop["layer"] for hop in path)
    width, height = left + step * len(path) + 20, top + step * (deepest + 1) + 58
    places = [(left + step * i, top + step * (deepest - hop["layer"])) for i, hop in enumerate(path)]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{left}" y="20" font-size="13">{title}: {len(path)} layers</text>',
    ]
    for layer in range(deepest + 1):
        y = top + step * (deepest - layer) + size / 2 + 4
        parts.append(f'<text x="{left - 12}" y="{y}" text-anchor="end" fill="#666">layer {layer}</text>')
    for (x, y), (x2, y2) in pairwise(places):
        ends = f'x1="{x + size / 2}" y1="{y + size / 2}" x2="{x2 + size / 2}" y2="{y2 + size / 2}"'
        parts.append(f'<line {ends} stroke="#bbb" stroke-width="2"/>')
    for hop, (x, y) in zip(path, places, strict=True):
        fill = colour[hop.get("model") or hop["merge"]]
        parts.append(f'<rect x="{x}" y="{y}" width="{size}" height="{size}" rx="4" fill="{fill}"/>')
        if hop.get("scale", 1) != 1:
            scale = f"{hop['scale']:g}"
            parts.append(f'<text x="{x + size / 2}" y="{y - 4}" text-anchor="middle">×{scale}</text>')
    x, y = left, height - 20
    for name in names:
        parts.append(f'<rect x="{x}" y="{y - 11}" width="12" height="12" rx="3" fill="{colour[name]}"/>')
        parts.append(f'<text x="{x + 17}" y="{y}">{name}</text>')
        x += 32 + 7 * len(name)
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    main()
