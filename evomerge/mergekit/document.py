"""The mergekit YAML as data: its schema (version 0.1.5), with unknown keys refused where mergekit ignores them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PlainValidator, model_validator

from evomerge.schema import Frozen, Number, Positive, Whole, shown
from evomerge.settings import Setting, read_setting

KEYS = ("merge_method", "models", "slices", "modules")
"""Top-level keys that tell a mergekit YAML; no recipe or config of ours has them."""


def _setting(data: Any) -> Setting:
    return read_setting([data] if isinstance(data, Mapping) else data)


def _is_folder(text: str) -> bool:
    # A folder's name may hold the signs that mergekit splits at.
    return os.path.isdir(os.path.expanduser(text))


def _absent(data: Any) -> Any:
    return {} if data is None else data


Parameters = Annotated[
    dict[str, Annotated[Setting, PlainValidator(_setting)]],
    BeforeValidator(_absent),
    Field(default_factory=dict),
]


class Place(Frozen):
    """A folder or hub id, and a revision: ``path`` or ``path@revision``."""

    path: str = Field(min_length=1)
    revision: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, data: Any) -> Any:
        if isinstance(data, str):
            path, *revision = [data] if _is_folder(data) else data.split("@")
            if len(revision) > 1:
                raise ValueError(
                    f"'{data}' has more than one '@'; write {{path: ..., revision: ...}} if it belongs to a path"
                )
            return {"path": path, "revision": revision[0]} if revision else {"path": path}
        if not isinstance(data, Mapping | Place):
            raise ValueError(f"{shown(data)} is not accepted: give a folder or a hub id")
        return data

    def __str__(self) -> str:
        return self.path if self.revision is None else f"{self.path}@{self.revision}"


class Reference(Frozen):
    """A model: ``path[@revision][+lora[@revision]]``, ``{model, lora}`` or ``{path, revision}``."""

    model: Place
    lora: Place | None = None
    override_architecture: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, data: Any) -> Any:
        if isinstance(data, str):
            model, *lora = [data] if _is_folder(data) else data.split("+")
            if len(lora) > 1:
                raise ValueError(
                    f"'{data}' has more than one '+'; write {{model: ..., lora: ...}} if it belongs to a path"
                )
            return {"model": model, "lora": lora[0]} if lora else {"model": model}
        if isinstance(data, Mapping) and "path" in data:
            return {"model": data}
        if not isinstance(data, Mapping | Reference):
            raise ValueError(f"{shown(data)} is not accepted: give a folder or a hub id")
        return data

    def __str__(self) -> str:
        return str(self.model) if self.lora is None else f"{self.model}+{self.lora}"


class Model(Frozen):
    """A model of a merge of whole models."""

    model: Reference
    parameters: Parameters


class Layers(Frozen):
    """A model's share of a slice: its layers ``start`` to ``end - 1``."""

    model: Reference
    layer_range: tuple[Annotated[Whole, Field(ge=0)], Annotated[Whole, Field(ge=0)]]
    parameters: Parameters

    @model_validator(mode="before")
    @classmethod
    def _two_ends(cls, data: Any) -> Any:
        ends = data.get("layer_range", [0, 1]) if isinstance(data, Mapping) else [0, 1]
        if not isinstance(ends, list | tuple) or len(ends) != 2:
            raise ValueError(f"layer_range: {shown(ends)} is not accepted: give [first, one after the last]")
        return data

    @model_validator(mode="after")
    def _some(self) -> Layers:
        start, end = self.layer_range
        if start >= end:
            raise ValueError(
                f"layer_range: [{start}, {end}] holds no layer; the second number is one after the last layer"
            )
        return self


class Slice(Frozen):
    """Consecutive layers of the output: a merge of layers."""

    sources: tuple[Layers, ...] = Field(min_length=1)
    base_model: Reference | None = None
    residual_weight: Number | None = None
    parameters: Parameters

    @model_validator(mode="after")
    def _equal_lengths(self) -> Slice:
        lengths = [source.layer_range[1] - source.layer_range[0] for source in self.sources]
        if len(set(lengths)) > 1:
            raise ValueError(
                f"sources: the layer ranges have {', '.join(map(str, lengths))} layers; they must be equally long"
            )
        return self


class Module(Frozen):
    """One module of a model: of a language model there is only one."""

    slices: tuple[Slice, ...] | None = Field(None, min_length=1)
    models: tuple[Model, ...] | None = Field(None, min_length=1)
    parameters: Parameters

    @model_validator(mode="after")
    def _one_form(self) -> Module:
        if (self.slices is None) == (self.models is None):
            given = "neither" if self.slices is None else "both"
            raise ValueError(f"a module has either 'slices' or 'models', this one {given}")
        return self


class TokenRule(Frozen):
    """Where a token's embedding comes from: a model, ``{kind: zero}`` or ``{kind: model_token, ...}``."""

    source: Any = None
    force: bool = False


class Tokenizer(Frozen):
    """The output's tokenizer, and the embeddings of its tokens."""

    source: Any = "union"
    tokens: dict[str, TokenRule] | None = None
    pad_to_multiple_of: Positive | None = None


class Document(Frozen):
    """A mergekit YAML."""

    merge_method: str
    models: tuple[Model, ...] | None = Field(None, min_length=1)
    slices: tuple[Slice, ...] | None = Field(None, min_length=1)
    modules: dict[str, Module] | None = Field(None, min_length=1)
    base_model: Reference | None = None
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer_source: Any = None
    tokenizer: Tokenizer | None = None
    chat_template: str | None = None
    parameters: Parameters

    @model_validator(mode="after")
    def _one_form(self) -> Document:
        given = [key for key in ("models", "slices", "modules") if getattr(self, key) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise ValueError(f"exactly one of models, slices, modules is needed, here is {found}")
        if self.tokenizer is not None and self.tokenizer_source is not None:
            raise ValueError("tokenizer_source: 'tokenizer' takes its place; give one of the two")
        return self
