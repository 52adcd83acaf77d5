"""lm-eval tasks, one object per (task, split), and the requests of their items."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from evomerge.errors import UserError, at
from evomerge.evaluation.chat import PromptStyle
from evomerge.evaluation.data import load_documents, quiet
from evomerge.evaluation.definitions import Definition, PythonCall, check_trust
from evomerge.evaluation.metrics import Metric
from evomerge.evaluation.requests import Generation, Loglikelihood, Request, Rolling
from evomerge.suite_config import Suite as SuiteConfig
from evomerge.suite_config import TaskSpec

FEWSHOT_SEED = 1234
MAX_GEN_TOKS = 256

_LENGTH_KEYS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_GREEDY_KEYS = {"until", "do_sample", "temperature", "top_p", "top_k", *_LENGTH_KEYS}
_NOT_IDENTITY = {
    "dataset_path", "dataset_name", "dataset_kwargs", "training_split", "validation_split", "test_split",
    "fewshot_split", "metadata", "tag", "group", "group_alias", "task_alias", "task_list",
    "should_decontaminate", "doc_to_decontamination_query",
}  # fmt: skip


@dataclass(frozen=True)
class TaskSource:
    """A task with its data, before a split is chosen.

    Attributes:
        spec: the suite's entry.
        key: where it stands in the config, e.g. ``suite.tasks.0``.
        config: lm-eval's config, functions resolved, the suite's overrides applied.
        identity: what of the config decides prompts and scores, as plain data.
        data: data split name → documents.
        path: the task's YAML.
        rendered: questions, targets and choices of documents, shared by the tasks of all splits.
    """

    spec: TaskSpec
    key: str
    config: Mapping[str, Any]
    identity: Mapping[str, Any]
    data: Mapping[str, Any]
    path: Path
    rendered: dict[int, tuple[Any, dict[str, Any]]] = field(default_factory=dict)


def load_source(
    spec: TaskSpec, definition: Definition, suite: SuiteConfig, *, key: str, file: Path | str | None
) -> TaskSource:
    """Check and load one task of the suite.

    Args:
        spec: its entry; of a group's task, with that task's name.
        definition: the task's.
        suite: allows its code to run, or not.
        key: where it stands in the config; `file` is the config's.

    Raises:
        UserError: code that is not trusted, settings that do not fit, data that cannot be read.
    """
    check_trust(definition, python=suite.trust_task_code, execution=suite.allow_code_execution, file=file)
    overrides = _overrides(spec, definition, file, key)
    config = {**_resolved(definition), **overrides}
    if config.get("class") is not None and not {"dataset_path", "custom_dataset"} & set(config):
        raise UserError(
            f"{at(file, f'{key}.task')}task '{spec.task}' is a Python class that loads its data itself "
            f"({definition.file}), so they cannot be split; take a task whose YAML names its data (dataset_path)"
        )
    for entry in ("doc_to_image", "doc_to_audio"):
        if config.get(entry) is not None:
            raise UserError(
                f"{at(file, f'{key}.task')}task '{spec.task}' needs {entry[7:]} input; only text is supported"
            )
    _check_metrics(config, definition)
    if config.get("output_type", "generate_until") == "generate_until":
        _generation(config.get("generation_kwargs") or {}, "", spec.task)
    identity = {k: v for k, v in {**definition.config, **overrides}.items() if k not in _NOT_IDENTITY}
    return TaskSource(
        spec, key, config, _plain(identity), load_documents(config, definition.file), definition.file
    )


def build_task(source: TaskSource, split: str, data_split: str | None, file: Path | str | None) -> Any:
    """Return the lm-eval task whose evaluation documents are those of one data split; None: as it says itself.

    lm-eval draws few-shot examples in another way where a task names the split as its test split.
    The few-shot generator is seeded as `lm_eval.simple_evaluate` does by default, and prompts are built
    once: every candidate sees the same examples.
    """
    from lm_eval.api.task import ConfigurableTask

    class PreparedTask(_Memo, source.config.get("class", ConfigurableTask)):  # type: ignore[misc]
        _rendered = source.rendered

    config = copy.deepcopy(dict(source.config))
    for name in ("tag", "group", "task_list", "class", "dataset_kwargs"):
        config.pop(name, None)
    config["task"] = f"{source.spec.task}@{split}"
    if data_split is not None:
        config["test_split"] = data_split
    config["custom_dataset"] = lambda **_: source.data
    try:
        with quiet():
            task = PreparedTask(config=config)
            task.set_fewshot_seed(FEWSHOT_SEED)
    except Exception as error:
        reason = " ".join(str(error).split())
        where = "" if data_split is None else f" on data split '{data_split}'"
        raise UserError(
            f"{at(file, source.key)}task '{source.spec.task}' ({source.path}) cannot be built{where}: "
            f"{type(error).__name__}: {reason:.200}"
        ) from None
    return task


class _Memo:
    """Renders each document's question, target and choices once, not once a candidate (0.3 ms each)."""

    _rendered: dict[int, tuple[Any, dict[str, Any]]]
    _instances: list[Any]

    def remember(self, documents: Sequence[Any]) -> None:
        """Keep what is rendered of these very objects."""
        for doc in documents:
            self._rendered.setdefault(id(doc), (doc, {}))

    def filter_responses(self, instances: list[Any]) -> None:
        """Apply the task's filters to the responses of these instances."""
        self._instances = instances
        self.apply_filters()  # type: ignore[attr-defined]

    def doc_to_text(self, doc: Any, doc_to_text: Any = None) -> Any:
        render = super().doc_to_text  # type: ignore[misc]
        return self._once("text", doc, render) if doc_to_text is None else render(doc, doc_to_text)

    def doc_to_target(self, doc: Any, doc_to_target: Any = None) -> Any:
        render = super().doc_to_target  # type: ignore[misc]
        return self._once("target", doc, render) if doc_to_target is None else render(doc, doc_to_target)

    def doc_to_choice(self, doc: Any, doc_to_choice: Any = None) -> Any:
        render = super().doc_to_choice  # type: ignore[misc]
        return self._once("choice", doc, render) if doc_to_choice is None else render(doc, doc_to_choice)

    def _once(self, what: str, doc: Any, render: Callable[[Any], Any]) -> Any:
        if id(doc) not in self._rendered:
            return render(doc)
        kept = self._rendered[id(doc)][1]
        if what not in kept:
            kept[what] = render(doc)
        return kept[what]


