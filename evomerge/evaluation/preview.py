"""Showing single items to a person: prompt, answer, and what was made of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from evomerge.evaluation.requests import Generation, Loglikelihood, Rolling

if TYPE_CHECKING:
    from evomerge.evaluation.entries import Entry


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
    """

    task: str
    prompt: str
    answer: str
    extracted: str
    reference: str
    raw: float
    extracted_ok: bool


def show(entry: Entry) -> Preview:
    """Return the preview of an item that has just been answered."""
    from evomerge.evaluation.entries import choice_of, results_of

    task = entry.item.task
    raw, _ = entry.metric.item(results_of(entry)[entry.metric.name], task)
    first, request = entry.instances[0], entry.requests[0]
    if isinstance(request, Generation):
        extracted = _text(first.filtered_resps[entry.metric.filter])
        found = extracted.strip() != "" and extracted not in _fallbacks(entry)
        return Preview(task, request.context, first.resps[0], extracted, _text(entry.gold), raw, found)
    if isinstance(request, Rolling):
        return Preview(task, "", f"log-probability {first.resps[0]:.4f}", "", request.text, raw, True)
    if entry.choices is None:
        logprob, greedy = first.resps[0]
        extracted = "greedy" if greedy else "not greedy"
        return Preview(
            task,
            request.context,
            f"log-probability {logprob:.4f}",
            extracted,
            request.continuation,
            raw,
            True,
        )
    chosen = choice_of(entry)
    asked = entry.requests[chosen]
    assert isinstance(asked, Loglikelihood)
    choice, logprob = entry.choices[chosen], entry.instances[chosen].resps[0][0]
    known = isinstance(entry.gold, int) and 0 <= entry.gold < len(entry.choices)
    reference = entry.choices[entry.gold] if known else _text(entry.gold)
    return Preview(
        task, asked.context, f"{choice} (log-probability {logprob:.4f})", choice, reference, raw, True
    )


def _fallbacks(entry: Entry) -> set[str]:
    """Return what the item's filter gives if it finds nothing."""
    filters = entry.task.config.filter_list or []
    steps = [step for f in filters if f["name"] == entry.metric.filter for step in f["filter"]]
    return {"[invalid]", *(str(step["fallback"]) for step in steps if "fallback" in step)}


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " | ".join(map(str, value))
    return str(value)
