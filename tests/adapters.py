"""Tiny LoRA adapters for tests: PEFT folders as peft itself writes them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM


def make_adapter(
    folder: Path,
    base: Path,
    seed: int = 0,
    *,
    targets: list[str] | str = ("q_proj", "down_proj"),
    dtype: torch.dtype = torch.float32,
    size: float = 0.05,
    **config: Any,
) -> Path:
    """Write an adapter for a base, every trainable weight moved by seeded noise."""
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    targets = targets if isinstance(targets, str) else list(targets)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(
            model, LoraConfig(target_modules=targets, **config), autocast_adapter_dtype=False
        )
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))
        adapted.save_pretrained(folder)
    return folder


def adapted_model(base: Path, adapter: Path) -> torch.nn.Module:
    """Load base and adapter with peft, in float32, unmerged."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        return PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False).eval()


def merged_weights(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """Return the weights that peft's own merge gives, in float32."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = adapted_model(base, adapter).merge_and_unload()
    return {name: tensor.detach() for name, tensor in merged.state_dict().items()}
