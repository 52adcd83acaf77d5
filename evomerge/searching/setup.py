"""From a config to everything that a search needs before the first candidate."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomerge.config import Config, Engine, ModelRef
from evomerge.data_config import TaskItems, TextFile
from evomerge.environment import prepare
from evomerge.errors import UserError, at, in_file
from evomerge.evaluation.items import Block, Item, Split
from evomerge.evaluation.requests import Rolling
from evomerge.recipe import Recipe, Source
from evomerge.searching.doubts import idle_numbers, same_content, whole_blocks, without_effect
from evomerge.searching.draws import block_sizes
from evomerge.searching.screening import places
from evomerge.workers.worker import WorkerSpec

if TYPE_CHECKING:
    import torch

    from evomerge.checkpoints import Checkpoint
    from evomerge.evaluation.suite import Suite
    from evomerge.spaces import PathSpace, SearchSpace

BASE = "base"


@dataclass(frozen=True)
class Setup:
    """A search, ready to start.

    Attributes:
        config: with every ``auto`` of engine and suite decided.
        checkpoints: base and experts by name, the base first.
        sources: base and experts by name, pinned to their content.
        space: genotype ↔ recipe.
        paths: the space of layer paths that is searched second, `initial` standing in for the winner of the first
            search; None if there is one search.
        suite: the built tasks.
        blocks: each split's blocks; validation and test are the same for every seed. Those of the screen, if there
            is one, have the indices of the search blocks that they stand for.
        blocks_per_generation: how many search blocks a generation's candidates answer.
        baselines: base, initial, uniform (absent where undefined) and each expert, by name.
        warnings: sentences for the user.
    """

    config: Config
    checkpoints: Mapping[str, Checkpoint]
    sources: Mapping[str, Source]
    space: SearchSpace
    paths: PathSpace | None
    suite: Suite
    blocks: Mapping[Split, tuple[Block, ...]]
    blocks_per_generation: int
    baselines: Mapping[str, Recipe]
    warnings: tuple[str, ...] = field(default=())

    @property
    def dimension(self) -> int:
        """Number of searched coordinates, of both searches if there are two."""
        return self.space.dimension + (0 if self.paths is None else self.paths.dimension)

    @property
    def items(self) -> list[Item]:
        """All items of all splits, the screen's too."""
        return [item for split in self.blocks for item in self.suite.items(split)]

    @property
    def items_per_candidate(self) -> int:
        """Search items that one candidate answers in its generation, at most."""
        return self._largest_draw("search")

    def screened(self, *, population: int, parents: int) -> int:
        """Return how many candidates of a generation answer the full suite: all, without a screen."""
        screen = self.config.suite.screen
        if screen is None:
            return population
        return places(screen.keep, population=population, parents=parents)

    def items_per_generation(self, *, population: int, parents: int) -> int:
        """Return the search items that a generation answers at most, those of its screen included."""
        through = self.screened(population=population, parents=parents)
        if through == population:
            return population * self.items_per_candidate
        return through * self.items_per_candidate + population * self._largest_draw("screen")

    def _largest_draw(self, split: Split) -> int:
        sizes = sorted((len(block.items) for block in self.blocks[split]), reverse=True)
        return sum(sizes[: self.blocks_per_generation])

    def worker_spec(self, config_file: Path | str) -> WorkerSpec:
        """Return what each worker needs."""
        return WorkerSpec(
            sources=dict(self.sources),
            suite=self.config.suite,
            splits=self.config.splits,
            engine=self.config.engine,
            threads=self.config.workers.threads,
            offline=not self.config.uses_hub,
            config_file=str(config_file),
        )


def open_models(config: Config) -> tuple[dict[str, Checkpoint], tuple[str, ...]]:
    """Open base and experts and check that they can be merged; return them and the warnings."""
    from evomerge.checkpoints import check_compatible, check_tokenizers
    from evomerge.merging import adapter_doubts, open_sources

    sources = _sources(config)
    opened = open_sources(sources, {})
    experts = {name: opened[name] for name in config.models.experts}
    warnings = check_compatible(opened[BASE], experts)
    warnings += check_tokenizers(opened[BASE], experts) or []
    warnings += adapter_doubts(sources, opened, {})
    return opened, tuple(warnings)


