"""The search config: one YAML file, one schema."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, field_validator, model_validator

from evomerge.errors import UserError, in_file, nearest
from evomerge.layers_config import MERGED, LayerSpace
from evomerge.methods.registry import get_method
from evomerge.output import BASE, Output
from evomerge.overrides import overridden
from evomerge.recipe import expand_home, resolve_output, resolve_source
from evomerge.schema import Frozen, Number, Positive, Whole, dump_yaml, read_yaml, shown, validate
from evomerge.space_config import Space

Auto = Literal["auto"]

RESERVED = ("base", "initial", "uniform", "merge", MERGED, "expert", "shared")
"""Names that an expert cannot have: those of baselines and merges, and the words of `per`."""


SMALLEST_POPULATION = 4
"""Below it an evolution strategy has no half of a generation to learn from."""


class ModelRef(Frozen):
    """A checkpoint: a folder or hub id, optionally at a revision or with a LoRA adapter.

    An expert may also be an adapter alone (`path`); it then lies on the base.
    """

    path: Annotated[str, Field(min_length=1)]
    revision: str | None = None
    adapter: Annotated[str, Field(min_length=1)] | None = None
    adapter_revision: str | None = None
    trust_remote_code: bool = False

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, data: Any) -> Any:
        if not isinstance(data, str | dict | ModelRef):
            raise ValueError(
                f"{shown(data)} is not accepted: give a folder, a hub id or {{path: ..., revision: ...}}"
            )
        return {"path": data} if isinstance(data, str) else data


class Models(Frozen):
    """The common ancestor and the fine-tunes to merge, by name."""

    base: ModelRef
    experts: dict[str, ModelRef] = Field(min_length=1)

    @field_validator("experts", mode="before")
    @classmethod
    def _names_from_paths(cls, data: Any) -> Any:
        if not isinstance(data, list):
            return data
        named: dict[str, Any] = {}
        for entry in data:
            path = entry.get("path") if isinstance(entry, dict) else entry
            name = Path(path).name if isinstance(path, str) else ""
            if name in ("", ".."):
                raise ValueError(
                    f"{shown(entry)} gives the expert no name; write a mapping of names to models"
                )
            if name in named:
                raise ValueError(f"two experts are called '{name}'; write a mapping of names to models")
            named[name] = entry
        return named

    @field_validator("experts")
    @classmethod
    def _reserved(cls, experts: dict[str, ModelRef]) -> dict[str, ModelRef]:
        for name in experts:
            if name in RESERVED:
                raise ValueError(f"'{name}' is a reserved name; call the expert something else")
        return experts


class OptimizerConfig(Frozen):
    """The optimiser. `sigma` (cma, catcma) is the first step's standard deviation in [0, 1] of each range.

    A search over layer paths has `edits` by default, or with indicators `catcma`.
    """

    type: Literal["cma", "catcma", "edits", "tpe", "random"] = "cma"
    sigma: Annotated[Number, Field(gt=0, le=1)] = 0.2
    population: Auto | Positive = "auto"

    @model_validator(mode="after")
    def _enough_to_rank(self) -> OptimizerConfig:
        ranks = self.type in ("cma", "catcma", "edits")
        if ranks and self.population != "auto" and self.population < SMALLEST_POPULATION:
            raise ValueError(
                f"population: {self.population} is too small; {self.type} needs {SMALLEST_POPULATION} or more"
            )
        return self


class Budget(Frozen):
    """When the search ends: whichever ceiling is reached first."""

    candidates: Positive | None = None
    item_evaluations: Positive | None = None
    hours: Annotated[Number, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _some(self) -> Budget:
        if self.candidates is None and self.item_evaluations is None and self.hours is None:
            raise ValueError("is empty; give at least one of candidates, item_evaluations, hours")
        return self


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
        if not isinstance(data, str | dict | TaskSpec):
            raise ValueError(
                f"{shown(data)} is not accepted: give a task's name or {{task: ..., metric: ...}}"
            )
        data = {"task": data} if isinstance(data, str) else data
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
    def _name_from(cls, data: dict[str, Any]) -> Any:
        raise NotImplementedError


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


class Engine(Frozen):
    """How candidates are run.

    Attributes:
        type: transformers in the worker's process, or vLLM.
        device: where the model is.
        dtype: number format of the live model; that of `output`, since what is scored is what is exported.
        batch_tokens: token budget of one forward pass.
        max_length: longest input, in tokens; the model's own length by default.
        options: of vLLM's engine arguments, those that are not decided by the rest of the config.
    """

    type: Literal["hf", "vllm"] = "hf"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    batch_tokens: Auto | Positive = "auto"
    max_length: Positive | None = None
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _options_of_vllm(self) -> Engine:
        if self.options and self.type != "vllm":
            raise ValueError(
                f"options: {shown(next(iter(self.options)))} is for vLLM; write type: vllm, or leave it out"
            )
        return self


class OutputConfig(Output):
    """What the merged model looks like, as in a recipe; by default number format and tokenizer of the base."""

    @property
    def form(self) -> Output:
        """The output of every recipe of the search. Another tokenizer brings its own chat template."""
        template = "base" if self.tokenizer is None else None
        return Output(
            dtype=self.dtype,
            tokenizer=self.tokenizer or "base",
            chat_template=self.chat_template or template,
        )


class Workers(Frozen):
    """Who does the work: Ray actors (local or of a cluster at `address`), or this process."""

    type: Literal["ray", "local"] = "ray"
    count: Auto | Positive = "auto"
    cpus: Annotated[Number, Field(gt=0)] = 1
    gpus: Auto | Annotated[Number, Field(ge=0)] = "auto"
    address: str | None = None


class Cache(Frozen):
    """What runs share.

    Attributes:
        scores: whether scores are kept for other runs and taken from them: true (in the user's cache folder),
            false, or a folder.
    """

    scores: bool | Annotated[str, Field(min_length=1)] = True


SPACES = {"coefficients": Space, "layers": LayerSpace}
"""The kinds of search space, by `type`."""


def _kind_of_space(space: Any) -> str:
    kind = space.get("type") if isinstance(space, dict) else getattr(space, "type", None)
    return SPACES.get(kind if isinstance(kind, str) else "", Space).__name__


AnySpace = Annotated[
    Annotated[Space, Tag("Space")] | Annotated[LayerSpace, Tag("LayerSpace")],
    Discriminator(_kind_of_space),
]


class Config(Frozen):
    """A complete search."""

    version: Literal[1] = 1
    name: str = "search"
    models: Models
    space: AnySpace
    optimizer: OptimizerConfig = OptimizerConfig()
    budget: Budget
    suite: Suite
    splits: Splits = Splits(search="search", validation="validation", test="test")
    engine: Engine = Engine()
    output: OutputConfig = OutputConfig()
    workers: Workers = Workers()
    cache: Cache = Cache()
    seed: Annotated[Whole, Field(ge=0)] = 0

    @field_validator("name")
    @classmethod
    def _name_of_a_folder(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise ValueError(
                f"'{name}' is not accepted: it names the run's folder; use letters, digits, '.', '_' and '-', "
                "and begin with a letter or digit"
            )
        return name

    @model_validator(mode="before")
    @classmethod
    def _optimizer_of_space(cls, data: Any) -> Any:
        """Let the kind of space choose the optimiser, where nobody has."""
        space = data.get("space") if isinstance(data, dict) else None
        if not isinstance(space, dict):
            return data
        kind = space.get("type", "coefficients")
        if not isinstance(kind, str) or kind not in SPACES:
            hint = nearest(str(kind), SPACES)
            raise ValueError(f"space.type: {shown(kind)} is not accepted: give {' or '.join(SPACES)}{hint}")
        optimizer = data.get("optimizer", {})
        if kind == "coefficients" or not isinstance(optimizer, dict) or "type" in optimizer:
            return data
        best = "catcma" if space.get("genome") == "indicators" else "edits"
        return {**data, "optimizer": {"type": best, **optimizer}}

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        self.output.check(("base", *self.models.experts))
        if self.engine.dtype != "auto" and self.output.dtype not in (None, self.engine.dtype):
            raise ValueError(
                f"engine.dtype: {self.engine.dtype}, but output.dtype is {self.output.dtype}; what is scored is what "
                "is exported: give one of them only, or the same for both"
            )
        if isinstance(self.space, LayerSpace):
            self._check_layers(self.space)
        else:
            self._check_coefficients(self.space)
        return self

    def _check_layers(self, space: LayerSpace) -> None:
        names = ("base", *self.models.experts)
        for name in space.pool:
            if name not in names:
                raise ValueError(
                    f"space.pool: no model is called '{name}'{nearest(name, names)}; give names out of "
                    f"{', '.join(names)}"
                )
        if self.optimizer.type == "tpe":
            raise ValueError(
                "optimizer.type: tpe is not accepted: it starts anywhere in the space, where no path is a working "
                "model; use edits or catcma"
            )
        if self.optimizer.type == "cma" and space.genome != "indicators":
            raise ValueError("optimizer.type: cma searches paths as indicators; set space.genome: indicators")

    def _check_coefficients(self, space: Space) -> None:
        method = get_method(space.method)
        try:
            base = "base" if space.base else None
            method.check_inputs(base, tuple(self.models.experts), "space.method", space.dialect)
        except ValueError as error:
            raise ValueError(f"{error}; models.experts lists {', '.join(self.models.experts)}") from None
        if space.data is not None:
            try:
                space.data.check_inputs(tuple(self.models.experts))
            except ValueError as error:
                raise ValueError(f"space.data.{error}") from None
        for name, specs in space.parameters.items():
            for spec in specs:
                if spec.per not in (None, "expert", "shared", *self.models.experts):
                    raise ValueError(
                        f"space.parameters.{name}.per: '{spec.per}' is neither expert, shared nor an expert's name"
                        f"{nearest(str(spec.per), self.models.experts)}"
                    )
        for parameter in method.parameters_in(space.dialect):
            if parameter.default_in(space.dialect) is None and parameter.name not in space.parameters:
                raise ValueError(f"space.parameters: {method.name} needs '{parameter.name}'")
        if not any(spec.searched for specs in space.parameters.values() for spec in specs):
            raise ValueError(
                "space.parameters: nothing is searched; give at least one parameter a range, "
                "or use 'evomerge merge' for a fixed recipe"
            )
        if self.optimizer.type == "edits":
            raise ValueError("optimizer.type: edits changes layer paths; use cma, catcma, tpe or random")
        if self.optimizer.type == "cma":
            for name, specs in space.parameters.items():
                if any(spec.choices is not None for spec in specs):
                    raise ValueError(
                        f"space.parameters.{name}: choices need optimizer.type catcma, tpe or random; "
                        "cma searches numbers"
                    )

    @property
    def coefficients(self) -> Space | None:
        """The space of merge coefficients, if that is what is searched."""
        return self.space if isinstance(self.space, Space) else None

    @property
    def layers(self) -> LayerSpace | None:
        """The space of layer paths, if that is what is searched."""
        return self.space if isinstance(self.space, LayerSpace) else None

    @property
    def form(self) -> Output:
        """The output of every recipe of the search; layer paths have the tokenizer of the pool's first model."""
        first = self.layers.pool[0] if self.layers is not None else BASE
        if self.output.tokenizer is not None or first in (BASE, MERGED):
            return self.output.form
        return self.output.model_copy(update={"tokenizer": first}).form

    def with_coefficients(self, space: Space) -> Config:
        """Return the config with another space of merge coefficients."""
        return self.model_copy(update={"space": space})

    def to_yaml(self) -> str:
        """Return the normalised config: every default written out, paths absolute."""
        return dump_yaml(self.model_dump(mode="json", by_alias=True, exclude_none=True))

    @property
    def uses_hub(self) -> bool:
        """Whether a model is named by hub id, so that the network may be needed."""
        refs = [self.models.base, *self.models.experts.values()]
        places = [place for ref in refs for place in (ref.path, ref.adapter) if place is not None]
        return any(not Path(place).is_absolute() for place in places)


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Read a config file.

    Args:
        path: the YAML file. Paths in it that start with ``.``, ``/`` or ``~`` are relative to it.
        overrides: ``a.b=value`` strings (the value is YAML), applied before validation.

    Raises:
        UserError: the file, the key, the value and the fix.
    """
    path = Path(path)
    return parse_config(read_yaml(path, "config"), path, overrides)


def parse_config(data: dict[str, Any], file: Path, overrides: Sequence[str] = ()) -> Config:
    """Validate plain data as a config that was read from `file`."""
    data = overridden(data, overrides)
    if "version" not in data:
        raise UserError(f"{file}: version: this key is required; write 'version: 1' as the first line")
    if data["version"] != 1:
        raise UserError(
            f"{file}: version: {shown(data['version'])} is not known; this evomerge reads version 1"
        )
    config = validate(Config, data, file)
    with in_file(file):
        return _absolute(config, file.parent)


def _absolute(config: Config, folder: Path) -> Config:
    folder = folder.resolve()

    def place(ref: ModelRef) -> ModelRef:
        update: dict[str, Any] = {"path": resolve_source(ref.path, folder)}
        if ref.adapter is not None:
            update["adapter"] = resolve_source(ref.adapter, folder)
        return ref.model_copy(update=update)

    models = Models(
        base=place(config.models.base),
        experts={name: place(ref) for name, ref in config.models.experts.items()},
    )
    include = tuple(str((folder / expand_home(entry)).resolve()) for entry in config.suite.include)
    tasks = tuple(task.placed(folder) for task in config.suite.tasks)
    suite = config.suite.model_copy(update={"include": include, "tasks": tasks})
    output = resolve_output(config.output, ("base", *config.models.experts), folder)
    cache = config.cache
    if isinstance(cache.scores, str):
        cache = Cache(scores=str((folder / expand_home(cache.scores)).resolve()))
    changed = {"models": models, "suite": suite, "output": output, "cache": cache}
    config = config.model_copy(update=changed)
    space = config.coefficients
    if space is None or space.data is None:
        return config
    return config.with_coefficients(space.model_copy(update={"data": space.data.placed(folder)}))
