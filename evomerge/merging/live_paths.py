"""Live models whose layers are shared: what holds the same weights is the same tensor.

A search over layer paths moves, repeats and drops the layers of a few models. Here a candidate is a list of
modules, one for each layer of the output, whose parameters are taken from a pool; the pool knows each tensor by
the jobs that made it. So a layer that comes twice, or that another candidate had before, costs nothing; only
what no candidate had before, such as a matrix with another scale folded in, is computed. The weights are those
of an export, bit for bit, because the same plan's jobs make them.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from evomerge.checkpoints.auto import auto_config
from evomerge.checkpoints.completeness import layer_count
from evomerge.checkpoints.model_config import text_config
from evomerge.checkpoints.names import is_outside, parse
from evomerge.merging.binding import bind
from evomerge.merging.layer_config import (
    depth_settings,
    derived_kind,
    layer_settings,
    select_layers,
    shared_settings,
)
from evomerge.merging.live import live_model, set_generation
from evomerge.merging.plan import ModelPlan, TensorJob
from evomerge.merging.sinks import LiveSink

Content = tuple[Any, ...]
"""What a live tensor holds."""

Write = Callable[[LiveSink, Sequence[TensorJob]], None]
"""Carries out some of a plan's jobs."""


@dataclass(frozen=True)
class LivePath:
    """The layers that a live model is at the moment.

    Attributes:
        layers: the model's own list.
        beginnings: for none, the first, the first two, … of them a hash of all that their outcome depends on besides
            the text: weights and settings, by content.
    """

    layers: nn.ModuleList
    beginnings: tuple[bytes, ...]


class SharedLayers:
    """Turns plans into live models that share their tensors.

    Args:
        device: where the tensors are.

    Attributes:
        path: the layers of the model that was returned last.

    The pool keeps what the last paths used, up to what all layers of a path's sources hold, and where scales are
    folded as much again as one path with its folded matrices (`evomerge.merging.paths.path_room`).
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: OrderedDict[Content, torch.Tensor] = OrderedDict()
        self._shells: dict[str, _Shell] = {}
        self._room = 0
        self._nothing = nn.Parameter(torch.empty(0, device="meta"), requires_grad=False)
        self._taken: list[tuple[nn.Module, str]] = []
        self.path: LivePath | None = None

    @staticmethod
    def can_hold(plan: ModelPlan) -> bool:
        """Whether the layers of a plan's model are independent of their number and their order."""
        return derived_kind(text_config(plan.config)) is None

    @property
    def nbytes(self) -> int:
        """Size of all tensors that are kept, in bytes."""
        return sum(tensor.nbytes for tensor in self._pool.values())

    def model(
        self, plan: ModelPlan, write: Write, *, generation: Path | Mapping[str, Any], room: int
    ) -> nn.Module:
        """Return a live model with a plan's weights.

        Models that differ in nothing but the order, number and weights of their layers are one module, whose
        list of layers changes; a model that was returned before has no weights any more.

        Args:
            plan: one that it `can_hold`.
            write: carries out some of its jobs.
            generation: the output's generation defaults, or the folder that has them.
            room: bytes worth keeping for later plans.
        """
        self._let_go()
        self.path = None
        tensors = _Tensors(plan)
        shell = self._shell(plan, tensors, generation)
        set_generation(shell.model, generation)
        shell.become(plan, tensors)
        by_module = [
            [
                (module, place, jobs, _content(place, jobs, tensors.context))
                for place in places
                for jobs in [[of_name[part.name] for part in place.parts]]
            ]
            for module, places, of_name in shell.modules(tensors)
        ]
        wanted = [tensor for module in by_module for tensor in module]
        needed = {content: (place, jobs) for _, place, jobs, content in wanted}
        self._room = max(self._room, room)
        self._make(needed, plan, write)
        for module, place, _, content in wanted:
            for path, attribute in place.owners:
                self._give(module.get_submodule(path), attribute, self._pool[content])
        contents = [[content for _, _, _, content in module] for module in by_module]
        self.path = LivePath(shell.layers, _beginnings(shell.key, tensors.kinds, contents))
        return shell.model

    def _make(
        self, needed: Mapping[Content, tuple[_Place, list[TensorJob]]], plan: ModelPlan, write: Write
    ) -> None:
        """Have every needed tensor in the pool; what was used longest ago makes room."""
        missing = {content: found for content, found in needed.items() if content not in self._pool}
        for content in needed:
            if content in self._pool:
                self._pool.move_to_end(content)
        spare = self._evict(needed, sum(place.nbytes for place, _ in missing.values()))
        views: dict[str, torch.Tensor] = {}
        made: dict[Content, torch.Tensor] = {}
        for content, (place, jobs) in missing.items():
            same = spare.get((place.shape, place.dtype))
            tensor = same.pop() if same else torch.empty(place.shape, dtype=place.dtype, device=self._device)
            made[content] = tensor
            for part, job in zip(place.parts, jobs, strict=True):
                views[job.name] = tensor.view(-1)[part.start : part.start + job.numel].view(job.shape)
        if views:
            write(LiveSink(views), [job for job in plan.jobs if job.name in views])
        for content, tensor in made.items():
            parameter = needed[content][0].parameter
            self._pool[content] = nn.Parameter(tensor, requires_grad=False) if parameter else tensor

    def _evict(
        self, needed: Mapping[Content, Any], further: int
    ) -> dict[tuple[tuple[int, ...], torch.dtype], list[torch.Tensor]]:
        """Drop what was used longest ago until `further` bytes fit; return the memory, to be used again."""
        spare: dict[tuple[tuple[int, ...], torch.dtype], list[torch.Tensor]] = defaultdict(list)
        size = self.nbytes + further
        for content in [content for content in self._pool if content not in needed]:
            if size <= self._room:
                break
            tensor = self._pool.pop(content).detach()
            size -= tensor.nbytes
            spare[tuple(tensor.shape), tensor.dtype].append(tensor)
        return spare

    def _shell(self, plan: ModelPlan, tensors: _Tensors, generation: Path | Mapping[str, Any]) -> _Shell:
        shape = [
            shared_settings(plan.config),
            sorted(set(tensors.kinds)),
            str(plan.dtype),
            sorted(tensors.top),
        ]
        key = json.dumps(shape, sort_keys=True, default=str)
        if key not in self._shells:
            self._shells[key] = _Shell(key, plan, tensors, self._device, generation)
            for module, attribute in self._shells[key].tensors():
                self._give(module, attribute, None)
        return self._shells[key]

    def _give(self, module: nn.Module, attribute: str, tensor: torch.Tensor | None) -> None:
        if tensor is not None:
            self._taken.append((module, attribute))
        if attribute in module._parameters:
            module._parameters[attribute] = self._nothing if tensor is None else tensor  # type: ignore[assignment]
        else:
            module._buffers[attribute] = self._nothing.data if tensor is None else tensor

    def _let_go(self) -> None:
        """Take the weights from the modules, so that the pool alone holds them."""
        for module, attribute in self._taken:
            self._give(module, attribute, None)
        self._taken = []


