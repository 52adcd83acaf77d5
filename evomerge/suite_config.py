"""The config's `suite` and `splits`: what is scored, and which items are for what."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, field_validator, model_validator

from evomerge.errors import nearest
from evomerge.recipe import expand_home
from evomerge.schema import Auto, Frozen, Number, Positive, Whole, from_text, shown


class SplitFractions(Frozen):
    """Shares of one data split, assigned by hash of each item's group."""

    search: Annotated[Number, Field(gt=0, lt=1)] = 0.6
    validation: Annotated[Number, Field(gt=0, lt=1)] = 0.2
    test: Annotated[Number, Field(gt=0, lt=1)] = 0.2

    @model_validator(mode="after")
    def _sum(self) -> SplitFractions:
        total = self.search + self.validation + self.test
        if abs(total - 1) > 1e-6:
            raise ValueError(
                f"search {self.search:g}, validation {self.validation:g} and test {self.test:g} "
                f"add up to {total:g}, not to 1"
            )
        return self


class Splits(Frozen):
    """Where search, validation and test items come from.

    Either three data splits of the task by name, or one (`from`) cut by hash into `fractions`.
    """

    search: str | None = None
    validation: str | None = None
    test: str | None = None
    from_: str | None = Field(default=None, alias="from")
    fractions: SplitFractions = SplitFractions()

    @model_validator(mode="after")
    def _one_form(self) -> Splits:
        named = [self.search, self.validation, self.test]
        if self.from_ is None:
            for key, name in zip(("search", "validation", "test"), named, strict=True):
                if name is None:
                    raise ValueError(f"'{key}' is missing; name three data splits, or give 'from' to cut one")
            if len(set(named)) < 3:
                raise ValueError(
                    f"{shown(named)} is not accepted: search, validation and test must be three different data splits; "
                    "give 'from' to cut one"
                )
            if self.fractions != SplitFractions():
                raise ValueError(
                    "fractions: they cut the data split that 'from' names; give 'from', or leave them out"
                )
        elif any(name is not None for name in named):
            raise ValueError("'from' takes the place of search, validation and test; give one or the other")
        return self


class TaskSpec(Frozen):
    """One task of the suite, as lm-eval knows it.

    Attributes:
        task: lm-eval's name of it, or of a group or tag, whose tasks share metric, weight and all else that is
            said here; or the path of a task's YAML.
        name: what results call it; by default the task's name, and with the metric where the suite lists the
            task more than once.
        metric: ``auto`` (the task's first), a metric, or ``metric,filter``.
        direction: whether the metric is to grow or to shrink, where the task's definition is silent or wrong.
        weight: its weight in the fitness.
        splits: where its items come from, if not from where those of the other tasks do.
        group: field of the documents that marks equal questions.
        limit: the most items of each split.
        num_fewshot, gen_kwargs: as lm-eval's.
    """

    task: str
    name: Annotated[str, Field(min_length=1)]
    metric: str = "auto"
    direction: Literal["maximize", "minimize"] | None = None
    weight: Annotated[Number, Field(gt=0)] = 1.0
    splits: Splits | None = None
    group: str | None = None
    limit: Positive | None = None
    num_fewshot: Annotated[Whole, Field(ge=0)] | None = None
    gen_kwargs: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, data: Any) -> Any:
        data = from_text(cls, data, "task", "a task's name or {task: ..., metric: ...}")
        if isinstance(data, dict) and "task" in data and data.get("name") is None:
            return {**data, "name": data["task"]}
        return data

    def placed(self, folder: Path) -> TaskSpec:
        """Return the entry with a task's path made absolute: it is relative to the folder."""
        if not self.task.startswith((".", "/", "~")):
            return self
        path = str((folder / expand_home(self.task)).resolve())
        name = path + self.name.removeprefix(self.task) if self.name.startswith(self.task) else self.name
        return self.model_copy(update={"task": path, "name": name})


FileList = Annotated[
    tuple[Annotated[str, Field(min_length=1)], ...],
    BeforeValidator(lambda data: [data] if isinstance(data, str) else data),
    Field(min_length=1),
]
"""A file, a pattern such as ``./texts/*.txt``, or a list of these."""


