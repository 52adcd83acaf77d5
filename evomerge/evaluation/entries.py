"""Items ready to be asked, and what the engine's answers to them are worth."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from evomerge.errors import UserError
from evomerge.evaluation.guards import Answers, check_finite
from evomerge.evaluation.items import Item
from evomerge.evaluation.metrics import Metric
from evomerge.evaluation.requests import Engine, Generation, Loglikelihood, Rolling
from evomerge.evaluation.tasks import Request

REQUEST_KINDS = (Loglikelihood, Rolling, Generation)


@dataclass(frozen=True)
class Entry:
    """An item with all that scoring needs of it."""

    item: Item
    task: Any
    metric: Metric
    instances: list[Any]
    requests: tuple[Request, ...]
    gold: Any
    choices: tuple[str, ...] | None


@dataclass(frozen=True)
class Questions:
    """The requests of some items by kind, and where each item's answers are among them."""

    entries: tuple[Entry, ...]
    asked: Mapping[type, tuple[Request, ...]]


def gold_of(task: Any, doc: Any) -> tuple[Any, tuple[str, ...] | None]:
    """Return the reference, as an index where there are choices, and the choices."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return task.doc_to_target(doc), None
    choices = tuple(map(str, task.doc_to_choice(doc)))
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    return choices.index(gold) if isinstance(gold, str) and gold in choices else gold, choices


def reference_of(entry: Entry) -> tuple[str, str] | None:
    """Return an item's prompt and its right answer, as they follow each other; None if there is none."""
    request = entry.requests[0]
    if isinstance(request, Rolling):
        return "", request.text
    if entry.choices is not None:
        gold = entry.gold[0] if isinstance(entry.gold, list) and entry.gold else entry.gold
        if not isinstance(gold, int) or not 0 <= gold < len(entry.choices):
            return None
        request = entry.requests[gold]
    if isinstance(request, Loglikelihood):
        return request.context, request.continuation
    gold = entry.gold[0] if isinstance(entry.gold, list | tuple) and entry.gold else entry.gold
    if not isinstance(gold, str | int | float) or not isinstance(request, Generation):
        return None
    return request.context, f"{entry.task.config.target_delimiter}{gold}"


def ask_of(entries: Iterable[Entry]) -> Questions:
    entries = tuple(entries)
    asked: dict[type, tuple[Request, ...]] = {
        kind: tuple(request for entry in entries for request in entry.requests if isinstance(request, kind))
        for kind in REQUEST_KINDS
    }
    return Questions(entries, asked)


def answer(engine: Engine, questions: Questions) -> None:
    """Give every instance its response, checked to be finite, in place of any earlier one; then filter."""
    asked: Mapping[type, Any] = questions.asked
    answers: dict[type, list[Any]] = {}
    if asked[Loglikelihood]:
        answers[Loglikelihood] = engine.loglikelihood(asked[Loglikelihood])
        check_finite((logprob for logprob, _ in answers[Loglikelihood]), "a log-probability")
    if asked[Rolling]:
        answers[Rolling] = engine.loglikelihood_rolling(asked[Rolling])
        check_finite(answers[Rolling], "a log-probability")
    if asked[Generation]:
        answers[Generation] = [answer.text for answer in engine.generate(asked[Generation])]
    streams = {kind: iter(given) for kind, given in answers.items()}
    by_task: dict[int, tuple[Any, list[Any]]] = {}
    for entry in questions.entries:
        for instance, request in zip(entry.instances, entry.requests, strict=True):
            instance.resps = [next(streams[type(request)])] * max(1, instance.repeats or 1)
            instance.filtered_resps = {}
        by_task.setdefault(id(entry.task), (entry.task, []))[1].extend(entry.instances)
    for task, instances in by_task.values():
        task.filter_responses(instances)


def results_of(entry: Entry) -> Mapping[str, Any]:
    """Return the item's metrics as the task computes them."""
    filtered = [instance.filtered_resps[entry.metric.filter] for instance in entry.instances]
    try:
        results: Mapping[str, Any] = entry.task.process_results(entry.instances[0].doc, filtered)
    except Exception as error:
        raise UserError(
            f"task '{entry.item.task}': its metrics cannot be computed for document {entry.item.index}: "
            f"{type(error).__name__}: {' '.join(str(error).split()):.200}"
        ) from error
    if entry.metric.name not in results:
        raise UserError(
            f"task '{entry.item.task}': no '{entry.metric.name}' among its results; choose one of "
            f"{', '.join(results)}"
        )
    return results


def choice_of(entry: Entry) -> int:
    """Return the most probable choice."""
    assert entry.choices is not None
    logprobs = [instance.resps[0][0] for instance in entry.instances[: len(entry.choices)]]
    return logprobs.index(max(logprobs))


def answers_of(entries: Iterable[Entry]) -> dict[str, Answers]:
    """Return what was answered, by task, for the tasks that have answers."""
    by_task: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry.choices is not None or isinstance(entry.requests[0], Generation):
            by_task.setdefault(entry.item.task, []).append(entry)
    answers = {}
    for name, group in by_task.items():
        if group[0].choices is not None:
            fewest = min(len(entry.choices or ()) for entry in group)
            answers[name] = Answers(
                [choice_of(entry) for entry in group], [entry.gold for entry in group], fewest
            )
        else:
            texts = [entry.instances[0].resps[0].strip() for entry in group]
            answers[name] = Answers(texts, [entry.gold for entry in group], None)
    return answers
