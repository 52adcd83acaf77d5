"""The screen: search items asked once more, cheaply, for the probability of their right answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from evomerge.errors import UserError, nearest
from evomerge.evaluation.entries import Entry
from evomerge.evaluation.gold import GoldScorer, gold_entries
from evomerge.evaluation.metrics import GOLD, Metric
from evomerge.evaluation.requests import Rolling
from evomerge.suite_config import Screen

SUFFIX = ":screen"
"""What a task is called as part of the screen: its name and this."""


def screen_entries(screen: Screen, search: Sequence[Entry], place: str) -> dict[str, Entry]:
    """Return what the screen asks in place of search items: item id → entry of the split ``screen``.

    Args:
        screen: the config's; without tasks it takes all whose items have reference answers and that are not
            scored with these already.
        search: the suite's search items.
        place: where the screen stands in the config, for messages.

    Raises:
        UserError: a task does not exist or has no reference answers, or there is none that has.
    """
    by_task: dict[str, list[Entry]] = {}
    for entry in search:
        by_task.setdefault(entry.item.task, []).append(entry)
    metric = Metric(screen.metric, "none", GOLD[screen.metric], higher_is_better=False)
    if screen.tasks is None:
        chosen = [name for name, entries in by_task.items() if all(map(_cheaper, entries))]
        if not chosen:
            raise UserError(
                f"{place}no task has reference answers besides those it is scored with; name tasks under "
                "suite.screen.tasks, or leave suite.screen out"
            )
    else:
        chosen = list(screen.tasks)
    twins: dict[str, Entry] = {}
    for name in chosen:
        if name not in by_task:
            raise UserError(f"{place}tasks: no task of the suite is called '{name}'{nearest(name, by_task)}")
        if any(isinstance(request, Rolling) for entry in by_task[name] for request in entry.requests):
            raise UserError(
                f"{place}tasks: task '{name}' scores whole texts, which have no prompt and answer; leave it out"
            )
        for entry, twin in zip(by_task[name], gold_entries(by_task[name], metric, place), strict=True):
            item = replace(twin.item, task=name + SUFFIX, split="screen")
            twins[entry.item.id] = replace(twin, item=item)
    return twins


def _cheaper(entry: Entry) -> bool:
    """Whether the probability of the reference answer is known and something else than the item's own score."""
    whole = any(isinstance(request, Rolling) for request in entry.requests)
    return entry.reference is not None and not whole and not isinstance(entry.scorer, GoldScorer)