def build_instances(task: Any, index: int, doc: Any, style: PromptStyle) -> list[Any]:
    """Return a document's lm-eval instances in order, as `Task.build_all_requests` makes them."""
    chat: dict[str, Any] = {
        "apply_chat_template": style.template is not None,
        "chat_template": style.template,
    }
    context = task.fewshot_context(
        doc,
        num_fewshot=task.config.num_fewshot or 0,
        system_instruction=style.system,
        fewshot_as_multiturn=style.multiturn,
        gen_prefix=task.doc_to_prefix(doc),
        **chat,
    )
    instances = task.construct_requests(
        doc=doc, ctx=context, metadata=(task.config.task, index, task.config.repeats), **chat
    )
    instances = instances if isinstance(instances, list) else [instances]
    return sorted(instances, key=lambda instance: instance.idx)


def request_of(instance: Any, task: str, style: PromptStyle) -> Request:
    """Return what an lm-eval instance asks; an answer with thinking is not ended by stop strings."""
    arguments = instance.args
    if instance.request_type == "loglikelihood":
        return Loglikelihood(str(arguments[0]), str(arguments[1]))
    if instance.request_type == "loglikelihood_rolling":
        return Rolling(str(arguments[0]))
    asked = _generation(arguments[1], arguments[0], task)
    return asked if style.think_end is None else replace(asked, stops=())


def stops_of(instance: Any) -> tuple[str, ...]:
    """Return the stop strings of an lm-eval instance that generates."""
    return _stops(instance.args[1])


