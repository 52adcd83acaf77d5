"""One tokenizer out of several: the first one's tokens with their ids, then what the others have besides."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from evomerge.checkpoints.tokenizer import chat_template_files, load_tokenizer, read_json, read_vocabulary
from evomerge.errors import CheckpointError

_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True, eq=False)
class UnionTokenizer:
    """The tokenizer of several models.

    It is the first one's ``tokenizer.json`` with further entries. Words of the others' vocabularies go into its
    vocabulary, with the merges that make them behind its own; their added tokens (control tokens and the like)
    are added tokens of it. So a text becomes the same tokens as before wherever no further entry applies.

    Attributes:
        first: folder of the tokenizer that is extended.
        others: folder of each further tokenizer, with the number of ids that count in it.
    """

    first: Path
    others: tuple[tuple[Path, int], ...]

    @property
    def ids(self) -> dict[str, int]:
        """The id of every token."""
        return self._built.ids

    def write(self, out: Path) -> None:
        """Write the tokenizer into an existing folder, with the first one's settings and chat templates."""
        _write(out / "tokenizer.json", self._built.data)
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            if (self.first / name).is_file():
                shutil.copyfile(self.first / name, out / name)
        for file in chat_template_files(self.first):
            target = out / file.relative_to(self.first)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)
        settings = out / "tokenizer_config.json"
        if settings.is_file():
            data = read_json(settings)
            if isinstance(data.get("added_tokens_decoder"), dict):
                for entry in self._built.data["added_tokens"]:
                    flags = {key: value for key, value in entry.items() if key != "id"}
                    data["added_tokens_decoder"].setdefault(str(entry["id"]), flags)
                _write(settings, data)

    @cached_property
    def _built(self) -> _Built:
        try:
            return self._build()
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            places = ", ".join(str(path) for path in (self.first, *(path for path, _ in self.others)))
            raise CheckpointError(
                f"{places}: a tokenizer's file cannot be understood, so that no union can be made: {error!r}"
            ) from None

    def _build(self) -> _Built:
        data = _fast(self.first)
        ids = dict(read_vocabulary(self.first).ids)
        following = 1 + max(ids.values(), default=-1)
        added = _added(self.first, data)
        words: dict[str, float] = {}
        merges: list[list[str]] = []
        for folder, size in self.others:
            theirs, own = _fast(folder), read_vocabulary(folder).ids
            control = _added(folder, theirs)
            new = [token for token, i in own.items() if token not in ids and i < size]
            for token in sorted(new, key=own.__getitem__):
                ids[token] = following
                following += 1
            added |= {token: entry for token, entry in control.items() if token in new}
            fresh = {*new} - {*control}
            scores = _scores(theirs)
            words |= {token: scores.get(token, 0.0) for token in new if token in fresh}
            merges += [
                merge for merge in _merges(theirs) if "".join(merge) in fresh and ids.keys() >= {*merge}
            ]
        data["added_tokens"] = sorted(
            ({**entry, "id": ids[token]} for token, entry in added.items()), key=lambda entry: entry["id"]
        )
        # Ids of added tokens follow from the vocabulary's size unless they stand in the vocabulary.
        if words:
            _extend(data["model"], ids, words, merges)
        loaded = _loaded(data)
        if loaded != ids and not words:
            _extend(data["model"], ids, words, merges)
            loaded = _loaded(data)
        if loaded == ids:
            return _Built(ids, data)
        raise ValueError("the ids of the joined tokens do not come out right")


@dataclass(frozen=True, eq=False)
class _Built:
    ids: dict[str, int]
    data: dict[str, Any]


def _fast(folder: Path) -> dict[str, Any]:
    """Return the content of ``tokenizer.json``; a tokenizer in another format is converted."""
    if (folder / "tokenizer.json").is_file():
        return read_json(folder / "tokenizer.json")
    with tempfile.TemporaryDirectory() as place:
        load_tokenizer(folder).save_pretrained(place)
        if not (Path(place) / "tokenizer.json").is_file():
            raise CheckpointError(
                f"{folder}: the tokenizer has no tokenizer.json and cannot be converted to one; a union needs it"
            )
        return read_json(Path(place) / "tokenizer.json")


def _added(folder: Path, data: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the entries of the tokens beside the vocabulary, by token."""
    found = {entry["content"]: dict(entry) for entry in data.get("added_tokens") or ()}
    settings = folder / "tokenizer_config.json"
    decoder = read_json(settings).get("added_tokens_decoder") if settings.is_file() else None
    for i, entry in (decoder or {}).items():
        flags = {flag: bool(entry.get(flag, False)) for flag in _FLAGS}
        found.setdefault(entry["content"], {"id": int(i), "content": entry["content"], **flags})
    if (folder / "added_tokens.json").is_file():
        for token, i in read_json(folder / "added_tokens.json").items():
            flags = dict.fromkeys(_FLAGS, False)
            found.setdefault(token, {"id": i, "content": token, **flags})
    return found


def _merges(data: Mapping[str, Any]) -> list[list[str]]:
    merges = data["model"].get("merges", ())
    return [merge.split(" ") if isinstance(merge, str) else list(merge) for merge in merges]


def _scores(data: Mapping[str, Any]) -> dict[str, float]:
    """Return the log probabilities of a Unigram vocabulary; nothing for other kinds."""
    vocab = data["model"].get("vocab")
    return dict(vocab) if isinstance(vocab, list) else {}


def _extend(
    model: dict[str, Any], ids: Mapping[str, int], words: Mapping[str, float], merges: Collection[list[str]]
) -> None:
    """Write all tokens into the vocabulary of a ``tokenizer.json``, and the merges behind its own."""
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        vocab |= ids
    else:
        least = min((score for _, score in vocab), default=0.0)
        held = {token for token, _ in vocab}
        for token, i in sorted(ids.items(), key=lambda item: item[1]):
            if token not in held:
                if i != len(vocab):
                    raise ValueError(f"id {len(vocab)} of the vocabulary belongs to no token")
                vocab.append([token, max(least, words.get(token, least))])
    if not merges:
        return
    own: list[Any] = model.setdefault("merges", [])
    if own and isinstance(own[0], str):
        own += [" ".join(merge) for merge in merges]
    else:
        own += merges


def _loaded(data: Mapping[str, Any]) -> dict[str, int]:
    """Return the ids that the tokenizers library gives the tokens of a ``tokenizer.json``."""
    from tokenizers import Tokenizer

    try:
        return dict(Tokenizer.from_str(json.dumps(data)).get_vocab(with_added_tokens=True))
    except Exception as error:
        raise ValueError((str(error).splitlines() or [type(error).__name__])[0]) from None


def _write(file: Path, data: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
