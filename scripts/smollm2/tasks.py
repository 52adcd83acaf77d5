"""The suite as lm-eval tasks: one YAML a skill, beside JSON lines for each split, and two texts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from problems import Problem, maths, ordering, prompt, reading
from texts import ENGLISH, FRENCH

TARGET = "maths_fr"
ITEMS = {"search": 40, "validation": 32, "test": 64}
"""Of each task but the target."""
TARGET_ITEMS = {"search": 256, "validation": 128, "test": 768}
"""Of the one that the search is about: most of what a candidate answers, and enough to tell winners apart."""
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
      - {{function: regex, regex_pattern: "{pattern}", group_select: -1}}
      - {{function: take_first}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true}}
"""
NUMBER = "(-?[0-9]+)"
"""The last number counts, in whatever words it stands, as in lm-eval's `flexible-extract`."""


@dataclass(frozen=True)
class Skill:
    """One task.

    Attributes:
        tokens: longest answer.
        pattern: what counts of an answer: the last match.
        problems: of each split.
    """

    tokens: int
    pattern: str
    problems: dict[str, Iterator[Problem]]


def suite(seed: int) -> dict[str, Skill]:
    """Return the tasks by name."""
    splits = list(ITEMS)
    return {
        "maths_en": Skill(40, NUMBER, {s: maths("en", s, seed) for s in splits}),
        "maths_fr": Skill(40, NUMBER, {s: maths("fr", s, seed) for s in splits}),
        "reading_fr": Skill(32, "answer is ([^.]+)", {s: reading(s, seed) for s in splits}),
        "ordering_en": Skill(32, "answer is ([a-z]+)", {s: ordering(s, seed) for s in splits}),
    }


def write_tasks(folder: Path, seed: int) -> None:
    """Write the tasks; their items' keys are disjoint from each other and from all that experts are taught."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for name, skill in suite(seed).items():
        wanted = TARGET_ITEMS if name == TARGET else ITEMS
        seen: dict[tuple[object, ...], str] = {}
        for split, problems in skill.problems.items():
            rows: list[dict[str, str]] = []
            for problem in problems:
                known = problem.key in seen
                assert seen.setdefault(problem.key, split) == split, f"{name}: {problem.key} is in two splits"
                if not known:
                    rows.append({"prompt": prompt(problem.question), "result": problem.result})
                if len(rows) == wanted[split]:
                    break
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (folder / "data" / f"{name}_{split}.jsonl").write_text(text)
        (folder / f"{name}.yaml").write_text(
            TASK.format(name=name, tokens=skill.tokens, pattern=skill.pattern)
        )
    for name, lines in (("english", ENGLISH), ("french", FRENCH)):
        for number, split in enumerate(ITEMS):
            (folder / f"{name}_{split}.txt").write_text("\n\n".join(lines[number :: len(ITEMS)]) + "\n")
