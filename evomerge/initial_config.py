"""`evomerge init`: a search config to start from, around a published merge or for a few models."""

from __future__ import annotations

import json
import math
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evomerge.checkpoints import is_adapter
from evomerge.checkpoints.model_config import DEPTH_KEYS
from evomerge.checkpoints.tokenizer import chat_templates
from evomerge.config import RESERVED, Config, parse_config
from evomerge.errors import UserError
from evomerge.initial_suite import flow, suite_lines
from evomerge.mergekit import open_recipe
from evomerge.methods.registry import Parameter, get_method
from evomerge.output import Output, Tokenizer
from evomerge.recipe import Merge, Recipe, Source, expand_home
from evomerge.schema import parse_yaml
from evomerge.settings import Filtered, Gradient, Scalar, Setting
from evomerge.spaces import CoefficientSpace

SPREAD = {
    "weight": 0.5,
    "density": 0.3,
    "t": 0.3,
    "scale": 0.3,
    "lambda": 0.5,
    "gamma": 0.05,
    "select_topk": 0.3,
    "alpha": 0.2,
}
"""How far around its published value a parameter is searched; what is not listed stays fixed."""

_BOUNDS = {"t": (0.0, 1.0), "density": (0.05, 1.0)}
"""Narrower than what the method accepts, unless the published value lies outside."""

_CANDIDATES_PER_DIMENSION = 15
_LAYERS_OF_A_HUB_MODEL = 32


@dataclass(frozen=True)
class _Start:
    """What a search starts from.

    Attributes:
        name: of the search.
        base, experts: models by name.
        merge: its method, dialect and parameters; inputs are the experts' names.
        uses_base: whether a base that is optional takes part.
        output: form of the merged models; names are those of the config.
        speaks: whether the merged models have a chat template.
        about: comments for the head of the file.
    """

    name: str
    base: Source
    experts: Mapping[str, Source]
    merge: Merge
    uses_base: bool
    output: Output
    speaks: bool
    about: tuple[str, ...]


def initial_config(
    sources: Sequence[str],
    tasks: Sequence[str],
    *,
    include: Sequence[str] = (),
    method: str = "task_arithmetic",
) -> str:
    """Return the text of a search config.

    Args:
        sources: a mergekit YAML (or a recipe), whose merge the search starts from; or models, the base first.
        tasks: names of lm-eval tasks.
        include: folders with task YAMLs of one's own.
        method: for models: how they are merged.

    Raises:
        UserError: a source cannot be read, a merge is not one that a search varies, or a task is unknown.
    """
    if len(sources) == 1 and Path(sources[0]).expanduser().is_file():
        start = _from_file(Path(sources[0]).expanduser())
    elif len(sources) == 1:
        raise UserError(
            f"{sources[0]}: is no file; name a mergekit YAML, or two models or more, the base first"
        )
    else:
        start = _from_models(sources, method)
    folders = tuple(str(expand_home(folder).resolve()) for folder in include)
    lines, splits = suite_lines(tasks, folders, start.speaks)
    space = [line for parameter in _order(start.merge) for line in _parameter(parameter, start.merge)]
    if not any("range:" in line for line in space):
        raise UserError(
            f"{sources[0]}: nothing in a merge by {start.merge.method} is left to search; "
            "'evomerge merge' makes it as it is"
        )

    def text(candidates: int) -> str:
        return "\n".join(
            [
                *_head(start),
                *_models(start),
                *_space(start, space),
                "",
                "optimizer: {type: cma, sigma: 0.2}    # CMA-ES; size of the first steps, as a share of each range",
                f"budget: {{candidates: {candidates}}}              # merged models to try; hours also works",
                "",
                *lines,
                "",
                *splits,
                "",
                *_output(start.output),
                "workers: {type: ray, count: auto}     # one process a core or GPU; or: local",
                "seed: 0",
                "",
            ]
        )

    dimension = _dimension(text(100), start)
    return text(max(100, 10 * math.ceil(_CANDIDATES_PER_DIMENSION * dimension / 10)))


