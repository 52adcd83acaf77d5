"""Tokenizers of checkpoints: comparing, copying and loading them.

The comparison reads the files themselves, so that it needs no import of transformers.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomerge.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from evomerge.checkpoints.reader import Checkpoint

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)
"""Files that make up a tokenizer; a folder has some of them."""

CHAT_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja")
"""Files (patterns) that hold chat templates; older checkpoints keep theirs in ``tokenizer_config.json``."""

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
"""Files that say how a multimodal model's images, videos and sounds become its inputs."""

_VOCABULARIES = (
    "tokenizer.json",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.txt",
    "tekken.json",
)


@dataclass(frozen=True)
class Vocabulary:
    """What a tokenizer maps to what.

    Attributes:
        ids: id of each token, added tokens included.
        merges: BPE merges in order; empty where the tokenizer has none.
        steps: canonical JSON of the normalizer and the pre-tokenizer, as far as the files tell.
    """

    ids: Mapping[str, int]
    merges: tuple[str, ...] = ()
    steps: Mapping[str, str] | None = None


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Load a folder's tokenizer with transformers, from local files and without executing code of theirs."""
    _require_tokenizer(path)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path}: the tokenizer cannot be loaded: {reason}") from None


def has_tokenizer(path: Path) -> bool:
    """Whether a folder has a tokenizer's vocabulary."""
    return any((path / name).is_file() for name in _VOCABULARIES)


def tokenizer_files(path: Path) -> list[Path]:
    """Return a folder's tokenizer files, chat templates left out."""
    return [path / name for name in TOKENIZER_FILES if (path / name).is_file()]


def chat_template_files(path: Path) -> list[Path]:
    """Return a folder's chat template files."""
    return sorted(file for pattern in CHAT_TEMPLATE_FILES for file in path.glob(pattern) if file.is_file())


def tokenizer_sha256(path: Path) -> str:
    """Return the sha256 over names and bytes of a folder's tokenizer and chat template files."""
    lines = [
        f"{file.relative_to(path).as_posix()} {hashlib.sha256(file.read_bytes()).hexdigest()}\n"
        for file in sorted([*tokenizer_files(path), *chat_template_files(path)])
    ]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def read_vocabulary(path: Path) -> Vocabulary:
    """Read a folder's token ids and merges.

    ``tokenizer.json`` (or ``vocab.json`` and ``merges.txt``) is read as it is, with the tokens that
    ``added_tokens.json`` and ``tokenizer_config.json`` add; other formats are loaded with transformers. The
    last few vocabularies are kept.

    Raises:
        CheckpointError: no tokenizer, or a file of it cannot be read.
    """
    _require_tokenizer(path)
    return _read_vocabulary(path, _state(path))


def vocabulary_digest(path: Path) -> str:
    """Return a hash that two folders share only if their token ids are the same.

    Folders with the same ids in other words may differ in it. Chat templates and settings do not matter.
    """
    return _vocabulary_digest(path, _state(path))


@lru_cache(maxsize=64)
def _vocabulary_digest(path: Path, state: object) -> str:
    digest = hashlib.sha256()
    for file in tokenizer_files(path):
        data = file.read_bytes()
        if file.name == "tokenizer_config.json":
            data = json.dumps(read_json(file).get("added_tokens_decoder"), sort_keys=True).encode()
        elif file.name == "special_tokens_map.json":
            continue
        digest.update(f"{file.name} {len(data)}\n".encode())
        digest.update(data)
    return digest.hexdigest()


def _state(path: Path) -> tuple[tuple[str, int, int], ...]:
    """Return what changes when a tokenizer's files do."""
    stats = [(file.name, file.stat()) for file in tokenizer_files(path)]
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


