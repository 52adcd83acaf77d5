"""A mergekit YAML's number format, tokenizer and chat template as the form of a recipe's output."""

from __future__ import annotations

from typing import Any, cast

from evomerge.checkpoints.chat_templates import BUILT_IN
from evomerge.errors import UserError, nearest
from evomerge.mergekit.document import Document, TokenRule
from evomerge.mergekit.naming import Names, reference_from
from evomerge.output import AUTO
from evomerge.output import Tokenizer as OutputTokenizer
from evomerge.output import TokenRule as OutputTokenRule
from evomerge.recipe import DTYPES, Output
from evomerge.schema import validate


def output_form(document: Document, names: Names, notes: list[str]) -> Output:
    """Return the form of the output.

    Args:
        document: that says it.
        names: of its models.
        notes: takes sentences about what differs from mergekit.

    Raises:
        ValueError: names the key.
    """
    dtype = _dtype("dtype", document.dtype)
    written = _dtype("out_dtype", document.out_dtype) or dtype
    if written not in (None, *DTYPES):
        key = "dtype" if document.out_dtype is None else "out_dtype"
        raise ValueError(f"{key}: '{written}' cannot be written; give {', '.join(DTYPES)}")
    if dtype in ("bfloat16", "float16"):
        notes.append(
            f"dtype: {dtype} would be mergekit's arithmetic; here it is float32, rounded once at the end"
        )
    elif dtype == "float64":
        notes.append("dtype: float64 would be mergekit's arithmetic; here it is float32")
    if written is None:
        notes.append(
            "no dtype: tensors keep the number format of the model that gives the output its config; "
            "mergekit takes the widest of the models'"
        )
    tokenizer = _tokenizer(document, names)
    base = document.base_model
    if tokenizer is None and base is not None:
        tokenizer = names.of(base)
    return Output(
        dtype=cast(Any, written), tokenizer=tokenizer, chat_template=_chat_template(document, notes)
    )


def _tokenizer(document: Document, names: Names) -> str | OutputTokenizer | None:
    tokenizer = document.tokenizer
    key = "tokenizer_source" if tokenizer is None else "tokenizer.source"
    source = document.tokenizer_source if tokenizer is None else tokenizer.source
    if source is None:
        return None
    if source == "base":
        if document.base_model is None:
            raise ValueError(f"{key}: base is given, but there is no base_model")
        source = names.of(document.base_model)
    elif source != "union":
        source = names.of(reference_from(source, key))
    rules = {} if tokenizer is None else tokenizer.tokens or {}
    multiple = None if tokenizer is None else tokenizer.pad_to_multiple_of
    # mergekit gives the output a row for each token, and none of the padding that a model has.
    return OutputTokenizer(
        source=source,
        pad_to_multiple_of=multiple or 1,
        tokens={
            token: _token_rule(names, f"tokenizer.tokens.{token}", rule) for token, rule in rules.items()
        },
    )


def _token_rule(names: Names, key: str, rule: TokenRule) -> OutputTokenRule:
    source = rule.source
    if source is None:
        raise ValueError(f"{key}.source: is missing; give a model, or {{kind: ...}}")
    if isinstance(source, dict) and "kind" in source:
        row = dict(source)
        if "model" in row:
            row["model"] = names.of(reference_from(row["model"], f"{key}.source.model"))
    else:
        row = {"model": names.of(reference_from(source, f"{key}.source"))}
    try:
        return validate(OutputTokenRule, {"source": row, "force": rule.force}, None)
    except UserError as error:
        raise ValueError(f"{key}: {error}") from None


def _chat_template(document: Document, notes: list[str]) -> str | None:
    template = document.chat_template
    if template is None or template == AUTO or "{" in template:
        return template
    if template not in BUILT_IN:
        raise ValueError(
            f"chat_template: no template is called '{template}'{nearest(template, BUILT_IN)}; give auto, "
            f"{', '.join(BUILT_IN)}, or the text of a Jinja template"
        )
    notes.append(f"chat_template: {template} is the format's, written out anew; mergekit's text may differ")
    return template


def _dtype(key: str, name: str | None) -> str | None:
    known = ("bfloat16", "float16", "float32", "float64")
    short = None if name is None else name.removeprefix("torch.")
    if short is not None and short not in known:
        raise ValueError(f"{key}: '{name}' is not accepted{nearest(short, known)}: give {', '.join(known)}")
    return short