def _generation(kwargs: Mapping[str, Any], context: str, task: str) -> Generation:
    for key, value in kwargs.items():
        if key not in _GREEDY_KEYS and (key, value) != ("num_beams", 1):
            raise UserError(
                f"task '{task}': generation_kwargs.{key}: not supported; use until, max_gen_toks, do_sample"
            )
        if (key == "do_sample" and value) or (
            # Without do_sample, lm-eval lets the temperature decide.
            key == "temperature" and float(value) > 0 and kwargs.get("do_sample") in (None, True)
        ):
            raise UserError(
                f"task '{task}': generation_kwargs.{key}: {value} would sample, and scores would not be reproducible; "
                f"set gen_kwargs: {{do_sample: false, temperature: 0}} in the suite"
            )
    lengths = [kwargs[key] for key in _LENGTH_KEYS if kwargs.get(key) is not None]
    length = int(lengths[0]) if lengths else MAX_GEN_TOKS
    if length < 1:
        raise UserError(
            f"task '{task}': generation_kwargs.max_gen_toks: {length}: generate at least one token"
        )
    return Generation(context, _stops(kwargs), length)


def _stops(kwargs: Mapping[str, Any]) -> tuple[str, ...]:
    until = kwargs.get("until") or []
    return (until,) if isinstance(until, str) else tuple(map(str, until))


def _overrides(spec: TaskSpec, definition: Definition, file: Path | str | None, key: str) -> dict[str, Any]:
    overrides: dict[str, Any] = {"task": spec.task}
    if spec.num_fewshot is not None:
        overrides["num_fewshot"] = spec.num_fewshot
    if spec.gen_kwargs:
        kind = definition.config.get("output_type", "generate_until")
        if kind != "generate_until":
            raise UserError(
                f"{at(file, f'{key}.gen_kwargs')}task '{spec.task}' generates nothing, it is of type {kind}"
            )
        overrides["generation_kwargs"] = {
            **(definition.config.get("generation_kwargs") or {}),
            **spec.gen_kwargs,
        }
    return overrides


def _resolved(definition: Definition) -> dict[str, Any]:
    """Return the config with its functions imported, where it has any."""
    config = dict(definition.config)
    if not definition.calls:
        return copy.deepcopy(config)
    from lm_eval.tasks._yaml_loader import _import_func_in_yml

    def resolved(value: Any) -> Any:
        if isinstance(value, PythonCall):
            return _import_func_in_yml(value.name, value.file.parent)
        if isinstance(value, Mapping):
            return {key: resolved(entry) for key, entry in value.items()}
        return [resolved(entry) for entry in value] if isinstance(value, list | tuple) else value

    try:
        return {key: resolved(value) for key, value in config.items()}
    except Exception as error:
        raise UserError(f"{definition.file}: its Python code cannot be imported: {error}") from None


def _check_metrics(config: Mapping[str, Any], definition: Definition) -> None:
    """Refuse metrics that lm-eval does not have: it would look for them on the hub."""
    import lm_eval.api.metrics  # noqa: F401  (registers them)
    from lm_eval.api.registry import metric_registry

    for entry in config.get("metric_list") or []:
        metric = entry.get("metric") if isinstance(entry, dict) else None
        if metric is None:
            raise UserError(f"{definition.file}: metric_list: each entry needs the key 'metric'")
        if callable(metric) or config.get("process_results") is not None:
            continue
        if metric not in metric_registry or entry.get("hf_evaluate"):
            raise UserError(
                f"{definition.file}: metric_list: '{metric}' is not one of lm-eval's own metrics "
                f"and would be fetched from the hub"
            )


def _plain(value: Any) -> Any:
    """Return plain data: Python calls become their name and the hash of their file."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items() if not (k == "split" and "sampler" in value)}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, PythonCall):
        module = value.file.parent / (value.name.rpartition(".")[0].replace(".", "/") + ".py")
        content = module.read_bytes() if module.is_file() else b""
        return f"!function {value.name} {hashlib.sha256(content).hexdigest()}"
    return value


def item_id(
    source: TaskSource,
    metric: Metric,
    style: PromptStyle,
    requests: Sequence[Request],
    reference: Any,
    doc: Any,
) -> str:
    """Return sha256 over the task's config with the metric, the rendered requests and the references.

    The end of thinking is in no request, and yet changes the score. Where the task's own code computes the
    score, the references are the whole document.
    """
    custom = source.config.get("process_results") is not None
    asked = [[type(request).__name__, *vars(request).values()] for request in requests]
    text = json.dumps(
        [
            source.identity,
            [metric.name, metric.filter, metric.higher_is_better],
            style.think_end,
            asked,
            doc if custom else reference,
        ],
        sort_keys=True,
        ensure_ascii=False,
        default=str,
    )
    return hashlib.sha256(text.encode()).hexdigest()
