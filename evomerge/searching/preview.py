"""Before the first candidate: what base and initial really answer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from evomerge.errors import CandidateFailed
from evomerge.evaluation.items import Item
from evomerge.searching.reporter import Reporter
from evomerge.searching.rundir import PREVIEW, write_atomically

if TYPE_CHECKING:
    from evomerge.evaluation.suite import Preview
    from evomerge.searching.setup import Setup
    from evomerge.workers.executor import Executor

ITEMS_PER_TASK = 2
LARGEST_TRUNCATED_SHARE = 0.1
"""More answers than this that are cut at their token limit are told."""


def write_preview(folder: Path, setup: Setup, executor: Executor, display: Reporter) -> list[str]:
    """Let base and initial answer two search items of each task; show and keep the answers.

    Returns:
        The tasks on which nothing could be extracted from any answer.
    """
    items: dict[str, list[Item]] = defaultdict(list)
    for item in setup.suite.items("search"):
        if len(items[item.task]) < ITEMS_PER_TASK:
            items[item.task].append(item)
    wanted = [item for few in items.values() for item in few]
    lines = [
        "# Preview",
        "",
        "Two search items of each task, answered by the base and by the initial merge before the first candidate.",
    ]
    extracted: dict[str, bool] = dict.fromkeys(items, False)
    display.say(f"what the initial merge answers (more in {folder / PREVIEW}):")
    for name in ("base", "initial"):
        try:
            answers = executor.preview(setup.baselines[name], wanted)
        except CandidateFailed as reason:
            lines += ["", f"## {name}", "", f"could not answer: {reason}"]
            continue
        lines += ["", f"## {name}"]
        for sentence in _cut(name, answers):
            lines += ["", f"Warning: {sentence}"]
            display.say(f"  warning: {sentence}")
        for answer in answers:
            extracted[answer.task] |= answer.extracted_ok
            lines += _markdown(answer)
            if name == "initial":
                display.say(_sentence(answer))
    write_atomically(folder / PREVIEW, "\n".join(lines) + "\n")
    return [task for task, ok in extracted.items() if not ok]


def _markdown(answer: Preview) -> list[str]:
    return [
        "",
        f"### {answer.task}",
        "",
        "Prompt:",
        "",
        *_block(answer.prompt),
        "",
        "Answer:",
        "",
        *_block(answer.answer),
        "",
        f"Extracted `{answer.extracted!r}`, reference `{answer.reference!r}`, score {answer.raw:g}"
        + (f"; cut at {answer.max_tokens} tokens" if answer.truncated else ""),
    ]


def _cut(name: str, answers: Sequence[Preview]) -> list[str]:
    """Return a sentence for each task of whose answers too many were cut at their token limit."""
    sentences = []
    for task in dict.fromkeys(answer.task for answer in answers):
        known = [a for a in answers if a.task == task and a.truncated is not None]
        cut = [a for a in known if a.truncated]
        if known and len(cut) > LARGEST_TRUNCATED_SHARE * len(known):
            sentences.append(
                f"{len(cut)} of {len(known)} answers of {name} to '{task}' were cut at {cut[0].max_tokens} tokens; "
                "give them room with gen_kwargs: {max_gen_toks: ...}, or a stop string that ends them"
            )
    return sentences


def _block(text: str) -> list[str]:
    return [f"    {line}" for line in text.splitlines() or [""]]


def _sentence(answer: Preview) -> str:
    return (
        f"  {answer.task}: {_short(answer.prompt)!r} -> {_short(answer.answer)!r}, "
        f"extracted {_short(str(answer.extracted))!r}, reference {_short(str(answer.reference))!r}, "
        f"score {answer.raw:g}"
    )


def _short(text: str, length: int = 40) -> str:
    return text if len(text) <= length else f"…{text[-length:]}"
