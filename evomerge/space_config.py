"""The config's `space`: what may vary, and over which experts, depths and roles."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from evomerge.checkpoints.names import ROLES, Role
from evomerge.data_config import Data
from evomerge.errors import nearest
from evomerge.methods.registry import get_method
from evomerge.schema import Frozen, Number, Positive, Whole, shown, two_ends


class Groups(Frozen):
    """Depth cut into n groups of consecutive layers, one value each."""

    groups: Positive


class Smooth(Frozen):
    """b control values at equal depths, linear in between."""

    smooth: Annotated[Whole, Field(ge=2)]


Depth = Literal["global", "layers"] | Groups | Smooth


class ParameterSpec(Frozen):
    """How one merge parameter is set: fixed (`value`), searched in a `range`, or out of `choices`.

    Attributes:
        initial: where the search starts: one value, or of a range one for each control value over depth (the
            roles embedding and head, where they have values of their own, take the first and the last).
        per: ``expert`` (each its own), ``shared``, or the name of one expert; None: by the method's scope.
        depth: how the value may change with depth.
        roles: ``all``, or the roles that get values of their own; ``other`` is the remainder.
        tensors: shell-style pattern on tensor names; the specification holds for those only.
    """

    value: bool | float | str | None = None
    range: tuple[Number, Number] | None = None
    choices: tuple[bool | float | str, ...] | None = None
    initial: bool | float | str | tuple[Number, ...] | None = None
    log: bool = False
    integer: bool = False
    per: str | None = None
    depth: Depth = "global"
    roles: Literal["all"] | tuple[Role, ...] = "all"
    tensors: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_literal(cls, data: Any) -> Any:
        return data if isinstance(data, dict | ParameterSpec) else {"value": data}

    @field_validator("roles", mode="before")
    @classmethod
    def _known_roles(cls, roles: Any) -> Any:
        if isinstance(roles, str) and roles != "all":
            raise ValueError(
                f"'{roles}' is not accepted: give all, or a list of roles, e.g. [attention, mlp, other]"
            )
        for role in roles if isinstance(roles, list | tuple) else []:
            if role not in ROLES:
                raise ValueError(
                    f"unknown role '{role}'{nearest(str(role), ROLES)}; roles: {', '.join(ROLES)}"
                )
        return roles

    _two_ends = field_validator("range", mode="before")(two_ends)

    @field_validator("depth", mode="before")
    @classmethod
    def _known_depth(cls, depth: Any) -> Any:
        if isinstance(depth, dict) and len(depth) == 1 and not depth.keys().isdisjoint(("groups", "smooth")):
            return Groups(**depth) if "groups" in depth else Smooth(**depth)
        if depth not in ("global", "layers") and not isinstance(depth, Groups | Smooth):
            raise ValueError(
                f"{shown(depth)} is not accepted: give global, layers, {{groups: n}} with n >= 1, "
                "or {smooth: b} with b >= 2"
            )
        return depth

    @model_validator(mode="after")
    def _one_kind(self) -> ParameterSpec:
        given = [k for k in ("value", "range", "choices") if getattr(self, k) is not None]
        if not given:
            raise ValueError(
                "nothing is given; write a plain value, {range: [low, high]} or {choices: [...]}"
            )
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other; give one of them")
        if self.range is not None:
            self._check_range(*self.range)
        elif self.log or self.integer:
            raise ValueError(f"{'log' if self.log else 'integer'}: needs a range")
        if self.choices is not None:
            if len(set(self.choices)) < max(2, len(self.choices)):
                raise ValueError(
                    f"choices: {shown(self.choices)} is not accepted: give two or more different values"
                )
            if self.initial is not None and self.initial not in self.choices:
                raise ValueError(
                    f"initial: {shown(self.initial)} is not one of the choices {shown(self.choices)}"
                )
        if self.value is not None and self.initial is not None:
            raise ValueError("initial: a fixed value has none; leave it out")
        return self

    def _check_range(self, low: float, high: float) -> None:
        ends = shown([low, high])
        if not low < high:
            raise ValueError(f"range: {ends} is empty; the first number must be the smaller one")
        if self.log and low <= 0:
            raise ValueError(f"range: {ends} is not accepted: with log it must start above 0")
        starts = self.initial if isinstance(self.initial, tuple) else (self.initial,)
        for start in starts:
            if start is not None and (isinstance(start, bool | str) or not low <= start <= high):
                raise ValueError(f"initial: {shown(start)} lies outside the range {ends}")
        if isinstance(self.initial, tuple):
            self._check_count(len(self.initial))

    def _check_count(self, count: int) -> None:
        depth = self.depth
        if depth == "global":
            raise ValueError("initial: a list needs a depth with one control value for each of its numbers")
        wanted = (
            depth.groups if isinstance(depth, Groups) else depth.smooth if isinstance(depth, Smooth) else None
        )
        if wanted is not None and count != wanted:
            raise ValueError(f"initial: has {count} numbers, depth asks for {wanted}")

    @property
    def searched(self) -> bool:
        """Whether the optimiser varies it."""
        return self.value is None


class Space(Frozen):
    """What may vary: the parameters of one merge method, over experts, depth and roles.

    Attributes:
        base: false keeps models.base out of the arithmetic of a method for which a base is optional.
        data: texts for methods that weigh the experts with what data says of them.
    """

    type: Literal["coefficients"] = "coefficients"
    method: str
    dialect: Literal["paper", "mergekit"] = "paper"
    base: bool = True
    data: Data | None = None
    parameters: dict[str, tuple[ParameterSpec, ...]] = Field(default_factory=dict)

    @field_validator("parameters", mode="before")
    @classmethod
    def _lists(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {name: value if isinstance(value, list | tuple) else [value] for name, value in data.items()}

    @field_validator("method")
    @classmethod
    def _known_method(cls, name: str) -> str:
        return get_method(name).name

    @model_validator(mode="after")
    def _fits_method(self) -> Space:
        method = get_method(self.method)
        known = {parameter.name: parameter for parameter in method.parameters_in(self.dialect)}
        if self.dialect not in method.dialects:
            raise ValueError(
                f"dialect: {method.name} has no dialect {self.dialect} (known: {', '.join(method.dialects)})"
            )
        if method.needs == "merged gram":
            raise ValueError(
                f"method: {method.name} cannot be searched: its layer inputs are other ones for every candidate; "
                "search regmean, or use regmean++ with 'evomerge merge'"
            )
        if method.needs and self.data is None:
            raise ValueError(
                f"{method.name} needs data for every expert; add e.g. data: {{texts: ./texts.jsonl}}"
            )
        role = method.base_in(self.dialect)
        if not self.base and not role.startswith("optional"):
            reason = "does without one anyway" if role == "unused" else "cannot do without one"
            raise ValueError(f"base: false is not accepted: {method.name} {reason}; leave it out")
        for name, specs in self.parameters.items():
            if not specs:
                raise ValueError(
                    f"parameters.{name}: is empty; write a plain value or {{range: [low, high]}}"
                )
            if name not in known:
                hint = nearest(name, known) or f" (known: {', '.join(known)})"
                raise ValueError(f"parameters: {method.name} has no parameter '{name}'{hint}")
            for spec in specs:
                for key in ("value", "range", "choices"):
                    given = getattr(spec, key)
                    place = f"parameters.{name}" if key == "value" else f"parameters.{name}.{key}"
                    for value in given if isinstance(given, tuple) else () if given is None else (given,):
                        known[name].check(value, place)
                if spec.per not in (None, "shared") and known[name].scope == "shared":
                    raise ValueError(
                        f"parameters.{name}.per: '{spec.per}' is not accepted: "
                        f"{method.name} has one {name} for all inputs"
                    )
        return self
