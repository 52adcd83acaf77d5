"""Token ids in a model's settings follow the output's tokenizer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evomerge.checkpoints import Checkpoint
from evomerge.checkpoints.tokenizer import has_tokenizer, read_json, read_vocabulary
from evomerge.merging.vocabulary import OutputVocabulary

GENERATION = "generation_config.json"

_ENDS = ("bos", "eos", "pad")
_IDS = re.compile(
    r"(^|_)token_ids?$|_token_index$|^(begin_)?suppress_tokens$|^bad_words_ids$|^forced_decoder_ids$"
)


def follow_tokenizer(
    config: dict[str, Any], donor: Checkpoint, vocabulary: OutputVocabulary
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return a config, and the donor's generation config, with the ids of the output's tokenizer.

    An id keeps its token's string; one whose token is gone is left out. With another model's tokenizer, the
    tokens that begin, end and pad a text are that model's; with a folder's, those that its settings name.

    Args:
        config: the donor's, or made of it.
        donor: the model that gives the output its config.
        vocabulary: of the output.

    Returns:
        The config, and the generation config; None where the donor's holds or there is none.
    """
    owner, folder = vocabulary.source.owner, vocabulary.source.folder
    if folder == donor.path or not (vocabulary.has_tokenizer and has_tokenizer(donor.path)):
        return config, None
    generation = _read(donor.path / GENERATION)
    new = vocabulary.ids
    ids = {i: new.get(token) for token, i in read_vocabulary(donor.path).ids.items()}
    config = {key: _follow(key, value, ids) for key, value in config.items()}
    if generation is not None:
        generation = {key: _follow(key, value, ids) for key, value in generation.items()}
        generation = {key: value for key, value in generation.items() if value is not None}
    if owner is not None and vocabulary.models[owner].path == folder:
        theirs = {**vocabulary.models[owner].text_config, **vocabulary.models[owner].config}
        ends = {key: theirs[key] for key in _keys() if theirs.get(key) is not None}
        own = _read(folder / GENERATION) or {}
        further = {key: own[key] for key in _keys() if own.get(key) is not None}
    else:
        ends, further = _named(folder, new), {}
    config |= ends
    if generation is not None:
        generation |= {**ends, **further}
    return config, generation


def _keys() -> list[str]:
    return [f"{end}_token_id" for end in _ENDS]


def _named(folder: Path, ids: Mapping[str, int]) -> dict[str, int]:
    """Return the ids of the tokens that a tokenizer's settings name."""
    settings = _read(folder / "tokenizer_config.json") or {}
    found = {}
    for end in _ENDS:
        token = settings.get(f"{end}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and token in ids:
            found[f"{end}_token_id"] = ids[token]
    return found


def _follow(key: str, value: Any, ids: Mapping[int, int | None]) -> Any:
    """Return a setting with ids replaced, where the key says that it holds some."""
    if isinstance(value, dict):
        return {name: _follow(name, item, ids) for name, item in value.items()}
    return _translated(value, ids) if _IDS.search(key) else value


def _translated(value: Any, ids: Mapping[int, int | None]) -> Any:
    if isinstance(value, list):
        return [new for new in (_translated(item, ids) for item in value) if new is not None]
    if type(value) is int and value >= 0:
        return ids.get(value)
    return value


def _read(file: Path) -> dict[str, Any] | None:
    return read_json(file) if file.is_file() else None