@lru_cache(maxsize=16)
def _read_vocabulary(path: Path, state: object) -> Vocabulary:
    fast = path / "tokenizer.json"
    steps: dict[str, str] | None = None
    try:
        if fast.is_file():
            data = read_json(fast)
            model = data["model"]
            words = model.get("vocab", {})
            ids = dict(words) if isinstance(words, dict) else {entry[0]: i for i, entry in enumerate(words)}
            merges = tuple(m if isinstance(m, str) else " ".join(m) for m in model.get("merges", ()))
            ids.update({entry["content"]: entry["id"] for entry in data.get("added_tokens") or ()})
            _check_ids(ids)
            steps = {
                key: json.dumps(data.get(key), sort_keys=True) for key in ("normalizer", "pre_tokenizer")
            }
        elif (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
            fast = path / "vocab.json"
            ids = dict(read_json(fast))
            lines = (path / "merges.txt").read_text(encoding="utf-8").splitlines()
            merges = tuple(line for line in lines if line and not line.startswith("#version"))
            _check_ids(ids)
        else:
            return Vocabulary(load_tokenizer(path).get_vocab())
        if (path / "added_tokens.json").is_file():
            fast = path / "added_tokens.json"
            ids.update(read_json(fast))
            _check_ids(ids)
        fast = path / "tokenizer_config.json"
        added = read_json(fast).get("added_tokens_decoder") if fast.is_file() else None
        ids.update({entry["content"]: int(key) for key, entry in (added or {}).items()})
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{fast}: not a tokenizer file that can be understood: {error!r}") from None
    return Vocabulary(ids, merges, steps)


def check_tokenizers(base: Checkpoint, others: Mapping[str, Checkpoint]) -> list[str]:
    """Compare experts' tokenizers with the base's as far as ids do not tell.

    Other token ids are no hindrance (rows are matched by token); other merges or another normalizer mean that
    a text becomes other tokens than the expert was trained on. Without a tokenizer in the base, the first
    expert that has one stands in for it.

    Returns:
        Warnings, one sentence each.

    Raises:
        CheckpointError: a tokenizer's file cannot be read.
    """
    warnings = []
    owner = base.name or "base"
    reference = base.path if has_tokenizer(base.path) else None
    if reference is None:
        warnings.append(f"{base.path}: the base has no tokenizer files")
    for name, other in others.items():
        if not has_tokenizer(other.path):
            warnings.append(
                f"{other.path}: expert '{name}' has no tokenizer files, so its tokens are taken to be the base's"
            )
            continue
        if reference is None:
            owner, reference = f"expert '{name}'", other.path
            continue
        if vocabulary_digest(reference) == vocabulary_digest(other.path):
            continue
        ours, theirs = read_vocabulary(reference), read_vocabulary(other.path)
        place = f"{other.path}: the tokenizer of expert '{name}'"
        difference = _differing_merge(ours, theirs, owner, name) if ours.ids == theirs.ids else None
        if difference is not None:
            warnings.append(
                f"{place} has other BPE merges than that of {owner} ({difference}); texts may become other "
                "tokens than it was trained on"
            )
        for step in ("normalizer", "pre_tokenizer"):
            if ours.steps and theirs.steps and ours.steps[step] != theirs.steps[step]:
                warnings.append(
                    f"{other.path}: the {step} of expert '{name}' is written differently from that of "
                    f"{owner}; the same text may become other tokens"
                )
    return warnings


def chat_templates(path: Path) -> dict[str, str]:
    """Return a folder's chat templates by name (``default``: the main one), from whichever form it uses."""
    templates = {}
    if (path / "chat_template.jinja").is_file():
        templates["default"] = (path / "chat_template.jinja").read_text(encoding="utf-8")
    for file in sorted(path.glob("additional_chat_templates/*.jinja")):
        templates[file.stem] = file.read_text(encoding="utf-8")
    for name in ("tokenizer_config.json", "chat_template.json"):
        if not templates and (path / name).is_file():
            value = read_json(path / name).get("chat_template")
            if isinstance(value, str):
                templates = {"default": value}
            elif isinstance(value, list):
                templates = {entry["name"]: entry["template"] for entry in value}
            elif isinstance(value, dict):
                templates = dict(value)
    return templates


def copy_tokenizer(out: Path, tokenizer_donor: Path, chat_template_donor: Path | None = None) -> None:
    """Copy a tokenizer and its chat templates into the folder `out`, byte for byte.

    Args:
        out: existing folder.
        tokenizer_donor: whose tokenizer; a folder without tokenizer files gives none.
        chat_template_donor: whose chat templates, if not the tokenizer's own. They are then written as
            ``.jinja`` files, and a template inside the tokenizer's ``tokenizer_config.json`` is taken out.
    """
    own = chat_template_donor is None or chat_template_donor == tokenizer_donor
    files = tokenizer_files(tokenizer_donor) + (chat_template_files(tokenizer_donor) if own else [])
    for file in files:
        target = out / file.relative_to(tokenizer_donor)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)
    if own or chat_template_donor is None:
        return
    settings = out / "tokenizer_config.json"
    if settings.is_file() and "chat_template" in (data := read_json(settings)):
        del data["chat_template"]
        settings.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    write_chat_templates(out, chat_templates(chat_template_donor))


def write_chat_templates(out: Path, templates: Mapping[str, str]) -> None:
    """Write chat templates by name (``default``: the main one) as ``.jinja`` files."""
    for name, template in templates.items():
        target = out / (
            "chat_template.jinja" if name == "default" else f"additional_chat_templates/{name}.jinja"
        )
        if name != Path(name).name or name in (".", ".."):
            raise CheckpointError(f"'{name}' cannot be the name of a chat template's file")
        target.parent.mkdir(exist_ok=True)
        target.write_text(template, encoding="utf-8")


def _check_ids(ids: Mapping[str, object]) -> None:
    for token, i in ids.items():
        if type(i) is not int or i < 0:
            raise ValueError(f"the id of {token!r} is {i!r}")


def _require_tokenizer(path: Path) -> None:
    if not has_tokenizer(path):
        raise CheckpointError(f"{path}: has no tokenizer files (none of {', '.join(_VOCABULARIES)})")


def read_json(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: cannot be read as JSON: {error}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{file}: holds no JSON object")
    return data


def _differing_merge(ours: Vocabulary, theirs: Vocabulary, owner: str, name: str) -> str | None:
    if ours.merges == theirs.merges or not ours.merges or not theirs.merges:
        return None
    pairs = list(zip_longest(ours.merges, theirs.merges))
    rank, (one, other) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
    return f"number {rank} is {one!r} in {owner}, {other!r} in {name}"
