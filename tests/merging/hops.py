"""The path engine by definition: the parents' own layers, one hop after another, in float64."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache

Hops = Sequence[tuple[str, int, float]]


class Norm(nn.Module):
    """RMSNorm in the input's own precision; those of transformers compute in float32."""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = weight, eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt())


class HopModel:
    """A path through models that are loaded as they are; each scale multiplies the stream that enters its layer.

    Args:
        folders: checkpoints by name.
        hops: (name, layer, scale).
        unit: the models' RMSNorms multiply by 1 + their weight.
        dtype: of all arithmetic, apart from rotary angles and routers.
    """

    def __init__(
        self, folders: Mapping[str, Path], hops: Hops, *, unit: bool, dtype: torch.dtype = torch.float64
    ) -> None:
        models = {
            name: AutoModelForCausalLM.from_pretrained(
                folders[name], dtype=dtype, experts_implementation="eager"
            ).eval()
            for name in {name for name, _, _ in hops}
        }
        if dtype == torch.float64:
            for model in models.values():
                _exact_norms(model, unit)
        self.model = copy.deepcopy(models[hops[0][0]])
        decoder, last = _decoder(self.model), models[hops[-1][0]]
        layers = [copy.deepcopy(_layers(_decoder(models[name]))[layer]) for name, layer, _ in hops]
        for index, layer in enumerate(layers):
            for module in layer.modules():
                if hasattr(module, "layer_idx"):
                    module.layer_idx = index
        setattr(decoder, "h" if hasattr(decoder, "h") else "layers", nn.ModuleList(layers))
        norm = next(n for n in ("norm", "ln_f", "final_layer_norm", "final_layernorm") if hasattr(decoder, n))
        setattr(decoder, norm, getattr(_decoder(last), norm))
        self.model.set_output_embeddings(copy.deepcopy(last.get_output_embeddings()))
        for layer, (_, _, scale) in zip(layers, hops, strict=True):
            layer.register_forward_pre_hook(lambda _, args, scale=scale: (args[0] * scale, *args[1:]))
        config = self.model.config.get_text_config()
        config.num_hidden_layers = len(hops)
        if getattr(config, "layer_types", None):
            kinds = {name: model.config.get_text_config().layer_types for name, model in models.items()}
            config.layer_types = [kinds[name][layer] for name, layer, _ in hops]

    @torch.no_grad()
    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(ids, use_cache=False).logits

    @torch.no_grad()
    def grow(self, ids: torch.Tensor, tokens: int, *, cached: bool = True) -> torch.Tensor:
        """Return the greedy continuation."""
        return greedy(self.model, ids, tokens, cached=cached)


@torch.no_grad()
def greedy(model: nn.Module, ids: torch.Tensor, tokens: int, *, cached: bool) -> torch.Tensor:
    """Return ids with the most probable tokens behind them; with a cache one token at a time is read."""
    cache = DynamicCache(config=model.config) if cached else None
    unread = ids
    for _ in range(tokens):
        logits = model(unread if cached else ids, past_key_values=cache, use_cache=cached).logits[:, -1]
        unread = logits.argmax(-1, keepdim=True)
        ids = torch.cat([ids, unread], dim=1)
    return ids


def _decoder(model: nn.Module) -> nn.Module:
    decoder = model.base_model
    return getattr(decoder, "language_model", decoder)


def _layers(decoder: nn.Module) -> nn.ModuleList:
    return decoder.h if hasattr(decoder, "h") else decoder.layers


def _exact_norms(model: nn.Module, unit: bool) -> None:
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__name__.endswith("RMSNorm"):
                eps = getattr(child, "variance_epsilon", None) or child.eps
                weight = child.weight.detach()
                setattr(module, name, Norm(1 + weight if unit else weight, eps))
