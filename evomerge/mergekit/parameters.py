"""A mergekit YAML's parameters as settings of the registry: words read as values, and which is asked before which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from evomerge.methods.registry import Parameter
from evomerge.schema import shown
from evomerge.settings import Filtered, Scalar, Setting, Value

PARAMETERS = frozenset(
    {
        *(
            "weight",
            "density",
            "normalize",
            "lambda",
            "rescale",
            "int8_mask",
            "epsilon",
            "gamma",
            "t",
            "scale",
        ),
        *("normalize_weights", "eps", "nuslerp_flatten", "nuslerp_row_wise", "max_iter", "tol"),
        *("filter_wise", "select_topk", "r", "alpha"),
    }
)
"""Every parameter that some method of mergekit has."""


def stacked(places: Sequence[Mapping[str, Value]], inputs: Sequence[str]) -> list[dict[str, Value]]:
    """Move each parameter to the last place that nothing below it asks for; the last place is the merge's own.

    Keeps which setting is asked before which, with as few rules as can be.
    """
    stacks: dict[str, list[Value]] = {}
    for place in places:
        for name, value in place.items():
            stacks.setdefault(name, []).append(value)
    depth = max((len(stack) for stack in stacks.values()), default=1)
    stacked: list[dict[str, Value]] = [{} for _ in range(depth)]
    for name, stack in stacks.items():
        for level, value in zip(stacked[depth - len(stack) :], stack, strict=True):
            level[name] = _joined(value, inputs)
    return stacked


def _joined(value: Value, inputs: Sequence[str]) -> Value:
    """Write one value for all inputs where they agree."""
    if not isinstance(value, dict) or set(value) != set(inputs):
        return value
    settings = list(value.values())
    return settings[0] if all(repr(setting) == repr(settings[0]) for setting in settings) else value


def converted(parameter: Parameter, setting: Setting, place: str) -> Setting:
    """Read words as numbers or truth values where the parameter wants such, as mergekit does; check them."""
    if isinstance(setting, tuple):
        if isinstance(setting[0], Filtered):
            return tuple(
                entry.model_copy(update={"value": converted(parameter, entry.value, place)})
                for entry in setting
                if isinstance(entry, Filtered)
            )
        return tuple(_scalar(parameter, v, place) for v in setting if not isinstance(v, Filtered))
    return _scalar(parameter, setting, place)


_TRUTH = {
    "true": True,
    "yes": True,
    "on": True,
    "1": True,
    "false": False,
    "no": False,
    "off": False,
    "0": False,
}


def _scalar(parameter: Parameter, value: Scalar, place: str) -> Scalar:
    wanted: Scalar = value
    if parameter.kind == "bool" and not isinstance(value, bool):
        wanted = _TRUTH.get(shown(value).strip("'").lower(), value)
    elif parameter.kind in ("float", "int") and isinstance(value, bool | str):
        try:
            wanted = float(value)
        except ValueError:
            wanted = value
    parameter.check(wanted, place)
    return wanted
