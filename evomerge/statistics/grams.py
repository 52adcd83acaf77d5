"""Gram matrices of the inputs of linear layers, collected while a decoder layer runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from evomerge.errors import CheckpointError

BLOCK = 1024
"""Rows of a Gram matrix that one thread computes at a time."""


@dataclass
class LayerGrams:
    """Sums of XᵀX over tokens for the linear layers inside one decoder layer.

    Modules that are given the same input share one sum. The experts of a mixture, which transformers keeps
    in one module, have sums over the tokens that are routed to them.

    Attributes:
        sums: ``(d_in, d_in)`` in float64, by the name of the first weight that it serves.
        holders: the name under which a weight's sum is kept, by the weight's name.
        tokens: number of tokens seen.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    holders: dict[str, str] = field(default_factory=dict)
    tokens: int = 0

    def means(self) -> dict[str, Tensor]:
        """Return the sums divided by the number of tokens, in float32."""
        return {name: (total / self.tokens).float().cpu() for name, total in self.sums.items()}

    def add(self, captured: Sequence[Captured], pool: Executor | None = None) -> None:
        """Add the Gram matrices of what some sequences gave, in their order.

        Blocks of rows are computed by the pool's threads; the bits do not depend on how many there are.
        """
        self.tokens += sum(one.tokens for one in captured)
        rows: dict[str, list[Tensor]] = {}
        for one in captured:
            for names, x in one.inputs:
                holder = self.holders.setdefault(names[0], names[0])
                for name in names[1:]:
                    self.holders.setdefault(name, holder)
                rows.setdefault(holder, []).append(x)
        for holder, parts in rows.items():
            x = torch.cat(parts)
            total = self.sums.get(holder)
            if total is None:
                total = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
                self.sums[holder] = total
            add_gram(total, x, pool)


@torch.no_grad()
def add_gram(total: Tensor, x: Tensor, pool: Executor | None) -> None:
    """Add XᵀX of ``(tokens, d)`` to ``(d, d)``, block by block."""

    def block(start: int) -> None:
        with torch.no_grad():
            total[start : start + BLOCK].add_(x[:, start : start + BLOCK].T @ x)

    starts = range(0, len(total), BLOCK)
    for _ in map(block, starts) if pool is None else pool.map(block, starts):
        pass


@dataclass
class Captured:
    """What one sequence gave the linear layers of a decoder layer.

    Attributes:
        inputs: pairs of the weights' names and their common input ``(tokens, d_in)``.
        tokens: number of tokens.
    """

    inputs: list[tuple[list[str], Tensor]] = field(default_factory=list)
    tokens: int = 0


@contextmanager
def capturing(layer: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[Callable[[], Captured]]:
    """Capture the inputs of a decoder layer's linear layers while it is run; any thread its own.

    Args:
        layer: the decoder layer.
        tensors: live weights by on-disk name, from `evomerge.merging.binding.bind`.

    Yields:
        A function that returns what the calling thread's last run of the layer gave.
    """
    names = _Names(tensors)
    local = threading.local()

    def before_linear(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["input"]
        own = names.of(module.weight)  # type: ignore[arg-type]
        shared = next((served for seen, served in local.seen if seen is x), None)
        if shared is not None:
            shared += own
        elif own:
            served = list(own)
            local.seen.append((x, served))
            local.captured.inputs.append((served, x.reshape(-1, x.shape[-1])))

    def before_experts(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(("hidden_states", "top_k_index"), args, strict=False)) | kwargs
        rows, chosen = given["hidden_states"], given["top_k_index"]
        experts = cast(Any, module)
        for expert, (gate, down) in enumerate(zip(experts.gate_up_proj, experts.down_proj, strict=True)):
            routed = rows[(chosen == expert).any(dim=-1)]
            if not len(routed):
                continue
            inner = experts._apply_gate(nn.functional.linear(routed, gate))
            found = ((names.of(gate), routed), (names.of(down), inner))
            local.captured.inputs += [(own, x) for own, x in found if own]

    def before_layer(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        local.captured = Captured(tokens=hidden.shape[0] * hidden.shape[1])
        local.seen = []

    handles = [layer.register_forward_pre_hook(before_layer, with_kwargs=True)]
    for module in layer.modules():
        if isinstance(module, nn.Linear | Conv1D):
            handles.append(module.register_forward_pre_hook(before_linear, with_kwargs=True))
        elif _is_experts(module):
            handles.append(module.register_forward_pre_hook(before_experts, with_kwargs=True))
    try:
        yield lambda: cast(Captured, local.captured)
    finally:
        for handle in handles:
            handle.remove()


def check_finite(sums: Mapping[str, Tensor], place: str) -> None:
    """Raise CheckpointError, naming `place`, if a matrix has NaN or infinite elements."""
    for name, total in sums.items():
        if not torch.isfinite(total).all():
            raise CheckpointError(f"{place}: the inputs of '{name}' are not finite on these texts")


def _is_experts(module: nn.Module) -> bool:
    """Whether a module keeps gated experts in two stacked weights, ``(E, 2 d, d_in)`` and ``(E, d_out, d)``."""
    gate, down = getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None)
    return (
        isinstance(gate, nn.Parameter)
        and isinstance(down, nn.Parameter)
        and gate.dim() == down.dim() == 3
        and gate.shape[1] == 2 * down.shape[2]
        and gate.shape[2] == down.shape[1]
        and not getattr(module, "is_transposed", False)
        and hasattr(module, "_apply_gate")
    )


class _Names:
    """The on-disk names of the tensors that lie in a piece of live storage."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._starts = {tensor.data_ptr(): name for name, tensor in tensors.items()}
        self._tensors = tensors

    def of(self, live: Tensor) -> list[str]:
        """Return the names of the tensors that together fill a contiguous live tensor."""
        names = []
        position, end = live.data_ptr(), live.data_ptr() + live.numel() * live.element_size()
        while position < end and (name := self._starts.get(position)) is not None:
            names.append(name)
            position += self._tensors[name].numel() * live.element_size()
        return names
