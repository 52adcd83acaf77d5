"""What `evomerge methods` prints, as plain data."""

from __future__ import annotations

import textwrap
from typing import Any

from evomerge.methods.registry import Parameter, all_methods, get_method


def methods_table() -> list[dict[str, Any]]:
    """Return every merge method with its parameters, ready for JSON."""
    return [
        {
            "name": method.name,
            "summary": method.summary,
            "paper": method.paper,
            "inputs": {"least": method.inputs[0], "most": method.inputs[1]},
            "base": method.base,
            "bases": dict(method.bases),
            "random": method.random,
            "needs": method.needs or None,
            "dialects": list(method.dialects),
            "differs": method.differs or None,
            "parameters": [_entry(parameter, method.dialects) for parameter in method.parameters],
        }
        for method in all_methods().values()
    ]


def _entry(parameter: Parameter, dialects: tuple[str, ...]) -> dict[str, Any]:
    own = [dialect for dialect in dialects if dialect in (parameter.dialects or dialects)]
    return {
        "name": parameter.name,
        "scope": parameter.scope,
        "kind": parameter.kind,
        "dialects": own,
        "required": parameter.default_in(own[0]) is None,
        "default": parameter.default_in(own[0]),
        "defaults": {dialect: parameter.default_in(dialect) for dialect in own},
        "low": parameter.low,
        "high": parameter.high,
        "choices": list(parameter.choices),
        "doc": parameter.doc,
    }


def describe_methods(name: str | None = None) -> str:
    """Return the methods (or one of them) as text for people; ValueError for an unknown name."""
    if name is not None:
        get_method(name)
    return "\n\n".join(_describe(entry) for entry in methods_table() if name in (None, entry["name"]))


_BASE = {
    "origin": "differences are taken from the base",
    "optional origin": "differences are taken from the base, if one is given",
    "input": "the base is the first input",
    "optional input": "the base, if one is given, is the first input",
    "unused": "the base is not used",
}
_NEEDS = {
    "fisher": "a diagonal Fisher information of every input",
    "gram": "the Gram matrices of every input's layer inputs",
    "merged gram": "the Gram matrices of the layer inputs that the merged layers below give",
}


def _roles(entry: dict[str, Any]) -> str:
    """Return what the base is for, by dialect where they differ."""
    differing = (f"{_BASE[role]} in dialect {dialect}" for dialect, role in entry["bases"].items())
    return ", ".join([_BASE[entry["base"]], *differing])


def markdown_entry(name: str) -> str:
    """Return what the registry says of a method, for docs/methods.md; ValueError for an unknown name."""
    get_method(name)
    (entry,) = (entry for entry in methods_table() if entry["name"] == name)
    facts = _facts(entry)
    if entry["needs"]:
        facts.append(f"needs data: {_NEEDS[entry['needs']]}")
    blocks = [entry["summary"], _capital("; ".join([*facts, f"source: {entry['paper']}"])) + "."]
    if entry["differs"]:
        blocks.append(f"Dialects: {entry['differs']}")
    items = [
        f"- `{parameter['name']}` ({', '.join(_parameter_facts(parameter, entry['dialects']))}): {parameter['doc']}"
        for parameter in entry["parameters"]
    ]
    lines = ["\n".join(_wrap(item, 0, 118, hanging=2)) for item in items]
    return "\n\n".join([*("\n".join(_wrap(block, 0, 118)) for block in blocks), "\n".join(lines)]).rstrip()


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _facts(entry: dict[str, Any]) -> list[str]:
    least, most = entry["inputs"]["least"], entry["inputs"]["most"]
    inputs = (
        f"exactly {least}" if least == most else f"{least} or more" if most is None else f"{least} to {most}"
    )
    facts = [f"inputs: {inputs}", _roles(entry), f"dialects: {', '.join(entry['dialects'])}"]
    if entry["random"]:
        facts.append("draws masks from the seed")
    return facts


def _describe(entry: dict[str, Any]) -> str:
    lines = [entry["name"], *_wrap(entry["summary"], 2), *_wrap("; ".join(_facts(entry)), 2)]
    if entry["needs"]:
        lines += _wrap(f"needs data: {_NEEDS[entry['needs']]}", 2)
    if entry["differs"]:
        lines += _wrap(f"dialects differ: {entry['differs']}", 2)
    lines += _wrap(f"source: {entry['paper']}", 2)
    for parameter in entry["parameters"]:
        lines += _wrap(_parameter(parameter, entry["dialects"]), 4)
    return "\n".join(lines)


def _wrap(text: str, indent: int, width: int = 100, hanging: int | None = None) -> list[str]:
    further = (indent + 2 if indent else 0) if hanging is None else hanging
    return textwrap.wrap(
        text, width, initial_indent=" " * indent, subsequent_indent=" " * further, break_on_hyphens=False
    )


def _parameter(parameter: dict[str, Any], dialects: list[str]) -> str:
    return f"{parameter['name']} ({', '.join(_parameter_facts(parameter, dialects))}): {parameter['doc']}"


def _parameter_facts(parameter: dict[str, Any], dialects: list[str]) -> list[str]:
    facts = ["one per expert" if parameter["scope"] == "expert" else "one for all"]
    if parameter["dialects"] != dialects:
        facts.append(f"{' and '.join(parameter['dialects'])} only")
    facts.append("required" if parameter["required"] else f"default {_word(parameter['default'])}")
    for dialect, default in parameter["defaults"].items():
        if default != parameter["default"]:
            facts.append(f"in {dialect} {_word(default)}")
    if parameter["choices"]:
        facts.append(" | ".join(parameter["choices"]))
    elif parameter["low"] is not None or parameter["high"] is not None:
        low = "-inf" if parameter["low"] is None else f"{parameter['low']:g}"
        high = "inf" if parameter["high"] is None else f"{parameter['high']:g}"
        facts.append(f"in [{low}, {high}]")
    return facts


def _word(value: object) -> str:
    return (
        str(value).lower()
        if isinstance(value, bool)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )
