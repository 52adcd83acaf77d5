"""The skills as lm-eval tasks: one YAML a skill, beside JSON lines for each split."""

from __future__ import annotations

import json
import random
from pathlib import Path

from skills import SKILLS, Item, draw_splits, held_out_keys

HEADER = """\
task: zoo_{skill}
tag: zoo
dataset_path: json
dataset_kwargs:
  data_files:
{files}
test_split: test
num_fewshot: 0
doc_to_text: "{{{{prompt}}}}"
target_delimiter: ""
"""

GENERATE = """\
output_type: generate_until
doc_to_target: "{{answer}}"
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 8
  do_sample: false
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""

CHOICE = """\
output_type: multiple_choice
doc_to_choice: choices
doc_to_target: gold
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


def write_tasks(folder: Path, sizes: dict[str, int], seed: int) -> None:
    """Write every skill's YAML to `folder`, and `sizes[split]` items of each split. Paths are relative to it."""
    for skill in SKILLS.values():
        splits = draw_splits(skill, sizes, seed)
        held_out_keys(splits)
        files = "\n".join(f"    {split}: data/{skill.name}_{split}.jsonl" for split in splits)
        text = HEADER.format(skill=skill.name, files=files) + (CHOICE if skill.choices else GENERATE)
        (folder / f"zoo_{skill.name}.yaml").write_text(text)
        for split, items in splits.items():
            path = folder / "data" / f"{skill.name}_{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            rows = (
                choice_rows(items, random.Random(f"{seed} {skill.name} {split}"))
                if skill.choices
                else rows_of(items)
            )
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def rows_of(items: list[Item]) -> list[dict[str, object]]:
    """One row an item whose answer is written freely."""
    return [{"prompt": item.prompt, "answer": item.answer} for item in items]


def choice_rows(items: list[Item], rng: random.Random) -> list[dict[str, object]]:
    """One row an item with offered answers, permuted so that every index is the right one equally often.

    A model that always takes the same index, for instance because its scores are not numbers, is then right by
    chance only.
    """
    golds = [index % len(item.choices) for index, item in enumerate(items)]
    rng.shuffle(golds)
    rows: list[dict[str, object]] = []
    for item, gold in zip(items, golds, strict=True):
        choices = [choice for choice in item.choices if choice != item.answer]
        rng.shuffle(choices)
        choices.insert(gold, item.answer)
        rows.append({"prompt": item.prompt, "choices": choices, "gold": gold})
    return rows
