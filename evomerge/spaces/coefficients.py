"""The space of merge coefficients: one method, its parameters over experts, depth and roles."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from evomerge.checkpoints.names import ROLES, Position, Role, TensorName
from evomerge.config import Config
from evomerge.errors import UserError, at
from evomerge.layers_config import MERGED
from evomerge.methods.registry import Parameter, get_method
from evomerge.recipe import Merge, Recipe, Rule, Source
from evomerge.settings import Scalar, Value
from evomerge.space_config import Depth, ParameterSpec, Smooth
from evomerge.spaces.chains import SHARED, Tier, recipient_of, slots, tiers_by_role
from evomerge.spaces.depth import check_depth, control_names, over_depth, positions
from evomerge.spaces.describe import describe_recipe, show, table
from evomerge.spaces.genotype import Coordinate, Genotype, Variation, check_length
from evomerge.spaces.units import make_coordinate, to_value


@dataclass(frozen=True)
class _Curve:
    """One parameter's values over depth, for one expert or all, and one set of roles.

    Attributes:
        spec: the entry of the config.
        depth: the entry's depth; ``global`` where the roles occur at one position only.
        slot: the role whose values these are, or nothing.
        start, stop: its coordinates in the genotype; none for a fixed value.
    """

    spec: ParameterSpec
    depth: Depth
    slot: str
    start: int
    stop: int


@dataclass(frozen=True)
class _Field:
    """A parameter with the curve that holds for each role, tier and recipient (None: the default)."""

    parameter: Parameter
    tiers: dict[Role, tuple[Tier, ...]]
    curves: dict[tuple[int, str, str], _Curve]
    specs: tuple[ParameterSpec, ...]


class CoefficientSpace:
    """Maps genotypes to recipes with one merge, named ``merged``.

    Each parameter of the config has one or several entries; an expert's value for a tensor comes from the
    first entry that speaks of the expert, the tensor's role and its name, else from the method's default.
    An entry has one control value, or several over depth (`evomerge.spaces.depth`), for each expert (or one
    for all, ``per: shared``) and each listed role. The roles embedding and head occur at one position only
    and take one value whatever the depth.

    Attributes:
        coordinates: the searched numbers, by parameter in the method's order, then by entry,
            expert, role and depth.
        initial: the genotype where the search starts.
        variation, anchor: none; coefficients vary number by number, and few of their merges are broken.
    """

    variation: Variation | None = None
    anchor: Recipe | None = None

    def __init__(
        self,
        config: Config,
        *,
        num_layers: int,
        sources: Mapping[str, Source],
        file: Path | str | None = None,
    ) -> None:
        """Lay out the coordinates.

        Args:
            config: a validated config.
            num_layers: number of layers of the models, at least 1.
            sources: name → source for ``base`` and every expert; they go into the recipes as they are.
            file: the config file, for messages.

        Raises:
            UserError: a parameter's entries do not fit the method, the experts or the number of layers.
        """
        assert config.coefficients is not None, "the config searches coefficients"
        self._config = config
        self._space = space = config.coefficients
        self._method = get_method(space.method)
        self._uses_base = space.base and self._method.base_in(space.dialect) != "unused"
        self._layers = num_layers
        self._experts = tuple(config.models.experts)
        self._models = {name: sources[name] for name in ("base", *self._experts)}
        self._output = config.form
        coordinates: list[Coordinate] = []
        self._fields: list[_Field] = []
        for parameter in self._method.parameters_in(space.dialect):
            specs = space.parameters.get(parameter.name)
            if specs is not None:
                try:
                    self._fields.append(self._lay_out(parameter, specs, coordinates))
                except ValueError as error:
                    raise UserError(f"{at(file, f'space.parameters.{parameter.name}')}{error}") from None
        self.coordinates = tuple(coordinates)
        self.initial: Genotype = tuple(coordinate.initial for coordinate in coordinates)

    @property
    def dimension(self) -> int:
        """Number of coordinates."""
        return len(self.coordinates)

    def decode(self, genotype: Genotype) -> Recipe:
        """Return the recipe of a genotype; its coordinate's initial gives `initial` exactly.

        Raises:
            ValueError: wrong length, or a number outside its coordinate's domain.
        """
        check_length(genotype, self.dimension)
        parameters: dict[str, Value] = {}
        patterned: list[Rule] = []
        general: dict[tuple[tuple[Position, ...] | None, tuple[Role, ...] | None], dict[str, Value]] = {}
        for field in self._fields:
            name = field.parameter.name
            patterns = dict.fromkeys(tier.pattern for tiers in field.tiers.values() for tier in tiers)
            for pattern in sorted(patterns, key=lambda p: _first_use(p, field.specs)):
                for layers, roles, value in self._regions(field, pattern, genotype):
                    if pattern is not None:
                        rule = Rule(layers=layers, roles=roles, tensors=pattern, parameters={name: value})
                        patterned.append(rule)
                    elif layers is None and roles is None:
                        parameters[name] = value
                    else:
                        general.setdefault((layers, roles), {})[name] = value
        rules = [Rule(layers=layers, roles=roles, parameters=p) for (layers, roles), p in general.items()]
        merge = Merge(
            method=self._method.name,
            base="base" if self._uses_base else None,
            inputs=self._experts,
            dialect=self._space.dialect,
            data=self._space.data,
            parameters=parameters,
            rules=(*patterned, *rules),
        )
        return Recipe(
            models=self._models, merges={MERGED: merge}, output=self._output, seed=self._config.seed
        )

    def penalty(self, recipe: Recipe) -> float:
        """Return 0: all recipes of the space cost the same."""
        return 0.0

    def describe(self, what: Genotype | Recipe) -> str:
        """Return a table to read: a genotype's control values, or all values of a recipe."""
        if isinstance(what, Recipe):
            return describe_recipe(what)
        rows = []
        for field in self._fields:
            for (_, who, slot), curve in field.curves.items():
                values = self._controls(curve, what)
                names = control_names(curve.depth, self._layers) if len(values) > 1 else ("",)
                shown = [f"{n}: {show(v)}" if n else show(v) for n, v in zip(names, values, strict=True)]
                tensors = curve.spec.tensors or "all"
                fixed = "" if curve.spec.searched else "fixed"
                rows.append(
                    [field.parameter.name, who or "all", slot or "all", tensors, "  ".join(shown), fixed]
                )
        return table(["parameter", "expert", "roles", "tensors", "values", ""], rows)

    def idle(self, tensors: Iterable[TensorName]) -> list[str]:
        """Return the names of the searched values, without the places over depth, that no tensor takes."""
        known = list(tensors)
        idle = []
        for field in self._fields:
            taken = {key for tensor in known for key in self._taken(field, tensor)}
            for key, curve in field.curves.items():
                if curve.start < curve.stop and key not in taken:
                    idle.append(self.coordinates[curve.start].name.partition("@")[0])
        return idle

    def _taken(self, field: _Field, tensor: TensorName) -> Iterator[tuple[int, str, str]]:
        """Yield the keys of the curves that give a tensor its values."""
        tiers = field.tiers[tensor.role]
        tier = next(
            tier for tier in tiers if tier.pattern is None or fnmatch.fnmatchcase(tensor.name, tier.pattern)
        )
        for who, index in tier.entries.items():
            if index is not None:
                spec = field.specs[index]
                yield index, recipient_of(spec, who), slots(spec)[tensor.role]

    def _lay_out(
        self, parameter: Parameter, specs: tuple[ParameterSpec, ...], coordinates: list[Coordinate]
    ) -> _Field:
        tiers = tiers_by_role(parameter, specs, self._experts, self._method.name, self._space.dialect)
        keys = {
            (index, recipient_of(specs[index], who), slots(specs[index])[role]): None
            for role, role_tiers in tiers.items()
            for tier in role_tiers
            for who, index in tier.entries.items()
            if index is not None
        }
        order = {name: i for i, name in enumerate((SHARED, *self._experts))}
        curves: dict[tuple[int, str, str], _Curve] = {}
        for index, who, slot in sorted(
            keys, key=lambda k: (k[0], order[k[1]], _slot_order(specs[k[0]], k[2]))
        ):
            spec = specs[index]
            check_depth(spec.depth, self._layers)
            if spec.choices is not None and isinstance(spec.depth, Smooth):
                raise ValueError("choices cannot be interpolated; use depth: {groups: n} or layers")
            depth: Depth = "global" if slot in ("embedding", "head") else spec.depth
            start = len(coordinates)
            if spec.searched:
                name = parameter.name + (f"[{who}]" if who else "") + (f".{slot}" if slot else "")
                name += f" {spec.tensors}" if spec.tensors else ""
                places = control_names(depth, self._layers)
                for place, initial in zip(places, _starts(spec, slot, len(places)), strict=True):
                    label = name + (f"@{place}" if place else "")
                    coordinates.append(make_coordinate(label, spec, initial))
            curves[index, who, slot] = _Curve(spec, depth, slot, start, len(coordinates))
        return _Field(parameter, tiers, curves, specs)

    def _controls(self, curve: _Curve, genotype: Genotype) -> list[Scalar]:
        if curve.spec.value is not None:
            return [curve.spec.value]
        values: list[Scalar] = []
        place = slice(curve.start, curve.stop)
        starts = _starts(curve.spec, curve.slot, curve.stop - curve.start)
        for coordinate, number, initial in zip(self.coordinates[place], genotype[place], starts, strict=True):
            value = to_value(coordinate, number)
            values.append(initial if initial is not None and number == coordinate.initial else value)
        return values

    def _curve_values(self, curve: _Curve, genotype: Genotype) -> tuple[Scalar, ...]:
        controls = self._controls(curve, genotype)
        depth = curve.depth if curve.spec.searched else "global"
        return over_depth(controls, depth, self._layers, log=curve.spec.log, integer=curve.spec.integer)

    def _regions(
        self, field: _Field, pattern: str | None, genotype: Genotype
    ) -> list[tuple[tuple[Position, ...] | None, tuple[Role, ...] | None, Value]]:
        """Cut one tier of a parameter into regions of one value: roles with equal values, runs of layers."""
        places = positions(self._layers)
        values = {key: self._curve_values(curve, genotype) for key, curve in field.curves.items()}
        columns: dict[tuple[tuple[Scalar, ...], ...], list[Role]] = {}
        recipients: tuple[str, ...] = ()
        for role, tiers in field.tiers.items():
            tier = next((tier for tier in tiers if tier.pattern == pattern), None)
            if tier is None or all(index is None for index in tier.entries.values()):
                continue
            recipients = tuple(tier.entries)
            column = []
            for who, index in tier.entries.items():
                if index is None:
                    default = field.parameter.default_in(self._space.dialect)
                    assert default is not None, "a required parameter is covered"
                    column.append((default,) * len(places))
                else:
                    spec = field.specs[index]
                    column.append(values[index, recipient_of(spec, who), slots(spec)[role]])
            columns.setdefault(tuple(column), []).append(role)
        regions = []
        for rows, roles in columns.items():
            runs: list[tuple[tuple[Scalar, ...], list[Position]]] = []
            for place, row in zip(places, zip(*rows, strict=True), strict=True):
                if runs and runs[-1][0] == row:
                    runs[-1][1].append(place)
                else:
                    runs.append((row, [place]))
            for row, members in runs:
                regions.append(
                    (
                        None if len(runs) == 1 else tuple(members),
                        None if len(roles) == len(ROLES) else tuple(roles),
                        _value(recipients, row),
                    )
                )
        return regions


def _starts(spec: ParameterSpec, slot: str, count: int) -> Sequence[Scalar | None]:
    """Return where each control value starts; None: in the middle.

    Raises:
        ValueError: the config gives another number of them.
    """
    if not isinstance(spec.initial, tuple):
        return [spec.initial] * count
    if slot in ("embedding", "head"):
        return [spec.initial[0 if slot == "embedding" else -1]]
    if len(spec.initial) != count:
        raise ValueError(f"initial: has {len(spec.initial)} numbers, the model's depth asks for {count}")
    return spec.initial


def _value(recipients: Sequence[str], row: Sequence[Scalar]) -> Value:
    return row[0] if len(set(row)) == 1 else dict(zip(recipients, row, strict=True))


def _first_use(pattern: str | None, specs: Sequence[ParameterSpec]) -> int:
    """Order of the tiers: patterns as the config lists them, what matches none of them last."""
    return next((i for i, s in enumerate(specs) if pattern is not None and s.tensors == pattern), len(specs))


def _slot_order(spec: ParameterSpec, slot: str) -> int:
    return [str(role) for role in spec.roles].index(slot) if slot else 0
