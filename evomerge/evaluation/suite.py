"""The suite: weighted tasks, their items, and the scores that an engine's answers earn."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evomerge.errors import CandidateFailed, UserError, at, nearest
from evomerge.evaluation.blocks import cut_blocks, fixed_blocks, put_together
from evomerge.evaluation.chat import PromptStyle, check_thinking, prompt_style
from evomerge.evaluation.entries import Entry, Questions, Reply, Task, answer, ask_of, given_by, score_all
from evomerge.evaluation.guards import constant_of
from evomerge.evaluation.harness import HarnessScorer, HarnessTask
from evomerge.evaluation.items import MAPPED, RAW, SPLITS, Block, Item, ItemScore, Part, PartOutcome, Split
from evomerge.evaluation.library import Library, specs_of
from evomerge.evaluation.own import PythonTask, check_python
from evomerge.evaluation.preview import Preview
from evomerge.evaluation.requests import Engine, Request, listen, unheard
from evomerge.evaluation.screen import SUFFIX, screen_entries
from evomerge.evaluation.splits import GROUP_HELP
from evomerge.evaluation.texts import TextTask
from evomerge.suite_config import AnyTaskSpec, Splits, TaskSpec, TextSpec
from evomerge.suite_config import Suite as SuiteConfig

__all__ = ["Preview", "Suite", "SuiteTask"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SuiteTask:
    """One task of a suite.

    Attributes:
        name: as in the config; of a group's task, its own.
        metric, filter: what its fitness is, in lm-eval's words.
        weight: its weight in the fitness; of a group's task, its part of the group's.
        output_type: lm-eval's.
        higher_is_better: of the raw metric.
        counts: items per split; of splits that were not built, documents (equal but for duplicates).
    """

    name: str
    metric: str
    filter: str
    weight: float
    output_type: str
    higher_is_better: bool
    counts: Mapping[Split, int]


class Suite:
    """Items of a suite's tasks, prompts rendered: built once, it scores any number of candidates.

    Attributes:
        tasks: the tasks, in the config's order.
    """

    def __init__(
        self,
        tasks: Sequence[SuiteTask],
        entries: Mapping[Split, Sequence[Entry]],
        screen: Mapping[str, str] | None = None,
    ) -> None:
        """Keep what `build` has rendered; `screen` maps the search items that are screened to what is asked then."""
        self.tasks = tuple(tasks)
        self._screen = dict(screen or {})
        self._entries = {
            split: {entry.item.id: entry for entry in ordered} for split, ordered in entries.items()
        }
        self._known = {identity: entry for of in self._entries.values() for identity, entry in of.items()}
        self._questions: dict[str, Questions] = {}

    @classmethod
    def build(
        cls,
        config: SuiteConfig,
        splits: Splits,
        tokenizer: Any,
        *,
        splits_needed: Iterable[Split] = SPLITS,
        file: Path | str | None = None,
        tell: Callable[[str], None] = lambda task: None,
    ) -> Suite:
        """Load the tasks and render their items.

        Args:
            config: the config's suite.
            splits: where the items of tasks without their own `splits` come from.
            tokenizer: of the merged models; its chat template is used if the suite asks for one.
            splits_needed: the splits whose prompts are rendered. Groups of all three are always compared.
            file: the config file, for messages.
            tell: called with the name of each task before its prompts are rendered.

        Raises:
            UserError: a task, metric, split or setting is wrong, or runs code that is not trusted.
        """
        style = prompt_style(config, tokenizer, file)
        needed = [split for split in SPLITS if split in set(splits_needed)]
        tasks: list[SuiteTask] = []
        entries: dict[Split, list[Entry]] = {split: [] for split in needed}
        owners: dict[str, str] = {}
        for key, spec, task in _tasks_of(config, splits, tokenizer, style, file):
            _check_name(owners, spec.name, key, file)
            tell(spec.name)
            counts: dict[Split, int] = {split: len(documents) for split, documents in task.documents.items()}
            for split in needed:
                rendered = _unique(task.entries(split), spec.name, split)
                asked = (request for entry in rendered for request in entry.requests)
                check_thinking(asked, style, spec.name, at(file, key))
                entries[split] += rendered
                counts[split] = len(rendered)
            _check_disjoint(entries, spec.name, at(file, key))
            tasks.append(
                SuiteTask(
                    name=spec.name,
                    metric=task.metric.name,
                    filter=task.metric.filter,
                    weight=spec.weight,
                    output_type=task.output_type,
                    higher_is_better=task.metric.higher_is_better,
                    counts=counts,
                )
            )
        screen: dict[str, Entry] = {}
        if config.screen is not None and "search" in needed:
            screen = screen_entries(config.screen, entries["search"], at(file, "suite.screen"))
            entries["screen"] = list(screen.values())
        return cls(tasks, entries, {item: entry.item.id for item, entry in screen.items()})

    @property
    def weights(self) -> dict[str, float]:
        """Task name → weight."""
        return {task.name: task.weight for task in self.tasks}

    @property
    def units(self) -> str:
        """What reported scores of the whole suite are in: `RAW`, or `MAPPED` if less is better in some task."""
        return RAW if all(task.higher_is_better for task in self.tasks) else MAPPED

    @property
    def screen_weights(self) -> dict[str, float]:
        """Task name in the screen → weight; empty without a screen."""
        screened = {item.task for item in self.items("screen")} if self._screen else set()
        return {name + SUFFIX: weight for name, weight in self.weights.items() if name + SUFFIX in screened}

    def items(self, split: Split) -> tuple[Item, ...]:
        """Return a split's items: by task, then by id, whatever the order of the files."""
        return tuple(entry.item for entry in self._of(split).values())

    def references(self, task: str) -> list[tuple[str, str]]:
        """Return the prompt and the right answer of each search item of a task, in the items' order.

        The prompt of a text that is scored as a whole is empty. Items whose reference is no text are left out.

        Raises:
            UserError: the suite has no such task.
        """
        if task not in self.weights:
            raise UserError(
                f"space.data.texts: no task of the suite is called '{task}'{nearest(task, self.weights)}"
            )
        known = [entry.reference for entry in self._of("search").values() if entry.item.task == task]
        return [pair for pair in known if pair is not None and pair[1]]

    @property
    def unshared(self) -> frozenset[str]:
        """Tasks whose scores are not for other runs: nobody knows on what a function of the user's depends."""
        return frozenset(task.name for task in self.tasks if task.output_type == "python")

    def requests(self) -> Iterator[Request]:
        """Yield what is asked for all items that were built."""
        for entry in self._known.values():
            yield from entry.requests

    def sha256(self, split: Split) -> str:
        """Return the hash of a split's items."""
        ids = "\n".join(sorted(item.id for item in self.items(split)))
        return hashlib.sha256(ids.encode()).hexdigest()

    def blocks(self, split: Split, *, seed: int, block_items: int, packing: str) -> tuple[Block, ...]:
        """Cut a split into blocks of at most `block_items`, to be drawn; see `cut_blocks`."""
        return cut_blocks(self._by_task(split), split, seed=seed, block_items=block_items, packing=packing)

    def fixed_blocks(self, split: Split, *, packing: str) -> tuple[Block, ...]:
        """Cut a split that is asked as a whole into blocks; see `evomerge.evaluation.blocks.fixed_blocks`."""
        return fixed_blocks(self._by_task(split), split, packing=packing)

    def score_part(
        self,
        engine: Engine,
        part: Part,
        tell: Callable[[int], None] = unheard,
        keep: Callable[[Sequence[Reply]], object] = lambda replies: None,
    ) -> PartOutcome:
        """Score a part's items with the weights that the engine holds now.

        A candidate that cannot be scored (a logit, log-probability or metric is not finite) is an outcome too.

        Args:
            engine: answers the requests.
            part: of this suite's items.
            tell: called now and then with about how many of the items are answered.
            keep: called with what was answered.
        """
        questions = self._asked(part)
        total = sum(map(len, questions.asked.values()))
        answered = 0

        def count(more: int) -> None:
            nonlocal answered
            answered += more
            # An engine may count windows of a text; nothing is done before it is scored.
            tell(min(len(part.items) - 1, len(part.items) * answered // max(1, total)))

        try:
            with listen(engine, count if total else unheard):
                replies = answer(engine, questions)
            keep(replies)
            given = given_by(questions, replies).values()
            scores = score_all(engine, questions, replies)
        except CandidateFailed as reason:
            return PartOutcome(failure=str(reason))
        return PartOutcome(
            scores=tuple(
                ItemScore(reply.entry.item.id, reply.entry.item.task, raw, value, reply.truncated)
                for reply, (raw, value) in zip(replies, scores, strict=True)
            ),
            constant=next((constant_of(answers) for answers in given), None),
        )

    def harness(self, task: str) -> HarnessScorer | None:
        """Return the scorer of a task that lm-eval scores; None for others."""
        entries = (entry for entry in self._known.values() if entry.item.task == task)
        scorer = next(entries).scorer
        return scorer if isinstance(scorer, HarnessScorer) else None

    def results(
        self, engine: Engine, part: Part, replies: Sequence[Reply] = ()
    ) -> dict[tuple[str, str], list[Any]]:
        """Return (metric, filter) → what each item of a part earned, of all metrics of a task that lm-eval scores.

        Args:
            engine: answers the requests.
            part: of this suite's items.
            replies: to them, where `score_part` has them already.

        Raises:
            CandidateFailed: a log-probability or a logit is not finite.
        """
        scorer = self.harness(part.task)
        return {} if scorer is None else scorer.results(replies or answer(engine, self._asked(part)))

    def screen_blocks(self, search: Iterable[Block]) -> tuple[Block, ...]:
        """Return what the screen asks in place of each search block that has screened items, under its index."""
        blocks = []
        for block in search:
            parts = []
            for part in block.parts:
                items = tuple(self._screen[item] for item in part.items if item in self._screen)
                if items:
                    parts.append(Part(part.task + SUFFIX, items, part.packing))
            if parts:
                blocks.append(Block("screen", block.index, tuple(parts)))
        return tuple(blocks)

    def score(self, engine: Engine, block: Block, *, check_degenerate: bool = True) -> tuple[ItemScore, ...]:
        """Score a block's items with the weights that the engine holds now.

        Args:
            engine: answers the requests.
            block: of this suite's items.
            check_degenerate: fail a candidate whose answers do not depend on the items (see `guards`).
                Turn it off for baselines, whose low scores are wanted too.

        Returns:
            One score per item, in the block's order.

        Raises:
            CandidateFailed: a logit, log-probability or metric is not finite, or answers are degenerate.
        """
        outcomes: list[PartOutcome] = []
        for part in block.parts:
            outcomes.append(self.score_part(engine, part))
            if outcomes[-1].failure is not None:
                break
        return put_together(block, outcomes, check_degenerate=check_degenerate)

    def preview(self, engine: Engine, item: Item | str) -> Preview:
        """Ask one item, given by itself or by its id, and show prompt, answer and what was made of it.

        Raises:
            CandidateFailed: as `score`.
        """
        entry = self._find(item)
        (reply,) = answer(engine, ask_of([entry]))
        return entry.scorer.preview(reply, engine)

    def _by_task(self, split: Split) -> dict[str, list[str]]:
        items = self.items(split)
        return {task.name: [item.id for item in items if item.task == task.name] for task in self.tasks}

    def _asked(self, part: Part) -> Questions:
        if part.hash not in self._questions:
            known = self._known
            missing = [item for item in part.items if item not in known]
            if missing:
                raise UserError(
                    f"{len(missing)} of {len(part.items)} items of a part of task '{part.task}' are not in the suite: "
                    f"task files or data have changed since the block was cut"
                )
            self._questions[part.hash] = ask_of(known[item] for item in part.items)
        return self._questions[part.hash]

    def _of(self, split: Split) -> dict[str, Entry]:
        if split not in self._entries:
            raise ValueError(f"the suite was built without its {split} items (splits_needed)")
        return self._entries[split]

    def _find(self, item: Item | str) -> Entry:
        identity = item if isinstance(item, str) else item.id
        if identity not in self._known:
            raise ValueError(f"the suite has no item {identity}")
        return self._known[identity]


def _tasks_of(
    config: SuiteConfig,
    splits: Splits,
    tokenizer: Any,
    style: PromptStyle,
    file: Path | str | None,
) -> Iterator[tuple[str, AnyTaskSpec, Task]]:
    """Yield each task with its entry and the key of that."""
    library = Library(config.include, file)
    for number, spec in enumerate(config.tasks):
        key = f"suite.tasks.{number}"
        if isinstance(spec, TaskSpec):
            for member, task in _harness_tasks(spec, library, config, splits, style, key, file):
                yield key, member, task
        elif isinstance(spec, TextSpec):
            yield key, spec, TextTask(spec, splits, place=at(file, key))
        else:
            check_python(spec, trusted=config.trust_task_code, file=file)
            yield key, spec, PythonTask(spec, splits, tokenizer, place=at(file, key))


def _harness_tasks(
    spec: TaskSpec,
    library: Library,
    config: SuiteConfig,
    splits: Splits,
    style: PromptStyle,
    key: str,
    file: Path | str | None,
) -> Iterator[tuple[TaskSpec, Task]]:
    """Yield the tasks that an entry stands for; those of a group share its weight."""
    expansion = library.expand(spec.task, key=f"{key}.task")
    specs = specs_of(spec, expansion)
    tasks = [
        HarnessTask(member, definition, config, splits, style, key=key, file=file)
        for member, definition in zip(specs, expansion.definitions, strict=True)
    ]
    aggregate = expansion.aggregate(spec.metric)
    by_size = aggregate is not None and aggregate.by_size
    sizes = [sum(map(len, task.documents.values())) if by_size else 1 for task in tasks]
    for member, task, size in zip(specs, tasks, sizes, strict=True):
        yield member.model_copy(update={"weight": spec.weight * size / sum(sizes)}), task


def first_prompt(
    config: SuiteConfig, splits: Splits, tokenizer: Any, style: PromptStyle, file: Path | str | None
) -> str | None:
    """Return the first prompt of a suite's first task that has prompts."""
    for _, _, task in _tasks_of(config, splits, tokenizer, style, file):
        if isinstance(task, HarnessTask) and (prompt := task.prompt()) is not None:
            return prompt
    return None


def _check_name(owners: dict[str, str], name: str, key: str, file: Path | str | None) -> None:
    if name in owners:
        raise UserError(
            f"{at(file, key)}the task '{name}' is already in the suite by {owners[name]}; take one of them out, "
            "or give this one another metric and a name"
        )
    owners[name] = key


def _unique(entries: Sequence[Entry], task: str, split: Split) -> list[Entry]:
    """Return the entries of one task and split, sorted by id; equal ones are kept once."""
    unique: dict[str, Entry] = {}
    for entry in entries:
        unique.setdefault(entry.item.id, entry)
    twice = len(entries) - len(unique)
    if twice:
        log.warning("task '%s': %d duplicates among its %s items are counted once", task, twice, split)
    return [unique[identity] for identity in sorted(unique)]


def _check_disjoint(entries: Mapping[Split, Sequence[Entry]], task: str, place: str) -> None:
    """Refuse items that a task has in two splits, or shares with an earlier task."""
    owner: dict[str, Item] = {}
    shared = 0
    for split, ordered in entries.items():
        for entry in ordered:
            other = owner.setdefault(entry.item.id, entry.item)
            if entry.item.task == task and other.task != task:
                raise UserError(
                    f"{place}task '{task}' asks and scores the very items of '{other.task}'; take one of them out, "
                    "and give the other their weights together"
                )
            shared += entry.item.task == task and other.split != split
    if shared:
        raise UserError(
            f"{place}task '{task}': {shared} items are in two splits; take them out of one file ({GROUP_HELP})"
        )
