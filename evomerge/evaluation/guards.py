"""Answers that say that a model is broken, although a metric may give them a good score."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from evomerge.errors import CandidateFailed

MINIMUM_ITEMS = 8
LARGEST_CHANCE = 1e-6


def check_finite(numbers: Iterable[float], what: str) -> None:
    """Fail the candidate if any number is not finite: ``argmax`` of NaN is 0, and may be the right answer."""
    if not all(map(math.isfinite, numbers)):
        raise CandidateFailed(f"{what} is not finite")


@dataclass(frozen=True)
class Answers:
    """What a model answered to the items of one task in one block.

    Attributes:
        given: chosen indices (multiple choice) or generated texts.
        references: gold indices or texts, comparable by ``==``.
        choices: the smallest number of choices of an item; None for generated texts.
    """

    given: Sequence[Any]
    references: Sequence[Any]
    choices: int | None


def all_the_same(answers: Answers) -> bool | None:
    """Whether a task's answers do not depend on the items; None if that cannot be judged.

    It is judged on `MINIMUM_ITEMS` items or more that do not all have the same reference. For multiple
    choice, uniformly random answers must also agree with a chance below `LARGEST_CHANCE`: 11 items with
    four choices, 21 with two.
    """
    count = len(answers.given)
    if count < MINIMUM_ITEMS or all(r == answers.references[0] for r in answers.references):
        return None
    if answers.choices is not None and max(answers.choices, 1) ** -(count - 1) > LARGEST_CHANCE:
        return None
    return all(answer == answers.given[0] for answer in answers.given)


def constant_of(answers: Answers) -> str | None:
    """Return the answer if all are the same, ``""`` if they depend on the items, None if that cannot be judged."""
    verdict = all_the_same(answers)
    if not verdict:
        return None if verdict is None else ""
    first = answers.given[0]
    return f"choice {first}" if answers.choices is not None else f"{first!r:.60}"


def check_constants(tasks: Iterable[tuple[str, str | None, int]]) -> None:
    """Fail the candidate if no task of a block that can be judged has answers that depend on the item.

    One task alone that a model has not learnt (it always says the same) is a low score, not a failure,
    as long as another task shows that the model reads its input.

    Args:
        tasks: name, answer as `constant_of` tells it, and number of items of each.
    """
    judged = [(name, constant, count) for name, constant, count in tasks if constant is not None]
    if judged and all(constant for _, constant, _ in judged):
        name, constant, count = judged[0]
        raise CandidateFailed(f"degenerate answers: task '{name}' has {constant} for each of {count} items")
