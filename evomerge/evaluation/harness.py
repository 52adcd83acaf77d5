"""lm-eval tasks in a suite: their own prompts, filters and metrics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evomerge.errors import UserError, at
from evomerge.evaluation.chat import PromptStyle
from evomerge.evaluation.definitions import Definition
from evomerge.evaluation.entries import Entry, Reply
from evomerge.evaluation.gold import gold_entries
from evomerge.evaluation.guards import Answers
from evomerge.evaluation.items import Item, Split
from evomerge.evaluation.metrics import Metric, choose_metric
from evomerge.evaluation.preview import Preview
from evomerge.evaluation.requests import (
    Answer,
    Engine,
    Generated,
    Generation,
    Loglikelihood,
    Request,
    Rolling,
)
from evomerge.evaluation.splits import TaskSplits
from evomerge.evaluation.tasks import build_instances, item_id, load_source, request_of, stops_of
from evomerge.suite_config import Splits, TaskSpec
from evomerge.suite_config import Suite as SuiteConfig


class HarnessTask:
    """An lm-eval task with its documents in their splits; see `evomerge.evaluation.entries.Task`.

    Args:
        spec: the suite's entry, which stands at `key` of `file`.
        definition: the task's.
        suite: the config's suite.
        splits: where the items come from, unless `spec` says so.
        style: how prompts are written.

    Raises:
        UserError: the task, its metric or its splits are wrong, or it runs code that is not trusted.
    """

    def __init__(
        self,
        spec: TaskSpec,
        definition: Definition,
        suite: SuiteConfig,
        splits: Splits,
        style: PromptStyle,
        *,
        key: str,
        file: Path | str | None,
    ) -> None:
        self._style = style
        self._place = at(file, f"{key}.metric")
        self._parts = TaskSplits(load_source(spec, definition, suite, key=key, file=file), splits, file)
        task = self._parts.tasks["search"]
        self.metric = choose_metric(
            task, spec.metric, spec.task, file, f"{key}.metric", direction=spec.direction
        )
        self.output_type = str(task.OUTPUT_TYPE)

    @property
    def documents(self) -> Mapping[Split, Sequence[Any]]:
        """Split → (index in its data split, document)."""
        return self._parts.documents

    def prompt(self) -> str | None:
        """Return the first search item's prompt; None for texts that are scored as a whole."""
        if self.output_type == "loglikelihood_rolling":
            return None
        index, doc = self._parts.documents["search"][0]
        (first, *_) = build_instances(self._parts.tasks["search"], index, doc, self._style)
        return str(first.args[0])

    def entries(self, split: Split) -> list[Entry]:
        """See `Task.entries`."""
        source, task = self._parts.source, self._parts.tasks[split]
        scorer = HarnessScorer(task, self.metric, self._style)
        entries = []
        for index, doc in self._parts.documents[split]:
            instances = build_instances(task, index, doc, self._style)
            requests = tuple(request_of(instance, source.spec.task, self._style) for instance in instances)
            gold, choices = _gold(task, doc)
            identity = item_id(source, self.metric, self._style, requests, task.doc_to_target(doc), doc)
            entries.append(
                Entry(
                    item=Item(identity, source.spec.name, split, index),
                    requests=requests,
                    scorer=scorer,
                    reference=_reference(
                        task, requests, gold, choices, chat=self._style.template is not None
                    ),
                    material=Asked(instances, gold, choices),
                )
            )
        if self.metric.of_gold:
            return gold_entries(entries, self.metric, self._place)
        return entries


@dataclass(frozen=True)
class Asked:
    """lm-eval's side of an item.

    Attributes:
        instances: lm-eval's requests.
        gold: the reference, as an index where there are choices.
        choices: of a multiple-choice item.
    """

    instances: list[Any]
    gold: Any
    choices: tuple[str, ...] | None


