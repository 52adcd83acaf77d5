"""Showing single items to a person: prompt, answer, and what was made of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Preview:
    """What one item looks like to a person.

    Attributes:
        task: name of the suite's task.
        prompt: the rendered context; of several (one a choice) the chosen one.
        answer: the generated text, the chosen choice with its log-probability, or the log-probability.
        extracted: what the filters made of the text, the chosen choice, or whether the text is greedy.
        reference: the right answer.
        raw: the metric's value.
        extracted_ok: False if a filter found nothing in the generated text.
        truncated: whether the text was cut at its token limit; None where nothing is generated.
        max_tokens: that limit.
    """

    task: str
    prompt: str
    answer: str
    extracted: str
    reference: str
    raw: float
    extracted_ok: bool
    truncated: bool | None = None
    max_tokens: int | None = None
