"""Reading a recipe's file, and finding the files and folders that it names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from evomerge.errors import UserError, in_file
from evomerge.output import Output
from evomerge.recipe.schema import Recipe, Source
from evomerge.schema import read_text, read_yaml


def load_recipe(path: Path) -> Recipe:
    """Read a recipe file. Relative sources in it are relative to the file."""
    return recipe_from(read_yaml(path, "recipe"), path)


def recipe_from(data: Mapping[str, Any], path: Path) -> Recipe:
    """Do what `load_recipe` does with what the file at `path` holds."""
    if "evomerge" not in data:
        raise UserError(f"{path}: not an evomerge recipe: the first key should be 'evomerge: 1'")
    if data["evomerge"] != 1:
        raise UserError(f"{path}: evomerge: version {data['evomerge']!r} is not known; this is version 1")
    recipe = Recipe.from_dict(data, path)
    folder = folder_of(path)
    with in_file(path):
        models = {name: _placed(name, source, folder) for name, source in recipe.models.items()}
        merges = {
            name: merge.model_copy(update={"data": merge.data.placed(folder)}) if merge.data else merge
            for name, merge in recipe.merges.items()
        }
        output = resolve_output(recipe.output, models, folder)
    return recipe.model_copy(update={"models": models, "merges": merges, "output": output})


def folder_of(path: Path) -> Path:
    """Return the folder that a recipe's paths are relative to: the working directory for one that is piped in."""
    return path.parent.resolve() if path.is_file() else Path.cwd()


def _placed(name: str, source: Source, folder: Path) -> Source:
    try:
        adapter = None if source.adapter is None else resolve_source(source.adapter, folder)
        return source.model_copy(update={"source": resolve_source(source.source, folder), "adapter": adapter})
    except UserError as error:
        raise UserError(error.problem, key=f"models.{name}") from None


def resolve_output(output: Output, models: Iterable[str], folder: Path) -> Output:
    """Return an output with its files found: a tokenizer's folder in full, a chat template's file as text."""
    update: dict[str, Any] = {}
    models = set(models)
    tokenizer, template = output.vocabulary, output.chat_template
    if tokenizer.is_folder(models):
        update["tokenizer"] = tokenizer.model_copy(
            update={"source": resolve_source(tokenizer.source, folder)}
        )
    if template is not None and template.endswith(".jinja") and template not in models:
        try:
            update["chat_template"] = read_text(folder / expand_home(template), "chat template")
        except UserError as error:
            raise UserError(error.problem, key="output.chat_template") from None
    return output.model_copy(update=update)


def resolve_source(text: str, folder: Path) -> str:
    """Resolve a model's name: paths relative to `folder`, an existing folder beside it, else a hub id."""
    if text.startswith("~"):
        return str(expand_home(text))
    if text.startswith((".", "/")):
        return str((folder / text).resolve())
    beside = folder / text
    return str(beside.resolve()) if beside.is_dir() else text


def expand_home(text: str) -> Path:
    """Return a path with a leading ``~`` or ``~user`` replaced."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise UserError(f"{text}: there is no such home folder; write the path out", key="") from None
