"""The weights of linear layers once more, in the order in which a CPU multiplies bfloat16 matrices.

oneDNN brings the weights of a product into an order of its own, and forgets it after the product. Of the few rows of
growing texts, that takes longer than the product itself; done once a candidate, it takes as long as a few tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

MOST_BYTES = 2**30
"""Models with more bytes in their linear layers do without: their weights are not to be held twice."""


def reordered_bytes(device: str, dtype: torch.dtype, weights: int) -> int:
    """Return how many bytes are reordered of linear layers with so many bytes in their weights."""
    return weights if weights <= MOST_BYTES and _possible(torch.device(device), dtype) else 0


def _possible(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this machine has bfloat16 products of reordered weights."""
    operations = torch.ops.mkldnn
    return (
        device.type == "cpu"
        and dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and hasattr(operations, "_reorder_linear_weight")
        and hasattr(operations, "_linear_pointwise")
        and bool(operations._is_mkldnn_bf16_supported())
    )


class ReorderedWeights:
    """Lets the linear layers of a live model use reordered weights, each made when its layer first multiplies.

    transformers' own forward pass calls the layers, so it is their `forward` that is replaced, within `used` only.

    Args:
        model: whose plain linear layers, of bfloat16 on a CPU, take part.

    Attributes:
        works: whether they are used, as far as a trial has shown; None before it (see `trials`).
    """

    def __init__(self, model: nn.Module) -> None:
        self.works: bool | None = None
        self._model = model
        self._products: list[tuple[nn.Linear, _Product]] | None = None

    def forget(self) -> None:
        """Let the reordered weights go: the model's own have changed, or are about to."""
        self._products = None

    @contextmanager
    def used(self) -> Iterator[None]:
        """Let the layers use them, unless a trial has shown that they do not work. Must not be nested."""
        if self.works is False:
            yield
            return
        if self._products is None:
            # Layers that share their weights, as those of a path that comes twice, share the reordered ones too.
            kept: dict[tuple[int, torch.Size], Tensor] = {}
            self._products = [(layer, _Product(layer, kept)) for layer in self._layers()]
        products = self._products
        try:
            for layer, product in products:
                layer.__dict__["forward"] = product
            yield
        finally:
            for layer, _ in products:
                layer.__dict__.pop("forward", None)

    @property
    def possible(self) -> bool:
        """Whether there are layers that can take part."""
        return bool(self._layers())

    def _layers(self) -> list[nn.Linear]:
        layers = [
            module
            for module in self._model.modules()
            # A subclass may compute something else, and so does a layer whose forward was replaced.
            if type(module) is nn.Linear
            and "forward" not in module.__dict__
            and _possible(module.weight.device, module.weight.dtype)
        ]
        weights = {layer.weight.data_ptr(): layer.weight.nbytes for layer in layers}
        return layers if sum(weights.values()) <= MOST_BYTES else []


class _Product:
    """Multiplies as a linear layer does.

    Args:
        layer: the layer.
        kept: reordered weights by place and shape of a layer's own; it takes this layer's.
    """

    def __init__(self, layer: nn.Linear, kept: dict[tuple[int, torch.Size], Tensor]) -> None:
        self._layer = layer
        self._kept = kept
        self._multiply = torch.ops.mkldnn._linear_pointwise.default

    def __call__(self, rows: Tensor) -> Tensor:
        layer = self._layer
        # Of scattered rows torch adds a bias after rounding, the product before.
        if not rows.is_contiguous():
            return nn.functional.linear(rows, layer.weight, layer.bias)
        place = layer.weight.data_ptr(), layer.weight.shape
        if place not in self._kept:
            self._kept[place] = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), None)
        product: Tensor = self._multiply(rows, self._kept[place], layer.bias, "none", [], "")
        return product
