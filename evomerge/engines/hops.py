"""What the layers at the beginning of a path give, kept for other paths that begin alike.

Candidates of a search over layer paths begin with the same hops more often than not. What comes out of the last hop
that two of them share is the same for both, so it is computed once for each batch. The next path goes on from there,
by the model's own forward pass, in which the layers that are known stand aside: its numbers are those that it gets
alone, bit for bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from evomerge.config import Engine as EngineConfig
from evomerge.engines.attention import BehindPrefix
from evomerge.engines.packing import Inputs

if TYPE_CHECKING:
    from evomerge.merging.live_paths import LivePath

GIGABYTES = {"cpu": 1.0, "cuda": 4.0}
"""What may be kept where the config says ``auto``."""


def budget(settings: EngineConfig) -> int:
    """Return the bytes that an engine's `prefix_sharing` allows; `device` already decided."""
    given = settings.prefix_sharing
    return int(1e9 * (GIGABYTES.get(settings.device, 1.0) if given == "auto" else given))


_Key = tuple[bytes, bool, bytes]
"""A batch, whether its keys and values are wanted, and the beginning of a path."""


class SharedHops:
    """The outcomes of hops that waiting paths share with the present one, batch by batch.

    What is kept is named by its contents: the tokens of the batch, and all weights and settings up to the hop. So
    nothing has to be forgotten when weights change. What no waiting path needs is let go; while there is no room,
    nothing more is kept.

    Args:
        budget: bytes that may be kept; 0: nothing is shared.

    Attributes:
        works: whether hops may be left out, as far as a trial has shown; None before it (see `trials`).
        computed, saved: layer evaluations so far (tokens times layers), and those that were left out.
    """

    def __init__(self, budget: int = 0) -> None:
        self._budget = budget
        self._path: LivePath | None = None
        self._branches: list[int] = []
        self._kept: dict[_Key, _Outcome] = {}
        self._uses: Counter[int] = Counter()
        self.nbytes = 0
        self.works: bool | None = None
        self.computed = 0
        self.saved = 0

    @property
    def on(self) -> bool:
        """Whether anything may be kept at all."""
        return self._budget > 0

    def begin(self, path: LivePath | None, branches: Collection[int]) -> None:
        """Go over to another path.

        Args:
            path: whose weights the model has now; None: one that shares nothing.
            branches: after how many hops waiting paths leave it.
        """
        self._path = path if self.on and self.works is not False else None
        depth = 0 if self._path is None else len(self._path.layers)
        self._branches = sorted(hops for hops in set(branches) if 0 < hops <= depth)
        own = set() if self._path is None else set(self._path.beginnings)
        for key in [key for key in self._kept if key[2] not in own]:
            self._forget(key)

    def clear(self) -> None:
        """Let everything go: the model is another one."""
        self.works = None
        self.begin(None, ())

    @contextmanager
    def left_out(self, inputs: Inputs, cache: Any) -> Iterator[int]:
        """Leave the hops out whose outcome is known, in a forward pass inside; keep what is wanted of the others.

        Args:
            inputs: of the forward pass.
            cache: its cache; gets the keys and values of the hops that are left out, if it collects them.

        Yields:
            How many hops are left out.
        """
        if self._path is None:
            yield 0
            return
        layers, beginnings = self._path.layers, self._path.beginnings
        added = cache.added if isinstance(cache, BehindPrefix) and cache.keep else None
        batch = inputs.digest, added is not None
        known = next((n for n in range(len(layers), 0, -1) if (*batch, beginnings[n]) in self._kept), 0)
        own = list(layers[:known])
        outputs: dict[int, Any] = {}
        handles = [
            layers[hops - 1].register_forward_hook(partial(_note, outputs, hops))
            for hops in self._branches
            if hops > known
        ]
        try:
            if known:
                outcome = self._kept[*batch, beginnings[known]]
                for place, layer in enumerate(own):
                    layers[place] = _Known(layer, outcome.output)
                if added is not None:
                    added[:] = outcome.added
            yield known
        finally:
            for place, layer in enumerate(own):
                layers[place] = layer
            for handle in handles:
                handle.remove()
        for hops in range(1, known + 1):
            if hops not in self._branches:
                self._forget((*batch, beginnings[hops]))
        for hops, output in outputs.items():
            pairs = () if added is None else tuple(added[:hops])
            self._keep((*batch, beginnings[hops]), _Outcome(output, pairs))

    def _keep(self, key: _Key, outcome: _Outcome) -> None:
        further = {place: size for place, size in outcome.memory.items() if not self._uses[place]}
        if self.nbytes + sum(further.values()) > self._budget:
            return
        self._kept[key] = outcome
        self._uses.update(outcome.memory.keys())
        self.nbytes += sum(further.values())

    def _forget(self, key: _Key) -> None:
        outcome = self._kept.pop(key, None)
        if outcome is None:
            return
        for place, size in outcome.memory.items():
            self._uses[place] -= 1
            if not self._uses[place]:
                del self._uses[place]
                self.nbytes -= size


@dataclass(frozen=True)
class _Outcome:
    """What a batch's first hops gave.

    Attributes:
        output: what the last of them returned.
        added: the keys and values of each, where they are wanted.
    """

    output: Any
    added: Sequence[tuple[Tensor, Tensor]]

    @property
    def memory(self) -> dict[int, int]:
        """Address → size of all memory that it holds; outcomes of one batch share that of common hops."""
        whole = self.output if isinstance(self.output, tuple) else (self.output,)
        tensors = [
            part for part in (*whole, *(t for pair in self.added for t in pair)) if torch.is_tensor(part)
        ]
        storages = [tensor.untyped_storage() for tensor in tensors]
        return {storage.data_ptr(): storage.nbytes() for storage in storages}


class _Known(nn.Module):
    """Stands for a layer whose outcome is known: whatever comes in, this comes out."""

    def __init__(self, layer: nn.Module, output: Any) -> None:
        super().__init__()
        # Not as submodules: they are no part of what stands here.
        self.__dict__.update(_layer=layer, _output=output)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_layer"], name)

    def forward(self, *inputs: Any, **settings: Any) -> Any:
        """Return the outcome."""
        return self._output


def _note(outputs: dict[int, Any], hops: int, layer: nn.Module, inputs: Any, output: Any) -> None:
    outputs[hops] = output
