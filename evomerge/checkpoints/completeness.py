"""What tensors a checkpoint must have, by rule from its config and the names of its tensors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from evomerge.checkpoints.header import TensorInfo
from evomerge.checkpoints.model_config import DEPTH_KEYS, FIRST_DENSE_KEYS, nested_key, text_config
from evomerge.checkpoints.names import parse
from evomerge.errors import CheckpointError, at

# Attention patterns that change the mask, not the tensors.
_SAME_TENSORS = {
    "full_attention": "attention",
    "sliding_attention": "attention",
    "chunked_attention": "attention",
}
_TYPE_LISTS = ("layer_types", "layers_block_type", "mlp_layer_types", "hybrid_override_pattern")
_NOT_INPUT = {"wpe", "embed_positions", "position_embeddings", "token_type_embeddings"}


def layer_count(config: Mapping[str, Any], file: Path | str, names: Iterable[str] = ()) -> int:
    """Return the number of the language model's layers.

    Args:
        config: the checkpoint's ``config.json``.
        file: its path, for errors.
        names: of the tensors; they are counted where a multimodal config leaves the number to a default.
    """
    text = text_config(config)
    key = nested_key(config)
    nested = "" if key is None else key + "."
    for key in DEPTH_KEYS:
        if key in text:
            count = text[key]
            if type(count) is not int or count < 1:
                raise CheckpointError(f"{at(file, nested + key)}{count!r} is not a positive whole number")
            return count
    for key in _TYPE_LISTS:
        if text.get(key):
            return len(text[key])
    positions = [place for name in names if isinstance(place := parse(name).position, int)]
    if nested and positions:
        return 1 + max(positions)
    raise CheckpointError(f"{at(file, nested + DEPTH_KEYS[0])}this key is missing")


def input_embedding(names: Iterable[str]) -> str | None:
    """Return the name of the token embedding's weight, or None."""
    for name in names:
        if parse(name).role == "embedding" and not _NOT_INPUT & set(name.split(".")):
            return name
    return None


def head_name(config: Mapping[str, Any]) -> str:
    """Return the canonical name that the weight of a separate head has."""
    return "embed_out.weight" if config.get("model_type") == "gpt_neox" else "lm_head.weight"


def output_head(names: Iterable[str]) -> str | None:
    """Return the name of the language-model head's weight, or None."""
    return next((name for name in names if parse(name).role == "head" and name.endswith("weight")), None)


def vocabulary_tensors(tensors: Mapping[str, TensorInfo]) -> list[str]:
    """Return the names of the tensors with a row for each token: embedding, head, and the head's bias."""
    embedding = input_embedding(tensors)
    if embedding is None:
        return []
    ends = [embedding, *(name for name in tensors if parse(name).role == "head")]
    return [name for name in ends if tensors[name].shape[:1] == tensors[embedding].shape[:1]]


def layer_kind(config: Mapping[str, Any], index: int, count: int) -> tuple[Any, ...]:
    """Return what the (language model's) config says of a layer that may change its set of tensors.

    Args:
        config: the part that speaks of the layers.
        index: of the layer.
        count: number of layers.
    """
    kind: list[Any] = []
    for key in _TYPE_LISTS:
        types = config.get(key)
        if isinstance(types, list | str) and len(types) == count:
            kind.append(_SAME_TENSORS.get(str(types[index]), str(types[index])))
    dense = config.get("mlp_only_layers") or []
    step = config.get("decoder_sparse_step") or 1
    kind.append(index in dense or (index + 1) % step != 0)
    kind += [index < (config.get(key) or 0) for key in FIRST_DENSE_KEYS]
    kind.append(
        index % (config.get("moe_layer_freq") or 1) if type(config.get("moe_layer_freq")) is int else 0
    )
    for part in ("attn_layer", "expert_layer"):
        period, offset = config.get(f"{part}_period"), config.get(f"{part}_offset")
        if isinstance(period, int) and isinstance(offset, int) and period > 0:
            kind.append(index % period == offset)
    return tuple(kind)


def check_complete(names: Iterable[str], config: Mapping[str, Any], *, tied: bool, place: Path | str) -> None:
    """Refuse a checkpoint whose set of tensors cannot be right; the sentence names a tensor.

    Layers 0 to n−1 must all be there and have the same tensors, where the config gives layers of different
    kinds (`layer_types` and the like) the same within a kind, unless they differ in the model that transformers
    builds; there must be no further layer; an embedding and, unless it is tied, a head.

    Args:
        names: of the tensors, buffers left out.
        config: the checkpoint's ``config.json``.
        tied: whether the head shares the embedding's weight.
        place: the folder, for errors.
    """
    names = list(names)
    whole = config
    count = layer_count(config, place, names)
    config = text_config(config)
    layers: dict[int, set[str]] = {index: set() for index in range(count)}
    for name in names:
        tensor = parse(name)
        if isinstance(tensor.position, int):
            if tensor.position >= count:
                raise CheckpointError(
                    f"{place}: '{name}' belongs to layer {tensor.position}, but config.json declares "
                    f"{count} layers (0 to {count - 1})"
                )
            layers[tensor.position].add(tensor.stem)
    for index, stems in layers.items():
        if not stems:
            raise CheckpointError(f"{place}: layer {index} of {count} has no tensors at all")
    kinds: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for index in range(count):
        kinds[layer_kind(config, index, count)].append(index)
    if any(len({frozenset(layers[index]) for index in members}) > 1 for members in kinds.values()):
        kinds = _as_built(kinds, whole)
    for members in kinds.values():
        _check_alike({index: layers[index] for index in members}, place)
    if input_embedding(names) is None:
        raise CheckpointError(f"{place}: the token embedding is missing (e.g. 'model.embed_tokens.weight')")
    if not tied and output_head(names) is None:
        raise CheckpointError(
            f"{place}: '{head_name(config)}' is missing, and config.json says tie_word_embeddings: false"
        )


def _as_built(
    kinds: Mapping[tuple[Any, ...], list[int]], config: Mapping[str, Any]
) -> dict[tuple[Any, ...], list[int]]:
    """Part kinds of layers whose tensors differ in the model that transformers builds; it takes seconds."""
    from evomerge.checkpoints.auto import layers_of_model

    built = layers_of_model(config)
    parted: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for kind, members in kinds.items():
        for index in members:
            stems = frozenset(built[index]) if index < len(built) else None
            parted[*kind, stems].append(index)
    return parted


def _check_alike(layers: Mapping[int, set[str]], place: Path | str) -> None:
    for stem in sorted(set().union(*layers.values())):
        having = [index for index, stems in layers.items() if stem in stems]
        if len(having) == len(layers):
            continue
        if 2 * len(having) >= len(layers):
            index = next(index for index in layers if index not in having)
            raise CheckpointError(
                f"{place}: tensor '{stem.replace('{}', str(index), 1)}' is missing; "
                f"{len(having)} of {len(layers)} layers of this kind have it"
            )
        raise CheckpointError(
            f"{place}: tensor '{stem.replace('{}', str(having[0]), 1)}' is unknown; only {len(having)} of "
            f"{len(layers)} layers of this kind have it"
        )
