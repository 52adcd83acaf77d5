"""lm-eval tasks with the documents that lm-eval itself evaluates, outside any search."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evomerge.errors import UserError, at, nearest
from evomerge.evaluation.chat import PromptStyle, check_thinking
from evomerge.evaluation.data import quiet
from evomerge.evaluation.definitions import Definition
from evomerge.evaluation.harness import fill, results_of
from evomerge.evaluation.requests import Request
from evomerge.evaluation.tasks import build_instances, build_task, load_source, request_of
from evomerge.suite_config import Suite as SuiteConfig
from evomerge.suite_config import TaskSpec


class WholeTask:
    """One lm-eval task, its first documents rendered in their order.

    Args:
        spec: the suite's entry.
        definition: the task's.
        suite: what may run, and how.
        limit: as lm-eval's: the first so many documents; below 1, this share of them; None: all.
        split: the data split; None: the test split, or the validation split where the task has no other.
        style: how prompts are written.
        key: where the task was named; `file` is the config's.

    Attributes:
        name: the task's.
        task: the lm-eval task.
        split: the data split.

    Raises:
        UserError: the task or its data split is wrong, or it runs code that is not trusted.
    """

    def __init__(
        self,
        spec: TaskSpec,
        definition: Definition,
        suite: SuiteConfig,
        *,
        limit: float | None,
        split: str | None,
        style: PromptStyle,
        key: str,
        file: Path | str | None = None,
    ) -> None:
        source = load_source(spec, definition, suite, key=key, file=file)
        self.name = spec.name
        own = source.config.get("test_split") or source.config.get("validation_split")
        self.split = split or own
        place = at(file, key)
        if self.split is None:
            raise UserError(
                f"{place}task '{self.name}' has neither a test nor a validation split; name one of "
                f"{', '.join(source.data)}"
            )
        if self.split not in source.data:
            raise UserError(
                f"{place}task '{self.name}' has no data split '{self.split}'{nearest(self.split, source.data)}; "
                f"it has {', '.join(source.data)}"
            )
        self.task = build_task(source, "whole", split, file)
        self._style = style
        with quiet():
            documents = list(self.task.eval_docs)
        if limit is not None:
            documents = documents[: math.ceil(len(documents) * limit) if limit < 1 else int(limit)]
        if not documents:
            raise UserError(f"{place}task '{self.name}' has no documents in data split '{self.split}'")
        self.task.remember(documents)
        self._documents = documents
        self._asked: list[tuple[list[Any], tuple[Request, ...]]] | None = None

    def __len__(self) -> int:
        return len(self._documents)

    def prompt(self) -> str | None:
        """Return the first prompt; None for texts that are scored as a whole."""
        if self.task.OUTPUT_TYPE == "loglikelihood_rolling":
            return None
        return str(build_instances(self.task, 0, self._documents[0], self._style)[0].args[0])

    def requests(self) -> list[tuple[Request, ...]]:
        """Return what is asked of each document."""
        if self._asked is None:
            self._asked = []
            for index, document in enumerate(self._documents):
                instances = build_instances(self.task, index, document, self._style)
                requests = tuple(request_of(instance, self.name, self._style) for instance in instances)
                check_thinking(requests, self._style, self.name, "")
                self._asked.append((instances, requests))
        return [requests for _, requests in self._asked]

    def results(self, answers: Sequence[Sequence[Any]]) -> dict[tuple[str, str], list[Any]]:
        """Return (metric, filter) → what each document earned, from the answers to each document's requests.

        Raises:
            UserError: the task's own code fails.
        """
        assert self._asked is not None
        instances = [instances for instances, _ in self._asked]
        fill(self.task, self._style, zip(instances, answers, strict=True))
        return results_of(self.task, self.name, instances)
