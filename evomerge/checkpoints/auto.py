"""What transformers makes of a ``config.json``: its config, its model, and which tensors each layer has."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers import __version__ as transformers_version
from transformers.initialization import no_init_weights

from evomerge.checkpoints.canonical import canonical
from evomerge.checkpoints.header import TensorInfo
from evomerge.checkpoints.names import is_outside, parse
from evomerge.errors import CheckpointError


def auto_config(config: Mapping[str, Any]) -> PretrainedConfig:
    """Return a Hugging Face config, given as plain data, as transformers has it.

    Raises:
        CheckpointError: the model type is unknown, or the config contradicts itself.
    """
    settings = {key: _plain(value) for key, value in copy.deepcopy(dict(config)).items() if key != "auto_map"}
    kind = settings.pop("model_type", None)
    if kind not in CONFIG_MAPPING:
        raise CheckpointError(
            f"model type '{kind}' cannot be built: this version of transformers ({transformers_version}) does "
            "not know it; such models merge to disk, and cannot be scored in memory"
        )
    try:
        return AutoConfig.for_model(kind, **settings)
    except (ValueError, KeyError, StrictDataclassError) as error:
        raise _cannot_build(kind, error) from None


def _plain(value: Any) -> Any:
    """Return a config's value with its numbers as such: transformers writes infinity as {"__float__": "Infinity"}."""
    if isinstance(value, dict):
        return (
            float(value["__float__"])
            if value.keys() == {"__float__"}
            else {k: _plain(v) for k, v in value.items()}
        )
    return [*map(_plain, value)] if isinstance(value, list) else value


def build_model(
    config: Mapping[str, Any], dtype: torch.dtype, device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """Build a causal language model with uninitialised weights.

    Args:
        config: a Hugging Face config as plain data.
        dtype: number format of the weights.
        device: where the model lives; ``meta``: nowhere.

    Raises:
        CheckpointError: as `auto_config`, or no causal language model is known for it.
    """
    built = auto_config(config)
    try:
        with no_init_weights(), torch.device(device):
            return _auto_class(built).from_config(built, dtype=dtype, trust_remote_code=False)
    except (ValueError, KeyError, StrictDataclassError) as error:
        raise _cannot_build(built.model_type, error) from None


def layers_of_model(config: Mapping[str, Any]) -> list[set[str]]:
    """Return the stems of each layer's tensors in the model that transformers builds; nothing if it builds none."""
    try:
        model = build_model(config, torch.bfloat16, "meta")
    except Exception:
        # A config that nothing was made for may fail anywhere in a model's code.
        return []
    infos = [
        TensorInfo(name, tuple(tensor.shape), tensor.dtype, Path(), 0, 0)
        for name, tensor in model.state_dict().items()
    ]
    layers: dict[int, set[str]] = {}
    for name in canonical(infos, config):
        tensor = parse(name)
        if isinstance(tensor.position, int) and not is_outside(name):
            layers.setdefault(tensor.position, set()).add(tensor.stem)
    return [layers.get(index, set()) for index in range(1 + max(layers, default=-1))]


def _cannot_build(kind: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"model type '{kind}' cannot be built as a causal language model: {str(error).splitlines()[0]}"
    )


def _auto_class(config: PretrainedConfig) -> Any:
    """Return the class that builds a model with a causal head: multimodal ones may have a class of their own."""
    if type(config) in AutoModelForCausalLM._model_mapping:
        return AutoModelForCausalLM
    if type(config) in AutoModelForImageTextToText._model_mapping:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM
