"""The search config: one YAML file, one schema."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from evomerge.errors import UserError, in_file, nearest
from evomerge.layers_config import MERGED, LayerSpace
from evomerge.methods.registry import get_method
from evomerge.output import BASE, Output
from evomerge.overrides import overridden
from evomerge.recipe import expand_home, resolve_output, resolve_source
from evomerge.schema import (
    Auto,
    Frozen,
    Number,
    Positive,
    Whole,
    dump_yaml,
    from_text,
    read_yaml,
    shown,
    validate,
)
from evomerge.space_config import Space
from evomerge.suite_config import Splits, Suite

RESERVED = ("base", "initial", "uniform", "merge", MERGED, "expert", "shared", "mean", "winner")
"""Names that an expert cannot have: those of baselines, merges and finalists, and the words of `per`."""


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
        return from_text(cls, data, "path", "a folder, a hub id or {path: ..., revision: ...}")

    @field_validator("trust_remote_code")
    @classmethod
    def _only_known_code(cls, trusted: bool) -> bool:
        if trusted:
            raise ValueError(
                "true is not accepted: models are built by transformers' own code, never by a model's; leave it out"
            )
        return trusted


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

    A search over layer paths has `edits` by default, or with indicators `catcma`. `layers` is the optimiser of
    layer paths that come after coefficients.
    """

    type: Literal["cma", "catcma", "edits", "tpe", "random"] = "cma"
    sigma: Annotated[Number, Field(gt=0, le=1)] = 0.2
    population: Auto | Positive = "auto"
    layers: OptimizerConfig | None = None

    @model_validator(mode="after")
    def _enough_to_rank(self) -> OptimizerConfig:
        ranks = self.type in ("cma", "catcma", "edits")
        if ranks and self.population != "auto" and self.population < SMALLEST_POPULATION:
            raise ValueError(
                f"population: {self.population} is too small; {self.type} needs {SMALLEST_POPULATION} or more"
            )
        return self


class Budget(Frozen):
    """When the search ends: whichever ceiling is reached first.

    `layers` is the share of it all that layer paths get where they come after coefficients, half by default.
    """

    candidates: Positive | None = None
    item_evaluations: Positive | None = None
    hours: Annotated[Number, Field(gt=0)] | None = None
    layers: Annotated[Number, Field(gt=0, lt=1)] | None = None

    @model_validator(mode="after")
    def _some(self) -> Budget:
        if self.candidates is None and self.item_evaluations is None and self.hours is None:
            raise ValueError("is empty; give at least one of candidates, item_evaluations, hours")
        return self


