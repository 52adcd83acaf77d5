"""Token sequences from a JSONL file of texts."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from evomerge.checkpoints import Checkpoint, load_tokenizer
from evomerge.data_config import Data, TextFile
from evomerge.engines.encoding import Encoder
from evomerge.environment import cache_folder
from evomerge.errors import CheckpointError, UserError, nearest


@dataclass(frozen=True)
class Sequence:
    """One text as tokens.

    Attributes:
        ids: ``(1, T)``.
        start: first position whose token counts as an answer: 1, or where the text after its prompt begins.
        line: of the file, from 1.
    """

    ids: torch.Tensor
    start: int
    line: int


def read_sequences(
    data: Data, name: str, checkpoint: Checkpoint, tokenizer: Path | None = None
) -> list[Sequence]:
    """Read one input's texts and encode them as evaluation does.

    Args:
        data: which file, and how it is read.
        name: of the input.
        checkpoint: the model.
        tokenizer: folder of the tokenizer; the model's own by default.

    Raises:
        UserError: a line that is no JSON object with a text, or no line at all.
        CheckpointError: the model has no tokenizer, or fewer positions than `max_length`.
    """
    file = Path(data.file_of(name).file)
    positions = checkpoint.config.get("max_position_embeddings") or checkpoint.config.get("n_positions")
    if isinstance(positions, int) and positions < data.max_length:
        raise CheckpointError(
            f"{checkpoint.path}: has {positions} positions; set the data's max_length to no more, not "
            f"{data.max_length}"
        )
    try:
        encoder = Encoder(load_tokenizer(tokenizer or checkpoint.path))
    except ValueError as error:
        raise CheckpointError(
            f"{tokenizer or checkpoint.path}: {error}, so texts have no beginning"
        ) from None
    sequences = []
    for line, prompt, text in read_texts(file, *data.keys_of(name), data.samples):
        if prompt is None:
            ids, start = encoder.encode(text)[: data.max_length], 1
        else:
            context, answer = encoder.pair(prompt, text)
            ids = [*context, *answer][-data.max_length :]
            start = max(1, len(ids) - len(answer))
        if ids:
            sequences.append(Sequence(torch.tensor([ids]), start, line))
    if not sequences:
        raise UserError(f"{file}: its texts have no tokens; give other texts")
    return sequences


def read_texts(
    file: Path, key: str, prompt_key: str | None, samples: int
) -> list[tuple[int, str | None, str]]:
    """Return (line, prompt, text) of the first lines that are wanted; empty lines are skipped."""
    found: list[tuple[int, str | None, str]] = []
    try:
        with file.open(encoding="utf-8") as stream:
            for line, content in enumerate(stream, 1):
                if len(found) == samples:
                    break
                if content.strip():
                    entry = _object(content, f"{file}: line {line}: ")
                    prompt = None if prompt_key is None else _text(entry, prompt_key, file, line, "prompt")
                    found.append((line, prompt, _text(entry, key, file, line, "key")))
    except FileNotFoundError:
        raise UserError(f"{file}: no such file of texts") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: is not UTF-8 text (see byte {error.start})") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    if not found:
        raise UserError(f"{file}: is empty; write one JSON object with a text on each line")
    return found


def keep_references(task: str, references: Iterable[tuple[str, str]]) -> TextFile:
    """Write prompts and answers of a task's items as a file of texts into the cache folder."""
    lines = [json.dumps({"prompt": prompt, "text": answer}) + "\n" for prompt, answer in references]
    if not lines:
        raise UserError(f"space.data.texts: the task '{task}' has no reference answers; name a file of texts")
    content = "".join(lines).encode()
    digest = hashlib.sha256(content).hexdigest()
    file = cache_folder() / "texts" / f"{digest}.jsonl"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".tmp", delete=False) as stream:
            stream.write(content)
        os.replace(stream.name, file)
    except OSError as error:
        raise UserError(
            f"{file.parent}: cannot be written: {error.strerror}; set EVOMERGE_CACHE to another folder"
        ) from None
    return TextFile(file=str(file), key="text", prompt="prompt", sha256=digest)


def _object(content: str, place: str) -> dict[str, Any]:
    try:
        entry = json.loads(content)
    except (ValueError, RecursionError):
        raise UserError(f'{place}is not JSON; write one object like {{"text": "..."}} on each line') from None
    if not isinstance(entry, dict):
        raise UserError(f'{place}is no JSON object; write {{"text": "..."}}')
    return entry


def _text(entry: dict[str, Any], key: str, file: Path, line: int, setting: str) -> str:
    if key not in entry:
        hint = nearest(key, entry) or f" (there are: {', '.join(map(str, entry)) or 'none'})"
        raise UserError(
            f"{file}: line {line}: has no key '{key}'{hint}; set the data's '{setting}' to the right one"
        )
    text = entry[key]
    if not isinstance(text, str) or not (text or setting == "prompt"):
        raise UserError(f"{file}: line {line}: '{key}' should be some text, it is {json.dumps(text)[:60]}")
    return text
