"""From the names in the files to canonical ones, the same in every form that a checkpoint is saved in.

Canonical are the names of the text model with its causal head, experts apart: those that the published
checkpoints of a family have and transformers loads. What a multimodal checkpoint has besides its language model
keeps its on-disk name behind `OUTSIDE`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from evomerge.checkpoints.header import TensorInfo
from evomerge.checkpoints.model_config import text_config
from evomerge.checkpoints.names import OUTSIDE, is_buffer, is_outside
from evomerge.errors import CheckpointError

# Where multimodal checkpoints keep the language model, and its head: transformers 5's live form, the published
# form of the LLaVA line (Gemma 3, Mistral 3, InternVL, …), and that of Idefics 3.
_LANGUAGE: dict[str, str] = {
    "model.language_model.": "lm_head.",
    "language_model.model.": "language_model.lm_head.",
    "model.text_model.": "lm_head.",
}
# Parts of multimodal checkpoints whose language model has the names of a text model (Qwen2-VL and others).
_TOWERS = {
    *("visual", "vision_tower", "vision_model", "vision_embed_tokens", "image_newline", "embed_vision"),
    *("multi_modal_projector", "connector", "mm_projector", "audio_tower", "audio_model", "embed_audio"),
}
_TOWER_CONFIGS = ("vision_config", "audio_config")

# The prefix that a model saved without its causal head lacks, by the name of its embedding.
_MISSING_PREFIX = {
    "wte.weight": "transformer.",
    "word_embeddings.weight": "transformer.",
    "embed_tokens.weight": "model.",
}


@dataclass(frozen=True)
class _Experts:
    """Names of a mixture's tensors, one expert at a time, by the module in which transformers 5 fuses them."""

    fused: str
    module: str
    gate: str
    up: str
    down: str


_QWEN = _Experts("mlp", "mlp", "gate_proj", "up_proj", "down_proj")
_MIXTRAL = _Experts("mlp", "block_sparse_moe", "w1", "w3", "w2")
_EXPERTS: dict[str, _Experts] = {
    **dict.fromkeys(("mixtral", "minimax", "minimax_m2"), _MIXTRAL),
    "lfm2_moe": _Experts("feed_forward", "feed_forward", "w1", "w3", "w2"),
    **dict.fromkeys(
        (
            *("qwen2_moe", "qwen3_moe", "qwen3_next", "olmoe", "flex_olmo", "deepseek_v2", "deepseek_v3"),
            *("dots1", "glm4_moe", "ernie4_5_moe", "hunyuan_v1_moe", "afmoe", "exaone_moe"),
        ),
        _QWEN,
    ),
}


def canonical(infos: Iterable[TensorInfo], config: Mapping[str, Any]) -> dict[str, TensorInfo]:
    """Return a checkpoint's tensors by canonical name, in their order; known buffers are left out.

    Fused experts become slices of the fused tensor, whose `TensorInfo.name` they share.

    Args:
        infos: as they lie in the files.
        config: the checkpoint's ``config.json``.

    Raises:
        CheckpointError: two tensors of the files have one canonical name, so one of them would be lost.
    """
    infos = [info for info in infos if not is_buffer(info.name)]
    prefix = _language_prefix(info.name for info in infos)
    towers = any(isinstance(config.get(key), dict) for key in _TOWER_CONFIGS)
    missing = next((_MISSING_PREFIX[i.name] for i in infos if i.name in _MISSING_PREFIX), "")
    kind = text_config(config).get("model_type")
    experts = _EXPERTS.get(str(kind))
    tensors: dict[str, TensorInfo] = {}
    for info in infos:
        name = _inside(info.name, prefix, towers)
        if name is None:
            _add(tensors, OUTSIDE + info.name, info)
            continue
        if missing and not name.startswith(("lm_head.", missing)):
            name = missing + name
        if kind == "gpt_neox" and name == "lm_head.weight":
            name = "embed_out.weight"
        for own, part in [(name, info)] if experts is None else _unfused(name, info, experts):
            _add(tensors, own, part)
    return tensors


def _add(tensors: dict[str, TensorInfo], name: str, info: TensorInfo) -> None:
    other = tensors.setdefault(name, info)
    if other is not info:
        raise CheckpointError(
            f"{info.file}: the tensors '{other.name}' and '{info.name}' are both read as '{name}'; take one of them out"
        )


def language_prefix(tensors: Mapping[str, TensorInfo]) -> str:
    """Return what stands in the files for the canonical ``model.`` of a multimodal checkpoint, or ``""``."""
    return _language_prefix(info.name for name, info in tensors.items() if not is_outside(name))


def written_name(name: str, prefix: str) -> str:
    """Return the on-disk name of a canonical one in a checkpoint with this `language_prefix`."""
    if is_outside(name):
        return name.removeprefix(OUTSIDE)
    if prefix and name.startswith("model."):
        return prefix + name.removeprefix("model.")
    if prefix and name.startswith("lm_head."):
        return _LANGUAGE[prefix] + name.removeprefix("lm_head.")
    return name


def outside_parts(names: Iterable[str]) -> dict[str, int]:
    """Return the parts of a model that tensors outside of its language model belong to, with their numbers."""
    parts = (name.removeprefix(OUTSIDE).removeprefix("model.").partition(".")[0] for name in names)
    return dict(Counter(parts))


def _language_prefix(names: Iterable[str]) -> str:
    counts = dict.fromkeys(_LANGUAGE, 0)
    for name in names:
        for prefix in counts:
            counts[prefix] += name.startswith(prefix)
    most = max(counts, key=lambda prefix: counts[prefix])
    return most if counts[most] else ""


def _inside(name: str, prefix: str, towers: bool) -> str | None:
    """Return the language model's name of a tensor, None for one outside of it."""
    if prefix:
        if name.startswith(prefix):
            return "model." + name.removeprefix(prefix)
        head = _LANGUAGE[prefix]
        if name.startswith((head, "lm_head.")):
            return "lm_head." + name.removeprefix(head).removeprefix("lm_head.")
        return None
    first, _, rest = name.partition(".")
    if towers and (first in _TOWERS or (first == "model" and rest.partition(".")[0] in _TOWERS)):
        return None
    return name


def _unfused(name: str, info: TensorInfo, experts: _Experts) -> Iterator[tuple[str, TensorInfo]]:
    """Yield a mixture's tensors in canonical names; one expert after the other if they are fused."""
    before, module, leaf = name.rpartition(f".{experts.fused}.")
    if not module:
        yield name, info
        return
    stem = f"{before}.{experts.module}"
    if leaf == "experts.gate_up_proj" and len(info.shape) == 3 and info.shape[1] % 2 == 0:
        parts: tuple[str, ...] = (experts.gate, experts.up)
    elif leaf == "experts.down_proj" and len(info.shape) == 3:
        parts = (experts.down,)
    else:
        # A gate's name moves with the module; dense layers of a mixture have no other module.
        yield (f"{stem}.{leaf}" if leaf.startswith("gate.") else name), info
        return
    shape = (info.shape[1] // len(parts), info.shape[2])
    nbytes = info.nbytes // (info.shape[0] * len(parts)) if info.nbytes else 0
    for expert in range(info.shape[0]):
        for index, part in enumerate(parts):
            offset = info.offset + (expert * len(parts) + index) * nbytes
            yield (
                f"{stem}.experts.{expert}.{part}.weight",
                replace(info, shape=shape, offset=offset, nbytes=nbytes),
            )
