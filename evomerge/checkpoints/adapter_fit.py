"""Laying an adapter on a base: which tensor of it each change is meant for, and whether it fits there."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from evomerge.checkpoints.adapter_changes import MERGE_FIRST, Change, Part, Product
from evomerge.checkpoints.adapters import Adapter
from evomerge.checkpoints.completeness import output_head
from evomerge.checkpoints.header import TensorInfo
from evomerge.checkpoints.names import OUTSIDE, is_transposed, parse
from evomerge.errors import CheckpointError, nearest

_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj|w1|w2|w3)\.weight")
_GATE, _UP = ("gate_proj", "w1"), ("up_proj", "w3")

# Components of module paths that come and go with wrappers and with versions of transformers.
_WRAPPERS = {"base_model", "model", "transformer", "language_model", "text_model", "vision_model"}


def fit(
    adapter: Adapter, shapes: Mapping[str, tuple[int, ...]], *, config: Mapping[str, Any], base: str
) -> dict[str, Change]:
    """Return the changes by the names of the base's tensors.

    A name is found as it is, or by what is left of it without the prefixes of wrappers (``base_model.model``,
    ``language_model`` and the like); a head whatever it is called.

    Args:
        adapter: to lay on the base.
        shapes: of the base's tensors by name, a tied head included.
        config: the base's ``config.json``.
        base: what the base is called in errors.

    Raises:
        CheckpointError: a tensor that the base lacks, or that has another shape there.
    """
    reduced: dict[str, list[str]] = {}
    for name in shapes:
        reduced.setdefault(_reduced(name), []).append(name)
    fitted: dict[str, Change] = {}
    experts = _experts(shapes)
    for name, change in adapter.changes.items():
        layer = experts.get(_experts_path(name))
        if layer is not None and change.product is not None:
            fitted |= _apart(adapter, name, change.product, layer, base)
            continue
        found = [name] if name in shapes else reduced.get(_reduced(name), [])
        if not found and parse(name).role == "head":
            found = [head for head in [output_head(shapes)] if head is not None]
        if len(found) != 1:
            why = f"which fits {len(found)} tensors of {base}" if found else f"which {base} lacks"
            raise CheckpointError(
                f"{adapter.path}: the adapter changes '{name}', {why}{nearest(name, shapes)}{_trained_on(adapter)}"
            )
        target = found[0]
        if target in fitted:
            raise CheckpointError(f"{adapter.path}: the adapter changes '{target}' of {base} twice")
        fitted[target] = _oriented(adapter, name, change, shapes[target], is_transposed(config, target), base)
    return fitted


def _experts_path(name: str) -> str:
    """Return the reduced path of the experts that a name of fused factors stands for."""
    return _reduced(name.removesuffix(".weight")).replace(".base_layer", "")


def _experts(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, dict[tuple[int, str], tuple[str, int, int]]]:
    """Return each layer's experts: (index, projection) → name, rows and columns, by the experts' reduced path."""
    layers: dict[str, dict[tuple[int, str], tuple[str, int, int]]] = {}
    for name, shape in shapes.items():
        match = _EXPERT.fullmatch(name)
        if match and len(shape) == 2:
            kind = "gate" if match[3] in _GATE else "up" if match[3] in _UP else "down"
            layers.setdefault(_reduced(match[1]), {})[int(match[2]), kind] = (name, *shape)
    return layers


def _apart(
    adapter: Adapter,
    name: str,
    product: Product,
    layer: Mapping[tuple[int, str], tuple[str, int, int]],
    base: str,
) -> dict[str, Change]:
    """Return the changes of each expert's matrices by factors of all of them."""
    count = 1 + max(expert for expert, _ in layer)
    ins, outs = product.a.shape[1], product.b.shape[0]
    changes = {}
    for (expert, kind), (target, rows, columns) in layer.items():
        fused = 2 * rows if kind in ("gate", "up") else rows
        if (fused, columns) == (outs, ins):
            start = rows if kind == "up" else 0
            part = Part(expert, count, start, start + rows)
            changes[target] = Change(product=replace(product, part=part))
    if not changes or product.a.shape[0] != count * adapter.config.get("r", 8):
        raise CheckpointError(
            f"{adapter.path}: '{product.a.name}' of shape {list(product.a.shape)} and '{product.b.name}' of shape "
            f"{list(product.b.shape)} fit no matrix of the {count} experts of {base}{_trained_on(adapter)}"
        )
    return changes


def _oriented(
    adapter: Adapter,
    name: str,
    change: Change,
    shape: tuple[int, ...],
    lies_transposed: bool,
    base: str,
) -> Change:
    """Check a change's shapes against its target, and decide how a product lies."""

    def misfit(info: TensorInfo, makes: str) -> CheckpointError:
        return CheckpointError(
            f"{adapter.path}: '{info.name}' of shape {list(info.shape)} {makes} '{name}', which has shape "
            f"{list(shape)} in {base}{_trained_on(adapter)}"
        )

    whole, tokens, product, shift = change.whole, change.tokens, change.product, change.shift
    if whole is not None and whole.shape != shape:
        if len(shape) == 2 and whole.shape[1:] == shape[1:]:
            raise CheckpointError(
                f"{adapter.path}: '{whole.name}' has {whole.shape[0]:,} rows, '{name}' of {base} {shape[0]:,}: the "
                f"vocabulary was resized for this adapter; {MERGE_FIRST}"
            )
        raise misfit(whole, "cannot take the place of")
    if tokens is not None and (
        len(shape) != 2 or tokens.shape[1] != shape[1] or max(change.rows) >= shape[0]
    ):
        raise misfit(tokens, "does not fit into")
    if shift is not None and shift.shape != shape:
        raise misfit(shift, "cannot be added to")
    if product is None:
        return change
    ins, outs = product.a.shape[1], product.b.shape[0]
    straight, turned = shape == (outs, ins), shape == (ins, outs)
    if product.transposed:
        transposed = fits = turned
    else:
        transposed = turned and (
            lies_transposed or (not straight and bool(adapter.config.get("fan_in_fan_out")))
        )
        fits = straight or transposed
    if not fits:
        raise misfit(product.a, f"and '{product.b.name}' of shape {list(product.b.shape)} make no change of")
    return replace(change, product=replace(product, transposed=transposed))


def _trained_on(adapter: Adapter) -> str:
    return f"; the adapter was trained on {adapter.base}" if adapter.base else ""


def _reduced(name: str) -> str:
    parts = name.removeprefix(OUTSIDE).replace(".block_sparse_moe.", ".mlp.").split(".")
    return ".".join(part for part in parts if part not in _WRAPPERS)