class Engine(Frozen):
    """How candidates are run.

    Attributes:
        type: transformers in the worker's process, or vLLM.
        device: where the model is.
        dtype: number format of the live model; that of `output`, since what is scored is what is exported.
        batch_tokens: token budget of one forward pass.
        max_length: longest input, in tokens; the model's own length by default.
        prefix_sharing: what layer paths that begin alike may keep of each other, in GB for each worker; 0: nothing.
        options: of vLLM's engine arguments, those that are not decided by the rest of the config.
    """

    type: Literal["hf", "vllm"] = "hf"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    batch_tokens: Auto | Positive = "auto"
    max_length: Positive | None = None
    prefix_sharing: Auto | Annotated[Number, Field(ge=0)] = "auto"
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _of_its_type(self) -> Engine:
        if self.options and self.type != "vllm":
            raise ValueError(
                f"options: {shown(next(iter(self.options)))} is for vLLM; write type: vllm, or leave it out"
            )
        if self.type == "vllm" and self.prefix_sharing not in ("auto", 0):
            raise ValueError(
                f"prefix_sharing: {shown(self.prefix_sharing)} is not for vLLM, which runs all layers of a candidate; "
                "leave it out, or write type: hf"
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
    """Who does the work: Ray actors (local or of a cluster at `address`), or this process.

    Attributes:
        cpus: cores of each worker, which merges as many tensors at once. One that computes on the CPU also has as
            many threads, which are part of its engine's fingerprint: how a product is cut over threads changes its
            last bits.
    """

    type: Literal["ray", "local"] = "ray"
    count: Auto | Positive = "auto"
    cpus: Annotated[Number, Field(gt=0)] = 1
    gpus: Auto | Annotated[Number, Field(ge=0)] = "auto"
    address: str | None = None

    @property
    def threads(self) -> int:
        """Threads of one operation of a worker: its whole cores, 1 at least."""
        return max(1, int(self.cpus))


class Cache(Frozen):
    """What runs share.

    Attributes:
        scores: whether scores are kept for other runs and taken from them: true (in the user's cache folder),
            false, or a folder.
    """

    scores: bool | Annotated[str, Field(min_length=1)] = True


class TwoSpaces(Frozen):
    """First coefficients, then layer paths through a pool that the winner of the first search has joined.

    Attributes:
        coefficients, layers: as where they are the only space. The pool names the winner ``merged``; where it does
            not, the winner comes first in it.
    """

    type: Literal["coefficients+layers"]
    coefficients: Space
    layers: LayerSpace

    @model_validator(mode="after")
    def _with_merged(self) -> TwoSpaces:
        if MERGED in self.layers.pool:
            return self
        layers = self.layers.model_copy(update={"pool": (MERGED, *self.layers.pool)})
        object.__setattr__(self, "layers", layers)
        return self


SPACES = {"coefficients": Space, "layers": LayerSpace, "coefficients+layers": TwoSpaces}
"""The kinds of search space, by `type`."""


def _kind_of_space(space: Any) -> str:
    kind = space.get("type") if isinstance(space, dict) else getattr(space, "type", None)
    return SPACES.get(kind if isinstance(kind, str) else "", Space).__name__


def _for_paths(space: Any, optimizer: Any) -> Any:
    """Return the optimiser of layer paths, its type by their genome where nobody has chosen it."""
    if not isinstance(optimizer, dict):
        return optimizer
    indicators = isinstance(space, dict) and space.get("genome") == "indicators"
    return {"type": "catcma" if indicators else "edits", **optimizer}


AnySpace = Annotated[
    Annotated[Space, Tag("Space")]
    | Annotated[LayerSpace, Tag("LayerSpace")]
    | Annotated[TwoSpaces, Tag("TwoSpaces")],
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
        if kind == "coefficients" or not isinstance(optimizer, dict):
            return data
        if kind == "layers":
            return {**data, "optimizer": _for_paths(space, optimizer)}
        layers = _for_paths(space.get("layers"), optimizer.get("layers") or {})
        return {**data, "optimizer": {**optimizer, "layers": layers}}

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        self.output.check(("base", *self.models.experts))
        if self.engine.dtype != "auto" and self.output.dtype not in (None, self.engine.dtype):
            raise ValueError(
                f"engine.dtype: {self.engine.dtype}, but output.dtype is {self.output.dtype}; what is scored is what "
                "is exported: give one of them only, or the same for both"
            )
        if isinstance(self.space, Space):
            self._check_coefficients(self.space, "space")
        elif isinstance(self.space, LayerSpace):
            self._check_layers(self.space, "space", self.optimizer, "optimizer")
        else:
            self._check_coefficients(self.space.coefficients, "space.coefficients")
            assert self.optimizer.layers is not None, "filled in before"
            self._check_layers(self.space.layers, "space.layers", self.optimizer.layers, "optimizer.layers")
            return self
        for key, given in (("optimizer", self.optimizer.layers), ("budget", self.budget.layers)):
            if given is not None:
                raise ValueError(f"{key}.layers: needs space.type coefficients+layers; leave it out")
        return self

    def _check_layers(self, space: LayerSpace, where: str, optimizer: OptimizerConfig, key: str) -> None:
        names = ("base", *self.models.experts)
        for name in space.pool:
            if name not in names and not (name == MERGED and isinstance(self.space, TwoSpaces)):
                raise ValueError(
                    f"{where}.pool: no model is called '{name}'{nearest(name, names)}; give names out of "
                    f"{', '.join(names)}"
                )
        if optimizer.layers is not None:
            raise ValueError(f"{key}.layers: needs space.type coefficients+layers; leave it out")
        if optimizer.type == "tpe":
            raise ValueError(
                f"{key}.type: tpe is not accepted: it starts anywhere in the space, where no path is a working "
                "model; use edits or catcma"
            )
        if optimizer.type == "cma" and space.genome != "indicators":
            raise ValueError(f"{key}.type: cma searches paths as indicators; set {where}.genome: indicators")

    def _check_coefficients(self, space: Space, where: str) -> None:
        method = get_method(space.method)
        try:
            base = "base" if space.base else None
            method.check_inputs(base, tuple(self.models.experts), f"{where}.method", space.dialect)
        except ValueError as error:
            raise ValueError(f"{error}; models.experts lists {', '.join(self.models.experts)}") from None
        if space.data is not None:
            try:
                space.data.check_inputs(tuple(self.models.experts))
            except ValueError as error:
                raise ValueError(f"{where}.data.{error}") from None
        for name, specs in space.parameters.items():
            for spec in specs:
                if spec.per not in (None, "expert", "shared", *self.models.experts):
                    raise ValueError(
                        f"{where}.parameters.{name}.per: '{spec.per}' is neither expert, shared nor an expert's name"
                        f"{nearest(str(spec.per), self.models.experts)}"
                    )
        for parameter in method.parameters_in(space.dialect):
            if parameter.default_in(space.dialect) is None and parameter.name not in space.parameters:
                raise ValueError(f"{where}.parameters: {method.name} needs '{parameter.name}'")
        if not any(spec.searched for specs in space.parameters.values() for spec in specs):
            raise ValueError(
                f"{where}.parameters: nothing is searched; give at least one parameter a range, "
                "or use 'evomerge merge' for a fixed recipe"
            )
        if self.optimizer.type == "edits":
            raise ValueError("optimizer.type: edits changes layer paths; use cma, catcma, tpe or random")
        if self.optimizer.type == "cma":
            for name, specs in space.parameters.items():
                if any(spec.choices is not None for spec in specs):
                    raise ValueError(
                        f"{where}.parameters.{name}: choices need optimizer.type catcma, tpe or random; "
                        "cma searches numbers"
                    )

    @property
    def coefficients(self) -> Space | None:
        """The space of merge coefficients, if they are searched."""
        if isinstance(self.space, TwoSpaces):
            return self.space.coefficients
        return self.space if isinstance(self.space, Space) else None

    @property
    def layers(self) -> LayerSpace | None:
        """The space of layer paths, if they are searched."""
        if isinstance(self.space, TwoSpaces):
            return self.space.layers
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
        if isinstance(self.space, TwoSpaces):
            return self.model_copy(update={"space": self.space.model_copy(update={"coefficients": space})})
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
