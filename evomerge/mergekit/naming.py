"""The models of a mergekit YAML: where they are, and what a recipe calls them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from evomerge.checkpoints.chat_templates import BUILT_IN
from evomerge.errors import UserError
from evomerge.mergekit.document import Place, Reference
from evomerge.output import AUTO, UNION
from evomerge.recipe import Source, expand_home
from evomerge.schema import validate


class Names:
    """Gives each model of a document the name of its folder.

    Args:
        folder: of the document: where models are looked for after the working directory.
        notes: takes sentences about what does nothing.

    Attributes:
        models: name → source, of those that were named so far.
    """

    def __init__(self, folder: Path, notes: list[str]) -> None:
        self.models: dict[str, Source] = {}
        self._folder = folder
        self._notes = notes
        self._names: dict[str, str] = {}

    def of(self, reference: Reference) -> str:
        """Return the name of a model in the recipe, which is that of its folder."""
        key = repr(reference)
        if key not in self._names:
            if reference.override_architecture is not None:
                self._notes.append(
                    f"override_architecture of '{reference}': does nothing: tensors are known by their names"
                )
            stem = Path(reference.model.path).name or reference.model.path
            if reference.lora is not None:
                stem += f"+{Path(reference.lora.path).name}"
            self._names[key] = name = self.free(self.models, stem)
            self.models[name] = self._source(reference)
        return self._names[key]

    def _source(self, reference: Reference) -> Source:
        lora: dict[str, Any] = {}
        if reference.lora is not None:
            lora["adapter"] = self._located(reference.lora)
            if reference.lora.revision is not None:
                lora["adapter_revision"] = reference.lora.revision
        return Source(source=self._located(reference.model), revision=reference.model.revision, **lora)

    def _located(self, place: Place) -> str:
        path = expand_home(place.path)
        candidates = [path.absolute()] if path.is_absolute() else [Path.cwd() / path, self._folder / path]
        found = next((candidate for candidate in candidates if candidate.is_dir()), None)
        if found is not None:
            return str(found.resolve())
        if place.path.startswith((".", "/", "~")):
            return str(candidates[-1].resolve())
        return place.path

    def free(self, taken: Iterable[str], name: str) -> str:
        """Return a name that nothing in `taken` and no model has: this one, or with a number."""
        # A model's name must not mean something else where the output names models.
        used = {*taken, *self.models, UNION, AUTO, *BUILT_IN}
        return next(n for n in (name, *(f"{name}-{i}" for i in range(2, 1000))) if n not in used)


def reference_from(data: Any, key: str) -> Reference:
    """Read a model's reference as it may stand anywhere in a document; `key` is where."""
    try:
        return validate(Reference, data, None)
    except UserError as error:
        raise ValueError(f"{key}: {error}") from None