def _from_file(file: Path) -> _Start:
    reading = open_recipe(file)
    recipe = reading.recipe
    merge = _only_merge(recipe, file)
    method = get_method(merge.method)
    role = method.base_in(merge.dialect)
    inputs = [model for model in merge.inputs if model != merge.base or role == "unused"]
    base = merge.base or merge.inputs[0]
    if merge.base is None and role.endswith("input"):
        inputs.remove(base)
    names = {model: f"{model}_model" if model in RESERVED else model for model in inputs}
    renamed = merge.model_copy(
        update={
            "inputs": tuple(names.values()),
            "parameters": _renamed(merge.parameters, names),
            "rules": tuple(
                rule.model_copy(update={"parameters": _renamed(rule.parameters, names)})
                for rule in merge.rules
            ),
        }
    )
    values = [value for place in _places(renamed) for value in place.values()]
    depths = any(isinstance(s, tuple) for v in values for s in (v.values() if isinstance(v, dict) else (v,)))
    ends = (
        (
            "Values over depth: the final norm and the head take the last one in a search; the first one in "
            "mergekit.",
        )
        if depths
        else ()
    )
    experts = {names[model]: recipe.models[model] for model in inputs}
    output = _in_names(recipe.output, {**names, base: "base"})
    output, speaks = _chat(output, {"base": recipe.models[base], **experts})
    return _Start(
        name=re.sub(r"[^A-Za-z0-9._-]+", "-", file.stem).strip("-._") or "search",
        base=recipe.models[base],
        experts=experts,
        merge=renamed,
        uses_base=merge.base is not None or not role.startswith("optional"),
        output=output,
        speaks=speaks,
        about=(f"A search around the merge of {file.name}: it starts there.", *reading.notes, *ends),
    )


def _only_merge(recipe: Recipe, file: Path) -> Merge:
    """Return the merge of whole models that a recipe is, also if it says so by its layers one by one."""
    path = recipe.path or ()
    whole = all(hop.merge == path[0].merge and hop.layer == i for i, hop in enumerate(path))
    if len(recipe.merges) != 1 or not whole or any(hop.layers or hop.scale != 1 for hop in path):
        raise UserError(f"{file}: puts layers together anew; a search starts from a merge of whole models")
    merge = next(iter(recipe.merges.values()))
    if any(rule.layers or rule.roles or rule.tensors or rule.method for rule in merge.rules):
        raise UserError(
            f"{file}: rules by layers, roles or patterns are not turned into a search; use a mergekit YAML"
        )
    return merge


def _renamed(parameters: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {
        key: {names[model]: setting for model, setting in value.items()} if isinstance(value, dict) else value
        for key, value in parameters.items()
    }


def _from_models(sources: Sequence[str], method: str) -> _Start:
    try:
        chosen = get_method(method)
    except ValueError as error:
        raise UserError(f"--method: {error}") from None
    if len(sources) < 2:
        raise UserError("give a mergekit YAML, or two models or more, the base first")
    experts: dict[str, Source] = {}
    for text in sources[1:]:
        stem = Path(text).name or text
        stem = f"{stem}_model" if stem in RESERVED else stem
        name = next(n for n in (stem, *(f"{stem}-{i}" for i in range(2, 1000))) if n not in experts)
        experts[name] = Source(source=_located(text))
    customary = {"weight": 0.4, "density": 0.5, "t": 0.5}
    known = {p.name for p in chosen.parameters_in("paper")}
    parameters: dict[str, Any] = {name: value for name, value in customary.items() if name in known}
    try:
        chosen.check_inputs("base", tuple(experts), method)
        merge = Merge(method=method, base="base", inputs=tuple(experts), parameters=parameters)
    except ValueError as error:
        raise UserError(str(error)) from None
    about = ("A search over merges of a base and its fine-tunes.",)
    base = Source(source=_located(sources[0]))
    output, speaks = _chat(Output(), {"base": base, **experts})
    return _Start("search", base, experts, merge, True, output, speaks, about)


def _in_names(output: Output, names: Mapping[str, str]) -> Output:
    """Return a form of the output in which models have other names; what is the default is left out."""
    tokenizer = output.tokenizer
    if isinstance(tokenizer, Tokenizer):
        data = tokenizer.model_dump(exclude_defaults=True)
        data["source"] = names.get(tokenizer.source, tokenizer.source)
        for rule in data.get("tokens", {}).values():
            if "model" in rule["source"]:
                rule["source"]["model"] = names[rule["source"]["model"]]
        tokenizer = Tokenizer.model_validate(data)
    elif tokenizer is not None:
        tokenizer = names.get(tokenizer, tokenizer)
        tokenizer = None if tokenizer == "base" else tokenizer
    template = output.chat_template
    template = None if template is None else names.get(template, template)
    return output.model_copy(update={"tokenizer": tokenizer, "chat_template": template})


def _chat(output: Output, models: Mapping[str, Source]) -> tuple[Output, bool]:
    """Return the output with the experts' chat template where it would have none, and whether it has one now.

    A model that is not on this machine counts as having none.
    """
    folders = {name: Path(source.source) for name, source in models.items()}
    templates = {
        name: not is_adapter(folder) and bool(chat_templates(folder)) for name, folder in folders.items()
    }
    if output.chat_template is not None or templates.get(output.vocabulary.source, templates["base"]):
        return output, output.chat_template != "auto" or any(templates.values())
    if not any(templates.values()):
        return output, False
    return output.model_copy(update={"chat_template": "auto"}), True


def _located(text: str) -> str:
    path = expand_home(text)
    if path.is_dir():
        return str(path.resolve())
    if text.startswith((".", "/", "~")):
        raise UserError(f"{text}: no such folder")
    return text


def _order(merge: Merge) -> list[Parameter]:
    """The parameters that the merge sets, those with a value per input first."""
    given = {name for place in _places(merge) for name in place}
    known = [p for p in get_method(merge.method).parameters_in(merge.dialect) if p.name in given]
    return sorted(known, key=lambda parameter: parameter.scope != "expert")


def _places(merge: Merge) -> list[Mapping[str, Any]]:
    return [*(rule.parameters for rule in merge.rules), merge.parameters]


def _parameter(parameter: Parameter, merge: Merge) -> list[str]:
    """Write one parameter's entry, or several: by expert, by part of the tensors' names."""
    recipients = merge.inputs if parameter.scope == "expert" else ("",)
    each = {who: list(_conditions(parameter, merge, who)) for who in recipients}
    alike = all(repr(conditions) == repr(each[recipients[0]]) for conditions in each.values())
    entries: list[Any] = []
    if alike:
        per = "expert" if parameter.name == "weight" else "shared"
        entries = [_entry(parameter, condition, per) for condition in each[recipients[0]]]
    else:
        for who, conditions in each.items():
            entries += [_entry(parameter, condition, who) for condition in conditions]
    if parameter.scope == "shared":
        for entry in entries:
            entry.pop("per", None)
    flat = [entry["value"] if set(entry) <= {"value", "per"} and alike else entry for entry in entries]
    if len(flat) == 1:
        return [f"    {parameter.name}: {flow(flat[0])}"]
    return [f"    {parameter.name}:", *(f"      - {flow(entry)}" for entry in flat)]


def _conditions(
    parameter: Parameter, merge: Merge, who: str
) -> Iterator[tuple[str | None, Scalar | Gradient]]:
    """Yield (part of the name, value), in the order in which they are asked, to the first that always holds."""
    default = parameter.default_in(merge.dialect)
    values = [place[parameter.name] for place in _places(merge) if parameter.name in place]
    settings: list[Setting] = [v for value in values if (v := _of(value, who)) is not None]
    for setting in [*settings, *([default] if default is not None else [])]:
        if isinstance(setting, tuple) and isinstance(setting[0], Filtered):
            for condition in setting:
                assert isinstance(condition, Filtered)
                yield condition.filter, condition.value
                if condition.filter is None:
                    return
            continue
        yield None, setting
        return


def _of(value: Any, who: str) -> Setting | None:
    found: Setting | None = value.get(who) if isinstance(value, dict) else value
    return found


def _entry(parameter: Parameter, condition: tuple[str | None, Scalar | Gradient], per: str) -> dict[str, Any]:
    part, value = condition
    where = {} if part is None else {"tensors": "*" + re.sub(r"([*?[])", r"[\1]", part) + "*"}
    numbers = [v for v in (value if isinstance(value, tuple) else (value,)) if not isinstance(v, bool | str)]
    searched = (
        parameter.kind == "float"
        and parameter.name in SPREAD
        and (parameter.name != "lambda" or len(numbers) > 1)
    )
    if not searched:
        if isinstance(value, tuple):
            raise UserError(
                f"{parameter.name}: a list over depth is not turned into a search; give one value"
            )
        return {"value": value, "per": per, **where}
    entry: dict[str, Any] = {"range": _range(parameter, numbers)}
    if len(numbers) > 1:
        entry |= {"initial": numbers, "depth": {"smooth": len(numbers)}}
    else:
        entry["initial"] = numbers[0]
        if parameter.name == "weight":
            entry["depth"] = {"smooth": 2}
    return {**entry, "per": per, **where}


def _range(parameter: Parameter, numbers: Sequence[float]) -> list[float]:
    spread = SPREAD[parameter.name]
    low, high = min(numbers) - spread, max(numbers) + spread
    floor, ceiling = _BOUNDS.get(parameter.name, (-math.inf, math.inf))
    low = max(low, min(floor, *numbers), -math.inf if parameter.low is None else parameter.low)
    high = min(high, max(ceiling, *numbers), math.inf if parameter.high is None else parameter.high)
    return [round(low, 4), round(high, 4)]


def _head(start: _Start) -> list[str]:
    lines = [
        textwrap.fill(line, 108, initial_indent="# ", subsequent_indent="#   ", break_long_words=False)
        for line in start.about
    ]
    return [
        *lines,
        "#",
        "#   evomerge plan   FILE     what the search will be",
        "#   evomerge search FILE     run it",
        "version: 1",
        f"name: {flow(start.name)}",
        "",
    ]


def _models(start: _Start) -> list[str]:
    use = {
        "unused": "gives the merged models their config and tokenizer",
        "input": "is merged too, as the first",
        "optional input": "is merged too, as the first",
    }
    role = get_method(start.merge.method).base_in(start.merge.dialect)
    note = use.get(role, "the common ancestor")
    return [
        "models:",
        f"  base: {flow(_ref(start.base))}   # {note if start.uses_base else use['unused']}",
        "  experts:",
        *(f"    {flow(name)}: {flow(_ref(source))}" for name, source in start.experts.items()),
        "",
    ]


def _ref(source: Source) -> Any:
    parts = {"path": source.source, "revision": source.revision, "adapter": source.adapter}
    given = {key: value for key, value in parts.items() if value is not None}
    return source.source if len(given) == 1 else given


def _space(start: _Start, parameters: Sequence[str]) -> list[str]:
    merge = start.merge
    given = {p.name for p in _order(merge)}
    rest = [p for p in get_method(merge.method).parameters_in(merge.dialect) if p.name not in given]
    lines = [
        "space:",
        "  type: coefficients",
        f"  method: {merge.method}",
        *([f"  dialect: {merge.dialect}"] if merge.dialect != "paper" else []),
        *([] if start.uses_base else ["  base: false"]),
        "  parameters:                         # a plain value is fixed; a range is searched from 'initial' on",
        *parameters,
    ]
    for p in rest:
        text = f"{p.name}: {flow(p.default_in(merge.dialect))}   the default: {p.doc[0].lower()}{p.doc[1:]}"
        lines.append(textwrap.fill(text, 108, initial_indent="    # ", subsequent_indent="    #   "))
    return lines


def _output(output: Output) -> list[str]:
    form = output.model_dump(mode="json", exclude_defaults=True)
    if not form:
        return []
    auto = "   # chat_template: auto is that of most models" if form.get("chat_template") == "auto" else ""
    return [f"output: {flow(form)}{auto}", ""]


def _dimension(text: str, start: _Start) -> int:
    """Return how many numbers the config searches; the text is checked on the way."""
    config: Config = parse_config(parse_yaml(text, "init"), Path("init"))
    layers = _LAYERS_OF_A_HUB_MODEL
    file = Path(start.base.source) / "config.json"
    if file.is_file():
        found = json.loads(file.read_text(encoding="utf-8"))
        layers = next((found[key] for key in DEPTH_KEYS if isinstance(found.get(key), int)), layers)
    sources = {"base": start.base, **start.experts}
    return CoefficientSpace(config, num_layers=layers, sources=sources).dimension
