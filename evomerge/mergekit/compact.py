"""A value for every tensor, written as a setting: gradients over depth, filters on parts of names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from evomerge.checkpoints.names import parse
from evomerge.settings import Scalar, depth_of, evaluate, read_setting

Form = Scalar | tuple[Scalar, ...]


@dataclass(frozen=True)
class _Item:
    """Tensors that are given their values together: those of one kind over all layers, or a single one."""

    names: tuple[str, ...]
    form: Form


def compact(values: Mapping[str, Scalar], layers: Mapping[str, int], count: int) -> Any:
    """Return the setting, as plain data, that evaluates to exactly `values`.

    Args:
        values: by tensor name.
        layers: the place of each tensor that lies in a layer, 0 to `count` - 1; the others have depth 0.
        count: number of layers.

    Returns:
        One value if all agree; else a list of ``{filter, value}`` that ends with a value for all the rest.
    """
    items = _items(values, layers, count)
    forms = Counter(item.form for item in items)
    rest = max(forms, key=lambda form: forms[form])
    entries = _filters([item for item in items if item.form != rest], items)
    entries.append({"value": _plain(rest)})

    def misses() -> list[str]:
        setting = read_setting(entries)
        places = {name: depth_of(layers[name], count) if name in layers else 0.0 for name in values}
        return [name for name in values if not _same(evaluate(setting, name, places[name]), values[name])]

    # What interpolation misses by a rounding, and kinds that no part of a name tells apart. A name that
    # contains another's comes first.
    exact = sorted({_whole_layer(name, values) for name in misses()}, key=lambda part: (-len(part), part))
    entries[:0] = [{"filter": p, "value": next(v for n, v in values.items() if p in n)} for p in exact]
    if misses():
        raise ValueError(
            f"no filters tell the tensor '{misses()[0]}' from others whose names contain its name"
        )
    return entries[0]["value"] if len(entries) == 1 else entries


def _whole_layer(name: str, values: Mapping[str, Scalar]) -> str:
    """Return what selects the whole layer of a tensor where it has one value, else the tensor's name."""
    part = _layer_part(name)
    alike = part and all(_same(value, values[name]) for other, value in values.items() if part in other)
    return part if part and alike else name


def _layer_part(name: str) -> str | None:
    """Return a part of a tensor's name that the tensors of its layer have and no others, ``layers.3.``."""
    tensor = parse(name)
    if not isinstance(tensor.position, int):
        return None
    before = tensor.stem.partition("{}.")[0].rstrip(".").split(".")[-1]
    return f"{before}.{tensor.position}."


def _items(values: Mapping[str, Scalar], layers: Mapping[str, int], count: int) -> list[_Item]:
    kinds: dict[str, dict[int, str]] = {}
    items = []
    for name, value in values.items():
        if name in layers:
            kinds.setdefault(parse(name).stem, {})[layers[name]] = name
        else:
            items.append(_Item((name,), value))
    for names in kinds.values():
        each = {layer: values[name] for layer, name in sorted(names.items())}
        members = tuple(names[layer] for layer in each)
        first = next(iter(each.values()))
        if all(_same(value, first) for value in each.values()):
            items.append(_Item(members, first))
        elif len(each) == count and not any(isinstance(value, bool | str) for value in each.values()):
            items.append(_Item(members, tuple(each.values())))
        else:
            items += [_Item((name,), values[name]) for name in members]
    return items


def _filters(wanted: list[_Item], items: list[_Item]) -> list[dict[str, Any]]:
    """Choose, one after another, the part of names that selects the most items of one form and no others."""
    entries: list[dict[str, Any]] = []
    open_items = list(items)
    while wanted:
        best: tuple[int, int, str, list[_Item]] | None = None
        for part in _parts(wanted):
            hit = [item for item in open_items if any(part in name for name in item.names)]
            clean = len({repr(item.form) for item in hit}) == 1 and hit[0] in wanted
            if clean and all(part in name for item in hit for name in item.names):
                rank = (len(hit), -len(part))
                if best is None or rank > best[:2]:
                    best = (*rank, part, hit)
        if best is None:
            break
        part, hit = best[2], best[3]
        entries.append({"filter": part, "value": _plain(hit[0].form)})
        wanted = [item for item in wanted if item not in hit]
        open_items = [item for item in open_items if item not in hit]
    return entries


def _parts(items: Iterable[_Item]) -> list[str]:
    """Parts of names worth a filter: components, what follows a layer's number, layers, whole names."""
    parts: dict[str, None] = {}
    for item in items:
        for name in item.names:
            tensor = parse(name)
            if isinstance(tensor.position, int):
                after = tensor.stem.partition("{}.")[2]
                parts.update(dict.fromkeys([*after.split(".")[:-1], after, _layer_part(name) or after]))
            else:
                parts.update(dict.fromkeys(name.split(".")[:-1]))
            if len(item.names) == 1:
                parts[name] = None
    return [part for part in parts if part]


def _same(one: Scalar | None, two: Scalar) -> bool:
    return one == two and isinstance(one, bool | str) == isinstance(two, bool | str)


def _plain(form: Form) -> Any:
    return list(form) if isinstance(form, tuple) else form