class FilesOfSplits(Frozen):
    """The files of each split."""

    search: FileList
    validation: FileList
    test: FileList


ItemFiles = FilesOfSplits | FileList
"""Files whose items are cut into splits by hash, or those of each split."""


class FileSpec(Frozen):
    """What a task of the suite whose items are files of the user's can say of itself.

    Attributes:
        name: what results call it.
        weight: its weight in the fitness.
        limit: the most items of each split.
        fractions: how items that are not in three files are cut into splits; by default as `splits.fractions`.
    """

    name: Annotated[str, Field(min_length=1)]
    weight: Annotated[Number, Field(gt=0)] = 1.0
    limit: Positive | None = None
    fractions: SplitFractions | None = None

    @model_validator(mode="before")
    @classmethod
    def _default_name(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("name") is None:
            return {**data, "name": cls._name_from(data)}
        return data

    @classmethod
    @abstractmethod
    def _name_from(cls, data: dict[str, Any]) -> str:
        """Return the name of an entry, as given, that has none."""


class TextSpec(FileSpec):
    """Texts of the user's own as a task: how well the model predicts them.

    Attributes:
        text: plain text files, or JSONL files with one document a row.
        field: of a JSONL row: holds the text; by default ``text``.
        unit: what a document of a plain text file is; by default a paragraph.
        metric: as of lm-eval's `loglikelihood_rolling` tasks.
    """

    text: ItemFiles
    field: str | None = None
    unit: Literal["paragraph", "line", "file"] | None = None
    metric: Literal["bits_per_byte", "byte_perplexity", "word_perplexity"] = "bits_per_byte"

    @classmethod
    def _name_from(cls, data: dict[str, Any]) -> str:
        return _stem(data.get("text")) or "text"

    @model_validator(mode="after")
    def _cut_or_not(self) -> TextSpec:
        _refuse_fractions(self.text, self.fractions)
        return self

    def placed(self, folder: Path) -> TextSpec:
        """Return the entry with its files' paths made absolute: they are relative to the folder."""
        return self.model_copy(update={"text": _placed(self.text, folder)})


class PythonSpec(FileSpec):
    """Scoring by the user's own function.

    Attributes:
        python: ``module:function``; the module is looked for in `folder` first.
        items: JSONL files, one item a row.
        group: field of the rows; rows that share its value never fall into different splits.
        folder: where the module is; by default that of the config.
    """

    python: Annotated[str, Field(min_length=1)]
    items: ItemFiles
    group: str | None = None
    folder: str = "."

    @classmethod
    def _name_from(cls, data: dict[str, Any]) -> str:
        return str(data.get("python")).rpartition(":")[2] or "python"

    @field_validator("python")
    @classmethod
    def _module_and_function(cls, text: str) -> str:
        if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", text):
            raise ValueError(
                f"{shown(text)} is not accepted: write module:function, e.g. scoring:score for the function score "
                "of the file scoring.py beside the config"
            )
        return text

    @model_validator(mode="after")
    def _cut_or_not(self) -> PythonSpec:
        _refuse_fractions(self.items, self.fractions)
        return self

    def placed(self, folder: Path) -> PythonSpec:
        """Return the entry with its paths made absolute: they are relative to the folder."""
        own = str((folder / expand_home(self.folder)).resolve())
        return self.model_copy(update={"items": _placed(self.items, folder), "folder": own})


def _stem(files: Any) -> str:
    """Return the name of the first file without its ending."""
    first = next(iter(files.values()), None) if isinstance(files, dict) else files
    first = first[0] if isinstance(first, list | tuple) and first else first
    return Path(first).stem.strip("*") if isinstance(first, str) else ""


def _refuse_fractions(files: FilesOfSplits | tuple[str, ...], fractions: SplitFractions | None) -> None:
    if fractions is not None and isinstance(files, FilesOfSplits):
        raise ValueError(
            "fractions: they cut files into splits, but each split has files of its own; leave them out"
        )


def _placed(files: FilesOfSplits | tuple[str, ...], folder: Path) -> FilesOfSplits | tuple[str, ...]:
    def place(paths: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(str((folder / expand_home(path)).resolve()) for path in paths)

    if isinstance(files, tuple):
        return place(files)
    return FilesOfSplits(
        search=place(files.search), validation=place(files.validation), test=place(files.test)
    )


_KINDS: dict[str, type[TaskSpec | TextSpec | PythonSpec]] = {
    "task": TaskSpec,
    "text": TextSpec,
    "python": PythonSpec,
}


def _one_kind(entry: Any) -> Any:
    if not isinstance(entry, dict):
        return entry
    kinds = [key for key in _KINDS if key in entry]
    if len(kinds) > 1:
        raise ValueError(f"has both '{kinds[0]}' and '{kinds[1]}'; a task is one of task, text, python")
    known = {name for kind in _KINDS.values() for name in kind.model_fields}
    for key in entry:
        if not kinds and key not in known and nearest(str(key), _KINDS):
            raise ValueError(f"unknown key '{key}'{nearest(str(key), _KINDS)}")
    return entry


def _kind(entry: Any) -> str:
    if isinstance(entry, dict):
        return next((kind.__name__ for key, kind in _KINDS.items() if key in entry), "TaskSpec")
    return type(entry).__name__ if type(entry) in _KINDS.values() else "TaskSpec"


AnyTaskSpec = Annotated[
    Annotated[TaskSpec, Tag("TaskSpec")]
    | Annotated[TextSpec, Tag("TextSpec")]
    | Annotated[PythonSpec, Tag("PythonSpec")],
    Discriminator(_kind),
    BeforeValidator(_one_kind),
]


class Screen(Frozen):
    """A cheap first look at every candidate of a generation; only the best of them answer the full suite.

    Attributes:
        metric: the probability of the right answers, as for a task.
        tasks: whose items are asked, by the names that results call them; by default all with reference answers.
        keep: share of a generation that answers the full suite.
    """

    metric: Literal["gold_nll", "gold_bits_per_byte"] = "gold_bits_per_byte"
    tasks: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    keep: Annotated[Number, Field(gt=0, le=1)] = 0.5


class Suite(Frozen):
    """What is scored: weighted tasks.

    Attributes:
        include: folders of lm-eval task YAMLs.
        tasks: the tasks.
        items_per_candidate: search items that each candidate of a generation answers.
        block_items: items per block, over all tasks.
        chat_template: whether prompts go through the tokenizer's chat template, or through which of several. It
            must be written where one of the models has one.
        chat_template_args: what the template is given besides the messages, e.g. ``enable_thinking``.
        system_instruction: put before each task's description.
        fewshot_as_multiturn: whether few-shot examples are turns of their own in a chat (by default they are).
        think_end_token: what ends an answer's thinking; the answer is what follows it.
        screen: a cheap first look at each candidate of a search; none by default.
        trust_task_code: allow `python` entries, and task YAMLs outside lm-eval's package, to call Python.
        allow_code_execution: allow tasks that execute generated code.
    """

    include: tuple[str, ...] = ()
    tasks: tuple[AnyTaskSpec, ...] = Field(min_length=1)
    items_per_candidate: Auto | Positive = "auto"
    block_items: Auto | Positive = "auto"
    chat_template: bool | Annotated[str, Field(min_length=1)] | None = None
    chat_template_args: dict[str, Any] = Field(default_factory=dict)
    system_instruction: Annotated[str, Field(min_length=1)] | None = None
    fewshot_as_multiturn: bool | None = None
    think_end_token: Annotated[str, Field(min_length=1)] | None = None
    screen: Screen | None = None
    trust_task_code: bool = False
    allow_code_execution: bool = False

    @field_validator("tasks")
    @classmethod
    def _unique(cls, tasks: tuple[AnyTaskSpec, ...]) -> tuple[AnyTaskSpec, ...]:
        """Let a task that is listed with several metrics be called by task and metric."""
        names = Counter(task.name for task in tasks)
        named = tuple(
            task.model_copy(update={"name": f"{task.task}:{task.metric}"})
            if isinstance(task, TaskSpec) and names[task.name] > 1 and task.name == task.task
            else task
            for task in tasks
        )
        for name, count in Counter(task.name for task in named).items():
            if count > 1:
                raise ValueError(f"two tasks are called '{name}'; give one of them another metric or name")
        return named
