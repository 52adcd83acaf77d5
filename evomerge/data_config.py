"""The data of a merge: texts with which methods like fisher and regmean weigh its inputs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from evomerge.errors import UserError, nearest
from evomerge.schema import Frozen, Positive, Whole, from_text


class TextFile(Frozen):
    """A JSONL file with one text a line.

    Attributes:
        file: its path.
        key, prompt: as for `Data`, where this file differs.
        sha256: of its bytes.
    """

    file: Annotated[str, Field(min_length=1)]
    key: str | None = None
    prompt: str | None = None
    sha256: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, data: Any) -> Any:
        return from_text(cls, data, "file", "a JSONL file")

    def digest(self) -> str:
        """Return the sha256 of the file's bytes.

        Raises:
            UserError: the file cannot be read, or is not the pinned one.
        """
        try:
            with open(self.file, "rb") as stream:
                found = hashlib.file_digest(stream, "sha256").hexdigest()
        except FileNotFoundError:
            raise UserError(f"{self.file}: no such file of texts") from None
        except OSError as error:
            raise UserError(f"{self.file}: cannot be read: {error.strerror}") from None
        if self.sha256 not in (None, found):
            raise UserError(
                f"{self.file}: the recipe expects the sha256 {self.sha256}, the file has {found}; give the "
                "original file, or remove the line to use this one"
            )
        return found


class TaskItems(Frozen):
    """The search items of one of a config's tasks: their prompts, and the reference answers as texts."""

    task: Annotated[str, Field(min_length=1)]


Texts = TextFile | TaskItems


class Data(Frozen):
    """Which texts stand for each input.

    Attributes:
        texts: for all inputs, or for each by name. Task items are for configs of searches.
        key: the key of each line's object that holds the text.
        prompt: the key that holds a prompt, which the text answers; None: there are none.
        samples: how many texts are used, the file's first.
        max_length: tokens of a text that are used: its first, or with a prompt the last of both together.
        labels: whose next tokens the Fisher information is about: those of the text (``given``, the empirical
            Fisher information), or drawn from the model's own distribution (``sampled``).
    """

    texts: Texts | dict[str, Texts]
    key: str = "text"
    prompt: str | None = None
    samples: Positive = 256
    max_length: Annotated[Whole, Field(ge=2)] = 512
    labels: Literal["given", "sampled"] = "given"

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, data: Any) -> Any:
        return {"texts": data} if isinstance(data, str) else data

    @field_validator("texts", mode="before")
    @classmethod
    def _each(cls, texts: Any) -> Any:
        if isinstance(texts, Mapping) and not {"file", "task"} & set(texts):
            return {name: _texts(item) for name, item in texts.items()}
        return _texts(texts)

    def check_inputs(self, inputs: Sequence[str]) -> None:
        """Raise ValueError unless there are texts for exactly these inputs."""
        if not isinstance(self.texts, dict):
            return
        for name in self.texts:
            if name not in inputs:
                raise ValueError(f"texts: '{name}' is not an input of the merge{nearest(name, inputs)}")
        for name in inputs:
            if name not in self.texts:
                raise ValueError(f"texts: the input '{name}' has none; name a file for it")

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks whose items are used."""
        used = self.texts.values() if isinstance(self.texts, dict) else [self.texts]
        return tuple(dict.fromkeys(item.task for item in used if isinstance(item, TaskItems)))

    def file_of(self, name: str) -> TextFile:
        """Return the texts of one input."""
        found = self.texts[name] if isinstance(self.texts, dict) else self.texts
        assert isinstance(found, TextFile), "task items are replaced by a file of them"
        return found

    def keys_of(self, name: str) -> tuple[str, str | None]:
        """Return the keys that hold the text and the prompt in one input's file."""
        own = self.file_of(name)
        return own.key or self.key, own.prompt or self.prompt

    def placed(self, folder: Path) -> Data:
        """Return the same with paths relative to a folder made absolute."""

        def place(item: Texts) -> Texts:
            if isinstance(item, TaskItems):
                return item
            return item.model_copy(update={"file": str((folder / Path(item.file).expanduser()).resolve())})

        return self.changed(place)

    def pinned(self) -> Data:
        """Return the same with the sha256 of every file.

        Raises:
            UserError: a file cannot be read, or is not the pinned one.
        """

        def pin(item: Texts) -> Texts:
            return item if isinstance(item, TaskItems) else item.model_copy(update={"sha256": item.digest()})

        return self.changed(pin)

    def settings(self, name: str, needs: str) -> list[Any]:
        """Return what one input's statistics of some kind depend on beside the input itself."""
        file = self.file_of(name)
        labels = self.labels if needs == "fisher" else None
        return [file.sha256 or file.digest(), *self.keys_of(name), self.samples, self.max_length, labels]

    def changed(self, change: Callable[[Texts], Texts]) -> Data:
        """Return the same with every input's texts changed."""
        texts = self.texts
        new = {n: change(t) for n, t in texts.items()} if isinstance(texts, dict) else change(texts)
        return self.model_copy(update={"texts": new})


def _texts(item: Any) -> Any:
    if isinstance(item, Mapping) and "task" in item:
        return TaskItems.model_validate(item)
    return TextFile.model_validate(item)
