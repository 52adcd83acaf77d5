"""The suite as lm-eval tasks: one YAML a skill, beside JSON lines for each split, and two texts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from problems import SPLITS, Problem, maths, ordering, prompt, reading
from texts import ENGLISH, FRENCH

ITEMS = {"search": 192, "validation": 96, "test": 256}
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    search: data/{name}_search.jsonl
    validation: data/{name}_validation.jsonl
    test: data/{name}_test.jsonl
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{result}}}}"
num_fewshot: 0
generation_kwargs:
  until: ["\\n", "Question"]
  max_gen_toks: {tokens}
  do_sample: false
filter_list:
  - name: answer
    filter:
      - {{function: regex, regex_pattern: "{pattern}"}}
      - {{function: take_first}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true}}
"""
NUMBER_EN, NUMBER_FR = "answer is (-?[0-9]+)", "réponse est (-?[0-9]+)"


def suite(seed: int) -> dict[str, tuple[str, int, str, dict[str, Iterator[Problem]]]]:
    """Return task → (language, longest answer in tokens, what the answer is, split → problems)."""
    splits = [split for split in SPLITS if split != "train"]
    return {
        "maths_en": ("en", 40, NUMBER_EN, {s: maths("en", s, seed) for s in splits}),
        "maths_fr": ("fr", 40, NUMBER_FR, {s: maths("fr", s, seed) for s in splits}),
        "reading_fr": ("fr", 40, "réponse est ([^.]+)", {s: reading(s, seed) for s in splits}),
        "ordering_en": ("en", 32, "answer is ([a-z]+)", {s: ordering(s, seed) for s in splits}),
    }


def write_tasks(folder: Path, seed: int) -> None:
    """Write the tasks; their items' keys are disjoint from each other and from all that experts are taught."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for name, (language, tokens, pattern, streams) in suite(seed).items():
        seen: dict[tuple[object, ...], str] = {}
        for split, problems in streams.items():
            rows: dict[str, dict[str, str]] = {}
            while len(rows) < ITEMS[split]:
                problem = next(problems)
                assert seen.setdefault(problem.key, split) == split, f"{name}: {problem.key} is in two splits"
                question = prompt(problem.question, language)
                rows.setdefault(question, {"prompt": question, "result": problem.result})
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows.values())
            (folder / "data" / f"{name}_{split}.jsonl").write_text(text)
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, tokens=tokens, pattern=pattern))
    for name, lines in (("english", ENGLISH), ("french", FRENCH)):
        (folder / f"{name}.txt").write_text("\n\n".join(lines) + "\n")