class HarnessScorer:
    """Scores with the filters and metrics of an lm-eval task; see `evomerge.evaluation.entries.Scorer`."""

    def __init__(self, task: Any, metric: Metric, style: PromptStyle) -> None:
        self._task = task
        self._metric = metric
        self._style = style

    def score(self, replies: Sequence[Reply], engine: Engine) -> list[tuple[float, float]]:
        """See `Scorer.score`."""
        self._fill(replies)
        return [self._metric.item(self._result(reply.entry), reply.entry.item.task) for reply in replies]

    @property
    def task(self) -> Any:
        """The lm-eval task."""
        return self._task

    @property
    def means(self) -> bool:
        """Whether lm-eval reports the mean of what an item scores, too."""
        return self._metric.kind in ("share", "brier")

    def results(self, replies: Sequence[Reply]) -> dict[tuple[str, str], list[Any]]:
        """Return (metric, filter) → what each item earned, of all of the task's metrics."""
        self._fill(replies)
        asked = [reply.entry.material.instances for reply in replies]
        return results_of(self._task, replies[0].entry.item.task, asked)

    def given(self, replies: Sequence[Reply]) -> Answers | None:
        """Return the chosen choices or the generated texts."""
        references = [reply.entry.material.gold for reply in replies]
        first = replies[0].entry
        if first.material.choices is not None:
            fewest = min(len(reply.entry.material.choices) for reply in replies)
            return Answers([_choice(reply) for reply in replies], references, fewest)
        if isinstance(first.requests[0], Generation):
            return Answers([_text_of(reply).strip() for reply in replies], references, None)
        return None

    def preview(self, reply: Reply, engine: Engine) -> Preview:
        """See `Scorer.preview`."""
        ((raw, _),) = self.score([reply], engine)
        entry, asked = reply.entry, reply.entry.material
        task, request, answer = entry.item.task, entry.requests[0], reply.answers[0]
        if isinstance(answer, Generated):
            assert isinstance(request, Generation)
            extracted = _shown(asked.instances[0].filtered_resps[self._metric.filter])
            found = extracted.strip() != "" and extracted not in self._fallbacks()
            return Preview(
                task,
                request.context,
                answer.text,
                extracted,
                _shown(asked.gold),
                raw,
                found,
                answer.truncated,
                request.max_tokens,
            )
        if isinstance(answer, float):
            assert isinstance(request, Rolling)
            return Preview(task, "", f"log-probability {answer:.4f}", "", request.text, raw, True)
        chosen = 0 if asked.choices is None else _choice(reply)
        request, answer = entry.requests[chosen], reply.answers[chosen]
        assert isinstance(request, Loglikelihood)
        assert isinstance(answer, tuple)
        logprob, greedy = answer
        if asked.choices is None:
            shown, extracted = f"log-probability {logprob:.4f}", "greedy" if greedy else "not greedy"
            return Preview(task, request.context, shown, extracted, request.continuation, raw, True)
        choice = asked.choices[chosen]
        known = isinstance(asked.gold, int) and 0 <= asked.gold < len(asked.choices)
        reference = asked.choices[asked.gold] if known else _shown(asked.gold)
        shown = f"{choice} (log-probability {logprob:.4f})"
        return Preview(task, request.context, shown, choice, reference, raw, True)

    def _fill(self, replies: Sequence[Reply]) -> None:
        fill(self._task, self._style, ((reply.entry.material.instances, reply.answers) for reply in replies))

    def _result(self, entry: Entry) -> Any:
        """Return the item's metric as the task computes it."""
        results = computed(self._task, entry.item.task, entry.material.instances, self._metric.filter)
        if self._metric.name not in results:
            raise UserError(
                f"task '{entry.item.task}': no '{self._metric.name}' among its results; choose one of "
                f"{', '.join(results)}"
            )
        return results[self._metric.name]

    def _fallbacks(self) -> set[str]:
        """Return what the metric's filter gives if it finds nothing."""
        filters = self._task.config.filter_list or []
        steps = [step for f in filters if f["name"] == self._metric.filter for step in f["filter"]]
        return {"[invalid]", *(str(step["fallback"]) for step in steps if "fallback" in step)}


