"""Which entry of a parameter's configuration holds for which expert, role and tensor."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from evomerge.checkpoints.names import ROLES, Role
from evomerge.methods.registry import Parameter
from evomerge.space_config import ParameterSpec

SHARED = ""
"""Stands for all experts together."""


@dataclass(frozen=True)
class Tier:
    """The tensors of one role that match a pattern and none of an earlier tier; without pattern: the rest.

    Attributes:
        pattern: shell-style pattern on tensor names, or None.
        entries: recipient (an expert, or `SHARED`) → index of the entry that holds, or None for the default.
    """

    pattern: str | None
    entries: dict[str, int | None]


def slots(spec: ParameterSpec) -> dict[Role, str]:
    """Return the roles that an entry speaks of, each with the name of the value that it takes.

    ``other`` in a list stands for every role not listed.
    """
    if spec.roles == "all":
        return dict.fromkeys(ROLES, "")
    rest = "other" in spec.roles
    return {role: role if role in spec.roles else "other" for role in ROLES if rest or role in spec.roles}


def recipient_of(spec: ParameterSpec, recipient: str) -> str:
    """Return whose value a recipient takes from an entry: its own, or one shared by all it covers."""
    return SHARED if spec.per == "shared" else recipient


def tiers_by_role(
    parameter: Parameter,
    specs: Sequence[ParameterSpec],
    experts: Sequence[str],
    method: str,
    dialect: str,
) -> dict[Role, tuple[Tier, ...]]:
    """Resolve a parameter's entries: for each expert, role and tensor the first entry that speaks of it.

    What no entry speaks of takes the parameter's default.

    Raises:
        ValueError: something has neither an entry nor a default; an entry is never used; or the entry would
            depend on whether two patterns match the same tensor.
    """
    recipients = tuple(experts) if parameter.scope == "expert" else (SHARED,)
    chains = {(who, role): _chain(specs, who, role) for who in recipients for role in ROLES}
    if parameter.default_in(dialect) is None:
        _check_covered(chains, specs, recipients, method)
    used = {index for chain in chains.values() for index in chain}
    for index in range(len(specs)):
        if index not in used:
            raise ValueError(f"entry {index + 1} is never used: the entries before it cover all it speaks of")
    return {role: _tiers({who: chains[who, role] for who in recipients}, specs) for role in ROLES}


def _chain(specs: Sequence[ParameterSpec], who: str, role: Role) -> list[int]:
    """Entries that may hold for an expert and a role, each with a pattern of its own, the last without."""
    chain: list[int] = []
    for index, spec in enumerate(specs):
        if spec.per not in (None, "expert", "shared", who) or role not in slots(spec):
            continue
        if spec.tensors in [specs[i].tensors for i in chain]:
            continue
        chain.append(index)
        if spec.tensors is None:
            break
    return chain


def _check_covered(
    chains: dict[tuple[str, Role], list[int]],
    specs: Sequence[ParameterSpec],
    recipients: Sequence[str],
    method: str,
) -> None:
    def missing(who: str) -> list[Role]:
        return [role for role in ROLES if all(specs[i].tensors is not None for i in chains[who, role])]

    why = f"{method} has no default for it"
    uncovered = [who for who in recipients if not any(chains[who, role] for role in ROLES)]
    if uncovered:
        raise ValueError(
            f"no entry gives a value to {', '.join(uncovered)}, and {why}; add one with 'per: expert'"
        )
    for who in recipients:
        of = f" of {who}" if who else ""
        empty = [role for role in missing(who) if not chains[who, role]]
        if empty:
            raise ValueError(
                f"the roles {', '.join(empty)}{of} have no value, and {why}; add 'other' to the list of roles"
            )
        if missing(who):
            raise ValueError(
                f"tensors{of} that match no pattern have no value, and {why}; add an entry without 'tensors'"
            )


def _tiers(chains: dict[str, list[int]], specs: Sequence[ParameterSpec]) -> tuple[Tier, ...]:
    order = sorted({index for chain in chains.values() for index in chain})
    patterns = list(dict.fromkeys(p for i in order if (p := specs[i].tensors) is not None))
    tiers = []
    for place, pattern in enumerate([*patterns, None]):
        later = patterns[place + 1 :]
        tiers.append(
            Tier(pattern, {who: _first(chain, specs, pattern, later) for who, chain in chains.items()})
        )
    return tuple(tiers)


def _first(
    chain: Sequence[int], specs: Sequence[ParameterSpec], pattern: str | None, later: Sequence[str]
) -> int | None:
    """First entry that holds for a tensor matching `pattern` but none of the patterns before it."""
    for index in chain:
        other = specs[index].tensors
        if other is None or other == pattern:
            return index
        if pattern is not None and other in later and _may_overlap(pattern, other):
            raise ValueError(
                f"the patterns '{pattern}' and '{other}' may match the same tensor but stand in entries of "
                "different experts; give every expert both patterns in one order, or make them exclusive"
            )
    return None


def _may_overlap(one: str, two: str) -> bool:
    """Whether two patterns can match one name, as far as their literal beginnings and ends tell."""
    heads = [re.split(r"[*?\[]", p, maxsplit=1)[0] for p in (one, two)]
    tails = [re.split(r"[*?\]]", p)[-1] for p in (one, two)]
    return any(heads[i].startswith(heads[1 - i]) for i in (0, 1)) and any(
        tails[i].endswith(tails[1 - i]) for i in (0, 1)
    )