def adapters_on_base(config: Config) -> Config:
    """Return the config with every expert that is an adapter alone written as that adapter on the base."""
    from evomerge.checkpoints import find, is_adapter

    base = config.models.base

    def whole(ref: ModelRef) -> ModelRef:
        if ref.adapter is not None or not is_adapter(find(ref.path, ref.revision)):
            return ref
        return base.model_copy(
            update={
                "adapter": ref.path,
                "adapter_revision": ref.revision,
                "trust_remote_code": ref.trust_remote_code,
            }
        )

    experts = {name: whole(ref) for name, ref in config.models.experts.items()}
    return config.model_copy(update={"models": config.models.model_copy(update={"experts": experts})})


def _sources(config: Config) -> dict[str, Source]:
    refs = {BASE: config.models.base, **config.models.experts}
    return {
        name: Source(
            source=ref.path,
            revision=ref.revision,
            adapter=ref.adapter,
            adapter_revision=ref.adapter_revision,
        )
        for name, ref in refs.items()
    }


def decide_engine(config: Config, base: Checkpoint) -> Config:
    """Return the config with the engine's device, token budget and context length decided; see `decided`."""
    return config.model_copy(update={"engine": decided(config.engine, base)})


def decided(engine: Engine, base: Checkpoint) -> Engine:
    """Return an engine's settings with device, token budget and context length decided.

    Raises:
        UserError: the engine is not installed, does not know an option, or is to read longer texts than the model can.
    """
    import torch

    from evomerge.checkpoints.model_config import last_position, positions
    from evomerge.engines import check_engine, default_batch_tokens

    device = engine.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens = (
        default_batch_tokens(engine.type, device) if engine.batch_tokens == "auto" else engine.batch_tokens
    )
    most = last_position(base.config, base.tensors)
    if engine.max_length is not None and most is not None and engine.max_length > most:
        raise UserError(
            f"{engine.max_length} is more than the {most} positions that {base.path} knows; set at most {most}, or "
            "leave it out",
            key="engine.max_length",
        )
    length = engine.max_length or positions(base.config) or 2048
    settings = engine.model_copy(update={"device": device, "batch_tokens": tokens, "max_length": length})
    check_engine(settings)
    return settings


def probes(config: Config) -> bool:
    """Whether a config as written leaves the token budget to a probe, should the device be a GPU."""
    return config.engine.batch_tokens == "auto" and config.engine.type == "hf"


def probe_engine(
    config: Config, base: Checkpoint, suite: Suite, tokenizer: Any, dtype: torch.dtype | None = None
) -> Config:
    """Return the config with the largest token budget with which the suite's longest texts fit on the GPU.

    Asked for once, where the config says ``auto``; the value is recorded, and a resumed run reads it.

    Args:
        config: with the engine decided otherwise.
        base: whose config the live model has.
        suite, tokenizer: what is asked.
        dtype: of the live model; by default the output's, else the base's.
    """
    from evomerge.engines.hops import budget
    from evomerge.engines.probing import probe_batch_tokens

    texts = {
        request.text
        if isinstance(request, Rolling)
        else request.context + getattr(request, "continuation", "")
        for request in suite.requests()
    }
    # The longest in tokens is among those that are long in characters.
    longest = sorted(texts, key=lambda text: (-len(text), text))[:16]
    engine, gpus = config.engine, config.workers.gpus
    tokens = probe_batch_tokens(
        str(base.path),
        dtype=str(dtype or config.output.dtype or base.dtype).removeprefix("torch."),
        device=engine.device,
        longest=max((len(tokenizer.encode(text)) for text in longest), default=1),
        max_length=int(engine.max_length or 2048),
        share=1.0 if gpus == "auto" else min(1.0, float(gpus) or 1.0),
        kept=budget(engine) if config.layers is not None else 0,
    )
    if tokens is None:
        return config
    return config.model_copy(update={"engine": engine.model_copy(update={"batch_tokens": tokens})})


def decide_output(config: Config, base: Checkpoint) -> tuple[Config, tuple[str, ...]]:
    """Return the config with one number format for live model and output, and a warning if the base has several.

    A live model has one number format, and what is scored is what is exported: `engine.dtype` and `output.dtype`
    set each other; where neither is given and all tensors of the base have one format, each keeps it.
    """
    formats = {str(info.dtype).removeprefix("torch.") for info in base.tensors.values()}
    main = str(base.dtype).removeprefix("torch.")
    given = config.output.dtype or (None if config.engine.dtype == "auto" else config.engine.dtype)
    mixed = given is None and len(formats) > 1
    output = config.output.model_copy(update={"dtype": main if mixed else given})
    engine = config.engine.model_copy(update={"dtype": output.dtype or "auto"})
    warning = (
        f"the base mixes {' and '.join(sorted(formats))}; merged models are {main} throughout (output.dtype)"
    )
    return config.model_copy(update={"output": output, "engine": engine}), (warning,) if mixed else ()


def decide_chat_template(
    config: Config,
    checkpoints: Mapping[str, Checkpoint],
    tokenizer: Any,
    file: Path | str | None,
    names: Mapping[str, str] | None = None,
) -> Config:
    """Return the config with `suite.chat_template` decided; see `evomerge.evaluation.chat.decide_chat`.

    Args:
        config: of the suite.
        checkpoints: the models.
        tokenizer: of the merged models.
        file: named in errors.
        names: what errors call a model, if not by its name.
    """
    from evomerge.checkpoints.tokenizer import chat_templates
    from evomerge.evaluation.chat import decide_chat
    from evomerge.evaluation.suite import first_prompt

    suite = decide_chat(
        config.suite,
        tokenizer,
        {(names or {}).get(name, name): chat_templates(c.path) for name, c in checkpoints.items()},
        lambda style: first_prompt(config.suite, config.splits, tokenizer, style, file),
        file=file,
    )
    return config.model_copy(update={"suite": suite})


def pin_revisions(config: Config, checkpoints: Mapping[str, Checkpoint]) -> Config:
    """Return the config with the commit of every hub model written out, so that a resume sees the same files."""

    from evomerge.checkpoints import commits

    def pinned(name: str, ref: ModelRef) -> ModelRef:
        return ref.model_copy(update=commits(checkpoints[name], ref.path, ref.adapter))

    experts = {name: pinned(name, ref) for name, ref in config.models.experts.items()}
    models = config.models.model_copy(update={"base": pinned(BASE, config.models.base), "experts": experts})
    return config.model_copy(update={"models": models})


def without_tasks(config: Config) -> Config:
    """Return the config with a file of no name in place of tasks whose items are data, for a first draft."""
    space = config.coefficients
    if space is None or space.data is None or not space.data.tasks:
        return config
    data = space.data.changed(lambda item: TextFile(file="-") if isinstance(item, TaskItems) else item)
    return config.with_coefficients(space.model_copy(update={"data": data}))


def with_texts(config: Config, suite: Suite) -> Config:
    """Return the config with a file in place of each task whose search items are data, every file pinned.

    Raises:
        UserError: a task has no texts as references, or a file cannot be read.
    """
    space = config.coefficients
    if space is None or space.data is None:
        return config
    data = space.data
    from evomerge.statistics.texts import keep_references

    files = {name: keep_references(name, suite.references(name)) for name in data.tasks}
    data = data.changed(lambda item: files[item.task] if isinstance(item, TaskItems) else item).pinned()
    return config.with_coefficients(space.model_copy(update={"data": data}))


def provide_statistics(setup: Setup, say: Callable[[str], None]) -> None:
    """Have the statistics ready that the search's method needs, so that no worker computes them.

    Args:
        setup: of the search.
        say: shows a sentence.
    """
    from evomerge.statistics import provide
    from evomerge.statistics.needed import in_lines

    provide(
        setup.baselines["initial"],
        setup.checkpoints,
        device=str(setup.config.engine.device),
        report=in_lines(say),
    )


def check_paths(
    config: Config, space: PathSpace, checkpoints: Mapping[str, Checkpoint], *, file: Path | str
) -> None:
    """Refuse models whose layers cannot share a path, and scales where they do not fold exactly.

    Args:
        config: of the search.
        space: of its paths.
        checkpoints: base and experts by name.
        file: named in errors.
    """
    from evomerge.merging import plan_merge

    assert config.layers is not None, "the config searches layer paths"
    scales = config.layers.scale != 1.0
    for key, scale in (("pool", 1.0), ("scale", 0.5))[: 1 + scales]:
        try:
            plan_merge(space.probe(scale=scale), checkpoints)
        except UserError as error:
            where = "space" if config.coefficients is None else "space.layers"
            raise UserError(f"{at(file, f'{where}.{key}')}{error.problem}") from None


def set_up(
    config: Config,
    *,
    file: Path | str,
    weights: bool = True,
    tell: Callable[[str], None] = lambda phase: None,
) -> Setup:
    """Open the models, build suite, space and blocks, and check that they fit each other.

    Args:
        config: validated.
        file: named in errors.
        weights: read and hash the weights (a plan does without: its recipes are not pinned).
        tell: called with what is going on.

    Raises:
        UserError: with one sentence, for anything that does not fit.
    """
    prepare(offline=not config.uses_hub)
    from evomerge.engines import packing_name
    from evomerge.evaluation.suite import Suite
    from evomerge.merging import output_tokenizer, pin_output
    from evomerge.merging.vocabulary import output_vocabulary
    from evomerge.spaces import PathSpace, baseline_recipes, space_for

    tell("reading models")
    config = adapters_on_base(config)
    probed = weights and probes(config)
    checkpoints, warnings = open_models(config)
    base = checkpoints[BASE]
    with in_file(file):
        config = pin_revisions(decide_engine(config, base), checkpoints)
    config, mixed = decide_output(config, base)
    config = config.model_copy(update={"output": pin_output(config.output, checkpoints)})
    warnings += mixed
    sources = {}
    for name, source in _sources(config).items():
        digest = "0" * 64
        if weights:
            tell(f"hashing weights: {name}, {checkpoints[name].nbytes / 1e9:.2g} GB")
            digest = checkpoints[name].sha256
        sources[name] = source.model_copy(update={"sha256": digest})
    if weights:
        warnings += same_content(sources)
    warnings += without_effect(config)
    space = space_for(without_tasks(config), num_layers=base.num_layers, sources=sources, file=file)
    initial = space.decode(space.initial)
    paths = None
    if config.layers is not None and config.coefficients is not None:
        paths = PathSpace(config, num_layers=base.num_layers, sources=sources, merged=initial, file=file)
    for found in (space, paths):
        if isinstance(found, PathSpace):
            check_paths(config, found, checkpoints, file=file)
    warnings += tuple(output_vocabulary(initial, checkpoints).warnings)
    tokenizer = output_tokenizer(initial, checkpoints)
    config = decide_chat_template(config, checkpoints, tokenizer, file)
    suite = Suite.build(
        config.suite,
        config.splits,
        tokenizer,
        file=str(file),
        tell=lambda task: tell(f"rendering prompts: {task}"),
    )
    if config.coefficients is not None and config.coefficients.data is not None:
        config = with_texts(config, suite)
        space = space_for(config, num_layers=base.num_layers, sources=sources, file=file)
        initial = space.decode(space.initial)
    sizes = Counter(item.task for item in suite.items("search"))
    per_block, per_generation = block_sizes(
        list(sizes.values()),
        block_items=config.suite.block_items,
        items_per_candidate=config.suite.items_per_candidate,
    )
    if probed and config.engine.device == "cuda":
        config = probe_engine(config, base, suite, tokenizer)
    packing = packing_name(config.engine)
    blocks: dict[Split, tuple[Block, ...]] = {
        "search": suite.blocks("search", seed=config.seed, block_items=per_block, packing=packing),
        "validation": suite.fixed_blocks("validation", packing=packing),
        "test": suite.fixed_blocks("test", packing=packing),
    }
    if config.suite.screen is not None:
        blocks["screen"] = suite.screen_blocks(blocks["search"])
    per_generation = min(per_generation, len(blocks["search"]))
    warnings += idle_numbers(space, base)
    warnings += whole_blocks(sizes, len(blocks["search"]), per_generation, config)
    baselines = {**baseline_recipes(config, sources), "initial": initial}
    return Setup(
        config=config,
        checkpoints=checkpoints,
        sources=sources,
        space=space,
        paths=paths,
        suite=suite,
        blocks=blocks,
        blocks_per_generation=per_generation,
        baselines=baselines,
        warnings=warnings,
    )
