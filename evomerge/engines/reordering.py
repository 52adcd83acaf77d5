"""The weights of linear layers once more, in the order in which a CPU multiplies bfloat16 matrices.

oneDNN brings the weights of a product into an order of its own, and forgets it after the product. Of the few rows of
growing texts, that takes longer than the product itself; done once a candidate, it takes as long as a few tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

MOST_BYTES = 2**30
"""Models with more bytes in their linear layers do without: their weights are not to be held twice."""


def reordered_bytes(device: str, dtype: torch.dtype, weights: int) -> int:
    """Return about how many bytes reordered weights take beside a model of so many bytes."""
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
    """Lets the linear layers of a live model use reordered weights, which are made when they are first used.

    Args:
        model: whose plain linear layers, of bfloat16 on a CPU, take part.

    Attributes:
        works: whether they are used, as far as a trial has shown; None before it (see `trials`).
    """

    def __init__(self, model: nn.Module) -> None:
        self.works: bool | None = None
        self._model = model
        self._products: dict[nn.Linear, Callable[[Tensor], Tensor]] | None = None

    def forget(self) -> None:
        """Let the reordered weights go: the model's own have changed, or are about to."""
        self._products = None

    @contextmanager
    def used(self) -> Iterator[None]:
        """Let the layers use them, unless a trial has shown that they do not work."""
        if self.works is False:
            yield
            return
        if self._products is None:
            self._products = {layer: _product(layer) for layer in self._layers()}
        for layer, product in self._products.items():
            layer.__dict__["forward"] = product
        try:
            yield
        finally:
            for layer in self._products:
                del layer.__dict__["forward"]

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
        return layers if sum(layer.weight.nbytes for layer in layers) <= MOST_BYTES else []


def _product(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    operations: Any = torch.ops.mkldnn
    weight = operations._reorder_linear_weight(layer.weight.detach(), None)
    return partial(_multiply, layer, weight, operations._linear_pointwise.default)


def _multiply(layer: nn.Linear, weight: Tensor, product: Callable[..., Tensor], rows: Tensor) -> Tensor:
    # Of scattered rows torch adds a bias after rounding, the product before.
    if not rows.is_contiguous():
        return nn.functional.linear(rows, layer.weight, layer.bias)
    return product(rows, weight, layer.bias, "none", [], "")
