"""Which documents of a task are search, validation and test items."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evomerge.errors import UserError, at, nearest
from evomerge.evaluation.data import quiet
from evomerge.evaluation.items import SPLITS, Split
from evomerge.evaluation.tasks import TaskSource, build_task
from evomerge.suite_config import SplitFractions, Splits

GROUP_HELP = (
    "items of one group ask the same question; the task's `group` names a field that tells them apart"
)


def share_of(group: str, fractions: SplitFractions) -> Split:
    """Return the split of a group: a hash of the group alone decides, so equal questions stay together."""
    place = uniform("split", group)
    if place < fractions.search:
        return "search"
    return "validation" if place < fractions.search + fractions.validation else "test"


def group_of(task: Any, doc: Mapping[str, Any], field: str | None) -> str:
    """Return what marks a document as the same question as another.

    It is the document's `field`, or the normalised rendered question (lower case, single spaces); the
    choices or the target where the task has no question.
    """
    if field is not None:
        return str(doc[field])
    text = task.doc_to_text(doc)
    if not isinstance(text, str) or not text.strip():
        text = task.doc_to_choice(doc) if task.config.doc_to_choice is not None else task.doc_to_target(doc)
    text = " ".join(map(str, text)) if isinstance(text, list | tuple) else str(text)
    return normalised(text)


def normalised(text: str) -> str:
    """Return a text in lower case with single spaces, so that trivial variants count as one."""
    return " ".join(text.lower().split())


class TaskSplits:
    """A task's documents in their splits, before any prompt is built.

    Attributes:
        source: the task and its data.
        tasks: the lm-eval task of each split.
        documents: split → (index in its data split, document), in file order, after `limit`.
        groups: split → the groups of its documents.

    Raises:
        UserError: a data split or the group's field does not exist, a split is empty, two splits or the
            few-shot examples share groups.
    """

    def __init__(self, source: TaskSource, splits: Splits, file: Path | str | None) -> None:
        self.source = source
        self._file = file
        spec = source.spec
        splits = spec.splits or splits
        self.tasks: dict[Split, Any] = {}
        self.documents: dict[Split, list[tuple[int, Any]]] = {}
        self.groups: dict[Split, set[str]] = {}
        marked_of: dict[str, list[tuple[str, int, Any]]] = {}
        for split in SPLITS:
            data_split = splits.from_ or getattr(splits, split)
            self._check_data_split(data_split)
            task = build_task(source, split, data_split, file)
            if data_split not in marked_of:
                marked_of[data_split] = self._marked(task)
            marked = marked_of[data_split]
            if splits.from_ is not None:
                marked = [entry for entry in marked if share_of(entry[0], splits.fractions) == split]
            if spec.limit is not None:
                marked = sorted(sorted(marked, key=_draw)[: spec.limit], key=lambda entry: entry[1])
            if not marked:
                raise UserError(
                    f"{self._at('splits')}task '{spec.task}' has no {split} items in data split '{data_split}'"
                )
            self.tasks[split] = task
            self.documents[split] = [(index, doc) for _, index, doc in marked]
            self.groups[split] = {group for group, _, _ in marked}
        self._check_disjoint()
        self._check_fewshot(
            {splits.from_} if splits.from_ else {splits.search, splits.validation, splits.test}
        )

    def _at(self, key: str) -> str:
        return at(self._file, f"{self.source.key}.{key}")

    def _check_data_split(self, data_split: str) -> None:
        known = list(self.source.data)
        if data_split not in known:
            raise UserError(
                f"{self._at('splits')}task '{self.source.spec.task}' has no data split '{data_split}'"
                f"{nearest(data_split, known)}; it has {', '.join(known)}"
            )
        if len(self.source.data[data_split]) == 0:
            raise UserError(
                f"{self._at('splits')}data split '{data_split}' of task '{self.source.spec.task}' is empty"
            )

    def _marked(self, task: Any) -> list[tuple[str, int, Any]]:
        """Return (group, index, document) for each document of the task, in file order."""
        field = self.source.spec.group
        with quiet():
            documents = list(task.eval_docs)
        task.remember(documents)
        if field is not None and documents and field not in documents[0]:
            fields = list(documents[0])
            raise UserError(
                f"{self._at('group')}documents of '{self.source.spec.task}' have no field '{field}'"
                f"{nearest(field, fields)}; they have {', '.join(fields)}"
            )
        return [(group_of(task, doc, field), index, doc) for index, doc in enumerate(documents)]

    def _check_disjoint(self) -> None:
        for first, second in (("search", "validation"), ("search", "test"), ("validation", "test")):
            shared = self.groups[first] & self.groups[second]  # type: ignore[index]
            if shared:
                raise UserError(
                    f"{self._at('splits')}task '{self.source.spec.task}': {len(shared)} of "
                    f"{len(self.groups[second])} {second} groups are {first} groups too, e.g. "  # type: ignore[index]
                    f"{min(shared)!r:.80}; take them out of one file ({GROUP_HELP})"
                )

    def _check_fewshot(self, used: set[str | None]) -> None:
        """Few-shot examples come from outside all three splits."""
        task = self.tasks["search"]
        shots = task.config.num_fewshot or 0
        if not shots:
            return
        name = self.source.spec.task
        origin = _fewshot_origin(task)
        if origin in used:
            raise UserError(
                f"{self._at('num_fewshot')}the few-shot examples of task '{name}' come from the data split "
                f"'{origin}', which holds items; name another one with fewshot_split in {self.source.path}"
            )
        pool = task.sampler.fewshot_docs()
        if len(pool) < shots:
            raise UserError(
                f"{self._at('num_fewshot')}task '{name}' has only {len(pool)} few-shot examples, not {shots}"
            )
        if task.fewshot_cfg.sampler == "first_n":
            pool = pool[:shots]
        field = self.source.spec.group
        if field is not None and any(field not in doc for doc in pool):
            field = None
        examples = {group_of(task, doc, field) for doc in pool}
        if field is not None or self.source.spec.group is None:
            shared = examples & {group for groups in self.groups.values() for group in groups}
        else:
            items = [doc for documents in self.documents.values() for _, doc in documents]
            shared = examples & {group_of(task, doc, None) for doc in items}
        if shared:
            raise UserError(
                f"{self._at('num_fewshot')}task '{name}': {len(shared)} few-shot examples are items too, e.g. "
                f"{min(shared)!r:.80}; take them out of the few-shot examples ({GROUP_HELP})"
            )


def _fewshot_origin(task: Any) -> str | None:
    """Return the data split of the few-shot examples; None if the YAML lists them."""
    config = task.fewshot_cfg
    if config.split is not None:
        return str(config.split)
    if config.samples is not None:
        return None
    for split in (task.config.training_split, task.config.validation_split, task.config.test_split):
        if split is not None:
            return str(split)
    return None


def _draw(entry: tuple[str, int, Any]) -> tuple[float, str]:
    """Order documents by hash, groups together: what `limit` keeps does not depend on the file's order."""
    group, _, doc = entry
    return uniform("limit", group), json.dumps(doc, sort_keys=True, default=str)


def uniform(purpose: str, text: str) -> float:
    """Return a number in [0, 1) that depends on purpose and text alone."""
    digest = hashlib.sha256(f"{purpose}\x1f{text}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
