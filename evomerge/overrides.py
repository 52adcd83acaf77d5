"""``--set a.b=value``: changes to a config before it is validated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from evomerge.errors import UserError
from evomerge.schema import parse_yaml, shown


def overridden(data: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return a copy of plain data with ``a.b=value`` strings applied in order; the values are YAML.

    List entries go by their number from 0. Keys that do not exist are made.

    Raises:
        UserError: a string without ``=``, or a place that cannot be.
    """
    data = _copy(data)
    for override in overrides:
        _override(data, override)
    return data


def _override(data: dict[str, Any], text: str) -> None:
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise UserError(f"--set {text}: write it as key=value, e.g. --set budget.candidates=100")
    node: Any = data
    parts, done = key.split("."), ""
    while parts:
        if isinstance(node, list):
            part, parts = parts[0], parts[1:]
            if not part.isdecimal() or int(part) >= len(node):
                raise UserError(
                    f"--set {text}: '{done}' is a list of {len(node)}; '{part}' is not the number of an entry "
                    f"(0 to {len(node) - 1})"
                )
            place: int | str = int(part)
        elif isinstance(node, dict):
            # Names may hold dots themselves: the longest one that exists is meant.
            length = next((n for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in node), 1)
            part, parts = ".".join(parts[:length]), parts[length:]
            place = part
        else:
            raise UserError(
                f"--set {text}: '{done}' is the plain value {shown(node)}, it has no key '{parts[0]}'"
            )
        if not parts:
            node[place] = parse_yaml(value, f"--set {text}")
        elif isinstance(node, dict) and node.get(place) is None:
            node[place] = {}
        node, done = node[place], f"{done}.{part}" if done else part


def _copy(data: Any) -> Any:
    """Copy plain data, so that what a YAML alias shares can be changed in one place."""
    if isinstance(data, dict):
        return {key: _copy(value) for key, value in data.items()}
    return [_copy(value) for value in data] if isinstance(data, list) else data
