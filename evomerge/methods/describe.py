"""What `evomerge methods` prints, as plain data."""

from __future__ import annotations

import textwrap
from typing import Any

from evomerge.methods.registry import all_methods, get_method


def methods_table() -> list[dict[str, Any]]:
    """Return every merge method with its parameters, ready for JSON."""
    return [
        {
            "name": method.name,
            "summary": method.summary,
            "paper": method.paper,
            "inputs": {"least": method.inputs[0], "most": method.inputs[1]},
            "base": method.base,
            "random": method.random,
            "dialects": list(method.dialects),
            "parameters": [
                {
                    "name": parameter.name,
                    "scope": parameter.scope,
                    "kind": parameter.kind,
                    "required": parameter.default is None,
                    "default": parameter.default,
                    "low": parameter.low,
                    "high": parameter.high,
                    "choices": list(parameter.choices),
                    "doc": parameter.doc,
                }
                for parameter in method.parameters
            ],
        }
        for method in all_methods().values()
    ]


def describe_methods(name: str | None = None) -> str:
    """Return the methods (or one of them) as text for people; ValueError for an unknown name."""
    if name is not None:
        get_method(name)
    return "\n\n".join(_describe(entry) for entry in methods_table() if name in (None, entry["name"]))


_BASE = {
    "origin": "differences are taken from the base",
    "input": "the base is one of the inputs",
    "unused": "the base is not used",
}


def _describe(entry: dict[str, Any]) -> str:
    least, most = entry["inputs"]["least"], entry["inputs"]["most"]
    inputs = (
        f"exactly {least}" if least == most else f"{least} or more" if most is None else f"{least} to {most}"
    )
    lines = [
        entry["name"],
        *(f"  {line}" for line in textwrap.wrap(entry["summary"], 100)),
        f"  inputs: {inputs}; {_BASE[entry['base']]}; dialects: {', '.join(entry['dialects'])}"
        + ("; draws masks from the seed" if entry["random"] else ""),
        *textwrap.wrap(entry["paper"], 100, initial_indent="  source: ", subsequent_indent="    "),
    ]
    for parameter in entry["parameters"]:
        lines += textwrap.wrap(_parameter(parameter), 100, initial_indent="    ", subsequent_indent="      ")
    return "\n".join(lines)


def _parameter(parameter: dict[str, Any]) -> str:
    scope = "one per expert" if parameter["scope"] == "expert" else "one for all"
    facts = [scope, "required" if parameter["required"] else f"default {_word(parameter['default'])}"]
    if parameter["choices"]:
        facts.append(" | ".join(parameter["choices"]))
    elif parameter["low"] is not None or parameter["high"] is not None:
        low = "-inf" if parameter["low"] is None else f"{parameter['low']:g}"
        high = "inf" if parameter["high"] is None else f"{parameter['high']:g}"
        facts.append(f"in [{low}, {high}]")
    return f"{parameter['name']} ({', '.join(facts)}): {parameter['doc']}"


def _word(value: object) -> str:
    return (
        str(value).lower()
        if isinstance(value, bool)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )
