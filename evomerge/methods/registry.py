"""The registry of merge methods: what each one is called, takes and needs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from evomerge.errors import nearest

if TYPE_CHECKING:
    from evomerge.methods.kernels import Kernel

BaseRole = Literal["origin", "optional origin", "input", "optional input", "unused"]
"""``origin``: deltas are taken from the base; ``input``: the base is merged too, as the first input."""

Scope = Literal["expert", "shared"]
Needs = Literal["", "fisher", "gram", "merged gram"]


@dataclass(frozen=True)
class Parameter:
    """One parameter of a merge method.

    Attributes:
        name: as written in configs and recipes.
        scope: ``expert`` has a value for each input, ``shared`` one for the merge.
        doc: one sentence for `evomerge methods`.
        default: value when absent; None means that a value is required.
        low, high: bounds, inclusive; None means unbounded.
        kind: ``float``, ``int``, ``bool`` or ``choice``.
        choices: the accepted words of a ``choice``.
        dialects: the dialects that have it; empty: all.
        defaults: defaults that differ from `default`, by dialect.
    """

    name: str
    scope: Scope
    doc: str
    default: float | bool | str | None = None
    low: float | None = None
    high: float | None = None
    kind: Literal["float", "int", "bool", "choice"] = "float"
    choices: tuple[str, ...] = ()
    dialects: tuple[str, ...] = ()
    defaults: Mapping[str, float | bool | str] = field(default_factory=dict)

    def default_in(self, dialect: str) -> float | bool | str | None:
        """Return the default in a dialect; None means that a value is required."""
        return self.defaults.get(dialect, self.default)

    def check(self, value: object, place: str) -> None:
        """Raise ValueError, naming `place`, unless `value` is one that the parameter accepts."""
        if self.kind == "bool":
            if not isinstance(value, bool):
                raise ValueError(f"{place}: {value!r} is neither true nor false")
            return
        if self.kind == "choice":
            if value not in self.choices:
                raise ValueError(f"{place}: {value!r} is not one of {', '.join(self.choices)}")
            return
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{place}: {value!r} is not a finite number")
        if self.kind == "int" and not float(value).is_integer():
            raise ValueError(f"{place}: {value!r} is not a whole number")
        if (self.low is not None and value < self.low) or (self.high is not None and value > self.high):
            raise ValueError(f"{place}: {value!r} lies outside {self.bounds}")

    @property
    def bounds(self) -> str:
        """The accepted interval, e.g. ``[0, 1]``, or an empty string."""
        if self.low is None and self.high is None:
            return ""
        low = "(-inf" if self.low is None else f"[{self.low:g}"
        high = "inf)" if self.high is None else f"{self.high:g}]"
        return f"{low}, {high}"


@dataclass(frozen=True)
class MergeMethod:
    """A merge method: its declaration and its kernels.

    Attributes:
        name: as written in configs and recipes.
        summary: one sentence.
        paper: where it comes from.
        inputs: smallest and largest number of inputs (None: no limit).
        base: what the base is for (`BaseRole`); an optional one may be absent.
        parameters: declared parameters, in order.
        kernels: the arithmetic of each dialect (`evomerge.methods.kernels`); the first is the default.
        random: whether it draws masks, so that the recipe's seed matters.
        on_device: whether its arithmetic runs on a GPU as well; otherwise the CPU does it.
        needs: statistics of the inputs that it weighs them with: ``fisher`` (a diagonal Fisher information
            per weight), ``gram`` (the Gram matrix of each linear layer's inputs), ``merged gram`` (likewise, of the
            inputs that the merged layers below give), or nothing.
        differs: what sets the dialects apart, in a sentence or two; empty for a method with one dialect.
        bases: roles of the base that differ from `base`, by dialect.
    """

    name: str
    summary: str
    paper: str
    inputs: tuple[int, int | None]
    base: BaseRole
    parameters: tuple[Parameter, ...]
    kernels: Mapping[str, Kernel]
    random: bool = False
    on_device: bool = False
    needs: Needs = ""
    differs: str = ""
    bases: Mapping[str, BaseRole] = field(default_factory=dict)

    @property
    def dialects(self) -> tuple[str, ...]:
        """The variants on offer, the default first."""
        return tuple(self.kernels)

    def parameters_in(self, dialect: str) -> tuple[Parameter, ...]:
        """Return the parameters that a dialect has."""
        return tuple(p for p in self.parameters if not p.dialects or dialect in p.dialects)

    def defaults(self, dialect: str = "paper") -> dict[str, float | bool | str]:
        """Return the default, in a dialect, of each of its parameters that has one."""
        found = {p.name: p.default_in(dialect) for p in self.parameters_in(dialect)}
        return {name: value for name, value in found.items() if value is not None}

    def base_in(self, dialect: str) -> BaseRole:
        """Return what the base is for in a dialect."""
        return self.bases.get(dialect, self.base)

    def merged(self, base: str | None, inputs: Sequence[str], dialect: str) -> tuple[str, ...]:
        """Return the models that are merged with each other: the inputs, after a base that counts as one."""
        if base is None or not self.base_in(dialect).endswith("input"):
            return tuple(inputs)
        return (base, *(name for name in inputs if name != base))

    def check_inputs(
        self, base: str | None, inputs: Sequence[str], place: str, dialect: str = "paper"
    ) -> None:
        """Raise ValueError, naming `place`, unless the method can merge these models."""
        low, high = self.inputs
        role = self.base_in(dialect)
        if role in ("origin", "input") and base is None:
            use = "to take differences from" if role == "origin" else "as the first of the models it merges"
            raise ValueError(f"{place}: {self.name} needs a base {use}")
        if role.endswith("origin") and base in inputs:
            raise ValueError(
                f"{place}: '{base}' is the base and an input; {self.name} needs experts as inputs"
            )
        count = len(self.merged(base, inputs, dialect))
        if count < low or (high is not None and count > high):
            wanted = (
                f"exactly {low}" if low == high else f"at least {low}" if high is None else f"{low} to {high}"
            )
            wanted += " input" if high == 1 else " inputs"
            counted = " with the base" if role.endswith("input") and base is not None else ""
            raise ValueError(f"{place}: {self.name} takes {wanted}, here are {count}{counted}")


_METHODS: dict[str, MergeMethod] = {}


def register(method: MergeMethod) -> MergeMethod:
    """Add a method under its name; a name can be taken once."""
    if method.name in _METHODS:
        raise ValueError(f"merge method '{method.name}' is registered twice")
    for dialect in method.dialects:
        each = [p.name for p in method.parameters_in(dialect) if p.scope == "expert"]
        if each and method.base_in(dialect).endswith("input"):
            raise ValueError(f"{method.name}: the base as an input has no value of its own for '{each[0]}'")
    _METHODS[method.name] = method
    return method


def get_method(name: str) -> MergeMethod:
    """Return a method by name; ValueError names the nearest known one."""
    methods = all_methods()
    if name not in methods:
        raise ValueError(
            f"unknown merge method '{name}'{nearest(name, methods)}; known: {', '.join(methods)}"
        )
    return methods[name]


def all_methods() -> dict[str, MergeMethod]:
    """Return every method by name, sorted by it."""
    return dict(sorted(_METHODS.items()))