@dataclass(frozen=True)
class _Part:
    """An on-disk tensor's place in a live one: its name (in a layer: with ``{}`` for the layer), first element."""

    name: str
    start: int


@dataclass(frozen=True)
class _Place:
    """A live tensor of a module.

    Attributes:
        owners: (path of a submodule, attribute) of everything that it is; a tied tensor has several.
        shape, dtype: its form.
        parts: the on-disk tensors that it is made of.
        parameter: whether it is a parameter, not a buffer.
    """

    owners: tuple[tuple[str, str], ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[_Part, ...]
    parameter: bool

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class _Tensors:
    """A plan's jobs, sorted by the layer of the output that they belong to.

    Attributes:
        top: jobs outside the layers, by name.
        layers: for each layer its jobs, by name with ``{}`` for the layer.
        kinds: for each layer what makes its module: settings and tensors.
        context: what tensors depend on besides their own jobs.
    """

    def __init__(self, plan: ModelPlan) -> None:
        count = layer_count(plan.config, "config.json", [job.name for job in plan.jobs])
        self.top: dict[str, TensorJob] = {}
        self.layers: list[dict[str, TensorJob]] = [{} for _ in range(count)]
        for job in plan.jobs:
            name = parse(job.name)
            if is_outside(job.source) or not isinstance(name.position, int):
                self.top[job.name] = job
            else:
                self.layers[name.position][name.stem] = job
        settings = layer_settings(plan.config, count)
        shapes = [sorted((stem, job.shape) for stem, job in layer.items()) for layer in self.layers]
        self.kinds = tuple(json.dumps(both, sort_keys=True) for both in zip(settings, shapes, strict=True))
        self.context = tuple(job.content for job in plan.jobs if (job.values or {}).get("trim") == "global")


class _Shell:
    """A model without weights: all but its layers, and the layers by kind and place.

    Args:
        key: what its models have in common, in words.
        plan: of a model of this shape; one layer of each kind is built.
        tensors: the plan's jobs.
        device: where buffers are.
        generation: see `live_model`.
    """

    def __init__(
        self,
        key: str,
        plan: ModelPlan,
        tensors: _Tensors,
        device: torch.device,
        generation: Path | Mapping[str, Any],
    ) -> None:
        self.key = key
        picked = [tensors.kinds.index(kind) for kind in dict.fromkeys(tensors.kinds)]
        jobs = [*tensors.top.values()]
        for place, index in enumerate(picked):
            jobs += [
                replace(job, name=stem.replace("{}", str(place), 1))
                for stem, job in tensors.layers[index].items()
            ]
        small = replace(plan, config=select_layers(plan.config, picked), jobs=tuple(jobs))
        self.model = live_model(small.config, plan.dtype, device, generation=generation)
        places = _places(self.model, bind(self.model, small))
        found = [
            parse(place.owners[0][0] + ".").stem for place in places if place.parts[0].name not in tensors.top
        ]
        self._list = found[0].partition(".{}.")[0]
        self.top = [place for place in places if place.parts[0].name in tensors.top]
        self._kinds: dict[str, tuple[nn.Module, list[_Place]]] = {}
        layers = self.model.get_submodule(self._list)
        for index, kind in enumerate(picked):
            before = f"{self._list}.{index}"
            own = [
                replace(
                    place,
                    owners=tuple(
                        (path.removeprefix(before).removeprefix("."), a) for path, a in place.owners
                    ),
                    parts=tuple(replace(part, name=parse(part.name).stem) for part in place.parts),
                )
                for place in places
                if place.owners[0][0] == before or place.owners[0][0].startswith(before + ".")
            ]
            self._kinds[tensors.kinds[kind]] = layers.get_submodule(str(index)), own
        configs = (getattr(module, "config", None) for module in self.model.modules())
        own_config = self.model.config.get_text_config()  # type: ignore[operator, union-attr]
        self._configs = {id(config): config for config in configs if type(config) is type(own_config)}
        self._configs[id(own_config)] = own_config
        self._slots: dict[tuple[int, str], nn.Module] = {}
        self.layers = nn.ModuleList()

    def tensors(self) -> Iterable[tuple[nn.Module, str]]:
        """Yield all that is to be filled, of the model as it was built."""
        for module, places in ((self.model, self.top), *self._kinds.values()):
            for place in places:
                for path, attribute in place.owners:
                    yield module.get_submodule(path), attribute

    def become(self, plan: ModelPlan, tensors: _Tensors) -> None:
        """Take the layers of a plan's model, without their weights."""
        self.layers = nn.ModuleList(self._slot(index, kind) for index, kind in enumerate(tensors.kinds))
        before, _, name = self._list.rpartition(".")
        setattr(self.model.get_submodule(before), name, self.layers)
        settings = depth_settings(vars(auto_config(plan.config).get_text_config()))
        for config in self._configs.values():
            # As a whole: transformers checks each assignment, and the settings agree only together.
            vars(config).update(copy.deepcopy(settings))

    def modules(
        self, tensors: _Tensors
    ) -> Iterable[tuple[nn.Module, Sequence[_Place], Mapping[str, TensorJob]]]:
        """Yield each module that has places of its own, with them and their jobs: the model, then its layers."""
        yield self.model, self.top, tensors.top
        for index, (kind, jobs) in enumerate(zip(tensors.kinds, tensors.layers, strict=True)):
            yield self._slot(index, kind), self._kinds[kind][1], jobs

    def _slot(self, index: int, kind: str) -> nn.Module:
        """Return the module of one kind at one place: it has its own slot of the key-value cache."""
        if (index, kind) not in self._slots:
            built = self._kinds[kind][0]
            shared = {id(config): config for config in self._configs.values()}
            layer = copy.deepcopy(built, shared)
            for module in layer.modules():
                if hasattr(module, "layer_idx"):
                    module.layer_idx = index  # type: ignore[assignment]
            self._slots[index, kind] = layer
        return self._slots[index, kind]


def _places(model: nn.Module, bound: Mapping[str, torch.Tensor]) -> list[_Place]:
    """Return the live tensors of a bound model, in the order of `bound`."""
    owners: dict[int, list[tuple[str, str]]] = defaultdict(list)
    whole: dict[int, torch.Tensor] = {}
    parameters = set()
    for path, module in model.named_modules():
        for attribute, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and tensor.numel():
                memory = tensor.untyped_storage().data_ptr()
                owners[memory].append((path, attribute))
                whole[memory] = tensor
                if attribute in module._parameters:
                    parameters.add(memory)
    parts: dict[int, list[_Part]] = defaultdict(list)
    for name, view in bound.items():
        memory = view.untyped_storage().data_ptr()
        parts[memory].append(_Part(name, int(view.storage_offset() - whole[memory].storage_offset())))
    return [
        _Place(
            tuple(owners[memory]),
            tuple(whole[memory].shape),
            whole[memory].dtype,
            tuple(found),
            memory in parameters,
        )
        for memory, found in parts.items()
    ]


def _content(place: _Place, jobs: Sequence[TensorJob], context: Content) -> Content:
    parts = tuple((part.start, job.content) for part, job in zip(place.parts, jobs, strict=True))
    depends = any((job.values or {}).get("trim") == "global" for job in jobs)
    return place.shape, place.dtype, parts, context if depends else ()


def _beginnings(shell: str, kinds: Sequence[str], contents: Sequence[Sequence[Content]]) -> tuple[bytes, ...]:
    """Return the hashes of `LivePath`.

    Args:
        shell: what is no layer and no tensor.
        kinds: of the layers.
        contents: of the tensors outside the layers, then of each layer's.
    """
    found = [hashlib.sha256(repr((shell, contents[0])).encode()).digest()]
    for kind, layer in zip(kinds, contents[1:], strict=True):
        found.append(hashlib.sha256(found[-1] + repr((kind, layer)).encode()).digest())
    return tuple(found)