def fill(task: Any, style: PromptStyle, asked: Iterable[tuple[Sequence[Any], Sequence[Answer]]]) -> None:
    """Give every lm-eval instance its response, in place of any earlier one; then filter.

    Args:
        task: the lm-eval task.
        style: how prompts were written.
        asked: each document's instances, with the answers to them.
    """
    filled = []
    for instances, answers in asked:
        for instance, answer in zip(instances, answers, strict=True):
            response: Any = answer
            if isinstance(answer, Generated):
                response = style.answer(answer.text, stops_of(instance))
            instance.resps = [response] * max(1, instance.repeats or 1)
            instance.filtered_resps = {}
            filled.append(instance)
    task.filter_responses(filled)


def computed(task: Any, name: str, instances: Sequence[Any], filter_: str) -> Mapping[str, Any]:
    """Return a document's metrics behind a filter, as the task computes them from its filled instances.

    Raises:
        UserError: the task's own code fails.
    """
    filtered = [instance.filtered_resps[filter_] for instance in instances]
    try:
        results: Mapping[str, Any] = task.process_results(instances[0].doc, filtered)
    except Exception as error:
        raise UserError(
            f"task '{name}': its metrics cannot be computed for document {instances[0].doc_id}: "
            f"{type(error).__name__}: {' '.join(str(error).split()):.200}"
        ) from error
    return results


def results_of(task: Any, name: str, documents: Sequence[Sequence[Any]]) -> dict[tuple[str, str], list[Any]]:
    """Return (metric, filter) → what each document's filled instances earned, of all metrics and filters."""
    results: dict[tuple[str, str], list[Any]] = {}
    for instances in documents:
        for filter_ in instances[0].filtered_resps:
            for metric, value in computed(task, name, instances, filter_).items():
                results.setdefault((metric, filter_), []).append(value)
    return results


def _gold(task: Any, doc: Any) -> tuple[Any, tuple[str, ...] | None]:
    """Return the reference, as an index where there are choices, and the choices."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return task.doc_to_target(doc), None
    choices = tuple(map(str, task.doc_to_choice(doc)))
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    return choices.index(gold) if isinstance(gold, str) and gold in choices else gold, choices


def _reference(
    task: Any, requests: Sequence[Request], gold: Any, choices: Sequence[str] | None, *, chat: bool
) -> tuple[str, str] | None:
    """Return an item's prompt and its right answer, the first of several; None if there is none.

    A text that is scored as a whole has an empty prompt. A generated answer follows its prompt as lm-eval lets
    a choice follow: after the task's delimiter, or after none where a chat template has opened the answer.
    """
    request = requests[0]
    if isinstance(request, Rolling):
        return "", request.text
    first = gold[0] if isinstance(gold, list | tuple) and gold else gold
    if choices is not None:
        if not isinstance(first, int) or not 0 <= first < len(choices):
            return None
        request = requests[first]
    if isinstance(request, Loglikelihood):
        return request.context, request.continuation
    assert isinstance(request, Generation)
    if not isinstance(first, str | int | float) or not str(first).strip():
        return None
    prefix = task.config.gen_prefix
    opened = chat and (not prefix or prefix[-1].isspace())
    return request.context, f"{'' if opened else task.config.target_delimiter}{first}"


def _choice(reply: Reply) -> int:
    """Return the most probable choice."""
    count = len(reply.entry.material.choices)
    logprobs = [answer[0] for answer in reply.answers[:count] if isinstance(answer, tuple)]
    return logprobs.index(max(logprobs))


def _text_of(reply: Reply) -> str:
    answer = reply.answers[0]
    assert isinstance(answer, Generated)
    return answer.text


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " | ".join(map(str, value))
    return str(value)
