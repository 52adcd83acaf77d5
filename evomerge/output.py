"""What a recipe says of the form of its output: number format, tokenizer, chat template."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from evomerge.checkpoints.chat_templates import BUILT_IN
from evomerge.errors import nearest
from evomerge.schema import Frozen, Positive, Whole, shown

BASE, UNION, AUTO = "base", "union", "auto"


class TokenRow(Frozen):
    """Where the row of one token comes from.

    Attributes:
        kind: ``zero``, or ``model_token``: another token's row.
        model: which model's row.
        token, token_id: the other token; without both, the same token.
    """

    kind: Literal["zero", "model_token"] = "model_token"
    model: str | None = None
    token: str | None = None
    token_id: Whole | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _one_form(self) -> TokenRow:
        if (self.kind == "zero") == (self.model is not None):
            raise ValueError("give either kind: zero, or a model")
        if self.token is not None and self.token_id is not None:
            raise ValueError("token_id: 'token' takes its place; give one of the two")
        if self.kind == "zero" and (self.token is not None or self.token_id is not None):
            raise ValueError("kind: zero has no token of its own")
        return self


class TokenRule(Frozen):
    """The row that stands in for a token where a model lacks it, or, with `force`, for every model's."""

    source: TokenRow
    force: bool = False

    @field_validator("source", mode="before")
    @classmethod
    def _from_name(cls, data: Any) -> Any:
        return {"model": data} if isinstance(data, str) else data


class Tokenizer(Frozen):
    """The output's tokenizer.

    Attributes:
        source: a model's name; ``base``: the model that gives the output its config; ``union``: that one's
            tokens, then what the other models have besides; or a folder (a path with a ``/``).
        pad_to_multiple_of: the number of rows is the number of tokens rounded up to a multiple of this.
        tokens: rules for single tokens.
        sha256: hash of a folder's files when the recipe was made.
    """

    source: str = Field(default=UNION, min_length=1)
    pad_to_multiple_of: Positive | None = None
    tokens: dict[str, TokenRule] = Field(default_factory=dict)
    sha256: str | None = None

    def is_folder(self, models: Iterable[str]) -> bool:
        """Whether the source is a folder beside the models."""
        return self.source not in models and self.source not in (BASE, UNION)


class Output(Frozen):
    """What is written.

    Attributes:
        dtype: number format of all tensors; each keeps its own by default.
        tokenizer: whose tokenizer goes along; that of the model that gives the config by default.
        chat_template: a model's name; ``auto``: the one that most models have; a built-in one's name; or the
            text of a Jinja template. By default the tokenizer's own.
    """

    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    tokenizer: str | Tokenizer | None = None
    chat_template: str | None = Field(default=None, min_length=1)

    @field_validator("tokenizer", mode="before")
    @classmethod
    def _known_form(cls, data: Any) -> Any:
        if data is None or isinstance(data, dict | Tokenizer) or (isinstance(data, str) and data):
            return data
        raise ValueError(f"{shown(data)} is not accepted: give base, union, a model's name or a folder")

    @property
    def vocabulary(self) -> Tokenizer:
        """The tokenizer's settings in full."""
        chosen = BASE if self.tokenizer is None else self.tokenizer
        return Tokenizer(source=chosen) if isinstance(chosen, str) else chosen

    def check(self, models: Iterable[str]) -> None:
        """Raise ValueError, naming the key, where something else than the recipe's models is named."""
        models = list(models)
        source = self.vocabulary.source
        if self.vocabulary.is_folder(models) and not ("/" in source or source.startswith((".", "~"))):
            raise ValueError(
                f"output.tokenizer: no model is called '{source}'{nearest(source, models)}; give a model's name, "
                "base, union, or a folder as a path with a '/'"
            )
        for token, rule in self.vocabulary.tokens.items():
            name = rule.source.model
            if name is not None and name not in models:
                raise ValueError(
                    f"output.tokenizer.tokens.{token}: no model is called '{name}'{nearest(name, models)}"
                )
        template = self.chat_template
        known = (*models, AUTO, *BUILT_IN)
        if template is not None and not (template in known or "{" in template or template.endswith(".jinja")):
            raise ValueError(
                f"output.chat_template: no model is called '{template}'{nearest(template, models)}; give a "
                f"model's name, auto, one of {', '.join(BUILT_IN)}, a Jinja template, or a file named *.jinja"
            )

    def canonical(self, digests: Mapping[str, str]) -> dict[str, Any]:
        """Return what the output's form adds to the recipe's identity; `digests` are the models' by name."""
        template = self.chat_template
        return {
            "dtype": self.dtype,
            "tokenizer": None if self.tokenizer is None else _canonical(self.vocabulary, digests),
            "chat_template": None if template is None else digests.get(template, template),
        }


def _canonical(tokenizer: Tokenizer, digests: Mapping[str, str]) -> Any:
    source: Any = tokenizer.source
    if source in digests:
        source = digests[source]
    elif source == BASE:
        source = None
    elif source == UNION:
        source = {"union": list(digests.values())}
    elif tokenizer.sha256 is None:
        raise ValueError("output.tokenizer: the content hash is not known yet; pin the recipe first")
    else:
        source = {"files": tokenizer.sha256}
    if tokenizer.pad_to_multiple_of is None and not tokenizer.tokens:
        return source
    tokens = {}
    for token, rule in tokenizer.tokens.items():
        row = rule.source.model_dump(exclude_none=True)
        row["model"] = digests.get(rule.source.model or "")
        tokens[token] = [row, rule.force]
    return [source, tokenizer.pad_to_multiple_of, tokens]
