"""The output's vocabulary: whose tokenizer it has, and how the parents' embeddings and heads get its rows.

Rows belong together when their tokens are the same string. A row of the output is merged from virtual
operands: of a parent that has the token its own row; else the base's row; else, where the base lacks it too
or none is read, the mean of the rows of the inputs that have it. So a parent without the token has the
difference zero, and a token that the base lacks starts from the mean of the parents that have it. Rows of no
token are padding: they are the tokenizer's owner's, and nobody else's padding has a part in anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from evomerge.checkpoints import Checkpoint
from evomerge.checkpoints.aligned import Alignment, Fill, Rows, align, with_head
from evomerge.checkpoints.completeness import head_name, input_embedding, output_head, vocabulary_tensors
from evomerge.checkpoints.tokenizer import (
    copy_tokenizer,
    has_tokenizer,
    read_vocabulary,
    vocabulary_digest,
)
from evomerge.errors import CheckpointError
from evomerge.methods.registry import get_method
from evomerge.recipe import Recipe

_SHOWN = 3


def donor_of(recipe: Recipe, source: str) -> str:
    """Return the model that gives a source (a model's or a merge's name) its tensor set and config."""
    if source in recipe.models:
        return source
    merge = recipe.merges[source]
    return merge.base or merge.inputs[0]


def readers(recipe: Recipe, source: str) -> tuple[str, ...]:
    """Return the models whose weights a source is made of, a base that is read first."""
    if source in recipe.models:
        return (source,)
    merge = recipe.merges[source]
    base = [merge.base] if merge.base and _reads_base(recipe, source) else []
    return tuple(dict.fromkeys([*base, *merge.inputs]))


def ends(recipe: Recipe) -> tuple[str, str]:
    """Return the sources of the output's embedding and of its head."""
    if recipe.path is None:
        name = next(iter(recipe.merges))
        return name, name
    first, last = recipe.path[0], recipe.path[-1]
    return str(first.model or first.merge), str(last.model or last.merge)


def head_of(recipe: Recipe, checkpoints: Mapping[str, Checkpoint]) -> str | None:
    """Return None where the output's head is its embedding, else the head's name.

    It is tied where both come from one source all of whose models are tied, byte for byte. Two merges that say
    the same are one source.
    """
    first, last = ends(recipe)
    models = [checkpoints[name] for name in readers(recipe, last)]
    same = first == last or (first in recipe.merges and recipe.merges[first] == recipe.merges.get(last))
    if same and any(model.tied for model in models) and all(m.repeats_embedding for m in models):
        return None
    heads = (output_head(model.tensors) for model in models if not model.tied)
    return next((head for head in heads if head is not None), head_name(models[0].text_config))


@dataclass(frozen=True)
class Voters:
    """Who has a part in the rows of one source.

    Attributes:
        readers: the models that are read.
        stand_ins: groups of models that are asked, in order, for the row of a token that a reader lacks. The
            first group with such models gives the mean of their rows.
    """

    readers: tuple[str, ...]
    stand_ins: tuple[tuple[str, ...], ...]


def voters(recipe: Recipe, source: str, vocabulary: OutputVocabulary) -> Voters:
    """Return who has a part in a source's rows."""
    read = readers(recipe, source)
    groups: list[tuple[str, ...]] = []
    if source in recipe.merges:
        merge = recipe.merges[source]
        declared: list[tuple[str, ...]] = [(merge.base,)] if merge.base else []
        inputs = [merge.inputs]
        groups = declared + inputs if _reads_base(recipe, source) else inputs + declared
    owner = vocabulary.source.owner
    return Voters(read, (*groups, *([(owner,)] if owner else []), tuple(vocabulary.models)))


def _reads_base(recipe: Recipe, source: str) -> bool:
    merge = recipe.merges[source]
    return any(get_method(method).base_in(merge.dialect) != "unused" for method in merge.methods)


@dataclass(frozen=True)
class TokenizerSource:
    """Where the output's tokenizer comes from.

    Attributes:
        owner: the model whose it is, or None for a folder beside the models.
        folder: where its files are.
    """

    owner: str | None
    folder: Path


class OutputVocabulary:
    """The output's tokenizer, the number of its rows, and the parents as it sees them.

    Attributes:
        source: where the tokenizer comes from.
        models: with a part in embedding or head, by name.
        rows: of the output's embedding.
        warnings: what the user should know, one sentence each.
    """

    def __init__(self, source: TokenizerSource, models: Mapping[str, Checkpoint]) -> None:
        self.source = source
        self.warnings: list[str] = []
        self.models = models
        self._views: dict[tuple[Voters, str | None], dict[str, Checkpoint]] = {}
        self._maps: dict[str, Rows] = {}
        sizes = {name: _rows(model) for name, model in models.items()}
        self._lacking = [name for name, model in models.items() if not has_tokenizer(model.path)]
        self.rows = sizes[source.owner] if source.owner else 0
        self.uniform = self._is_uniform(sizes)
        if not self.uniform:
            self._compare(sizes)

    def write(self, out: Path) -> None:
        """Write the tokenizer's files into an existing folder."""
        copy_tokenizer(out, self.source.folder)

    def view(self, voters: Voters, head: str | None) -> Mapping[str, Checkpoint]:
        """Return the readers as the output sees their ends; nothing where they are so already.

        Args:
            voters: from `voters`.
            head: of the output, None where it is tied.
        """
        key = (voters, head)
        if key not in self._views:
            read = {name: self.models[name] for name in voters.readers}
            moved = not self.uniform and any(not self._is_identity(name) for name in read)
            tied = head is not None and any(model.tied for model in read.values())
            if moved:
                self._views[key] = self._aligned(voters, head)
            elif tied and head is not None:
                self._views[key] = {n: with_head(m, head) if m.tied else m for n, m in read.items()}
            else:
                self._views[key] = {}
        return self._views[key]

    def _is_uniform(self, sizes: Mapping[str, int]) -> bool:
        """Whether all models have the output's rows as they are, judged by the bytes of their tokenizers."""
        if len({self.rows, *sizes.values()}) > 1:
            return False
        having = [model.path for name, model in self.models.items() if name not in self._lacking]
        return len({vocabulary_digest(path) for path in [*having, *self._own_folder()]}) <= 1

    def _own_folder(self) -> list[Path]:
        return [self.source.folder] if has_tokenizer(self.source.folder) else []

    def _compare(self, sizes: Mapping[str, int]) -> None:
        """Find the row of each output token in each model."""
        reference = self._reference(sizes)
        ids = dict(read_vocabulary(self.source.folder).ids)
        theirs = {
            name: read_vocabulary((reference if name in self._lacking else model).path).ids
            for name, model in self.models.items()
        }
        held = [
            i for token, i in ids.items() if any(theirs[n].get(token, sizes[n]) < sizes[n] for n in theirs)
        ]
        self.rows = max([self.rows, *(i + 1 for i in (held if self.source.owner else ids.values()))])
        for name, own in theirs.items():
            self._maps[name] = _row_map(ids, own, self.rows, sizes[name])
        if self.source.owner:
            used = np.zeros(self.rows, dtype=bool)
            used[[i for i in ids.values() if i < self.rows]] = True
            padding = np.nonzero(~used[: sizes[self.source.owner]])[0]
            self._maps[self.source.owner][padding] = padding
        for name, own in theirs.items():
            self._tell(name, ids, own, sizes[name])

    def _reference(self, sizes: Mapping[str, int]) -> Checkpoint:
        """Return the model whose tokenizer stands for those that have none."""
        having = [name for name in self.models if name not in self._lacking]
        reference = next((n for n in having if n == self.source.owner), next(iter(having), None))
        for name in self._lacking:
            if reference is None or sizes[name] != sizes[reference]:
                other = reference or next(n for n in sizes if sizes[n] != sizes[name])
                raise CheckpointError(
                    f"{self.models[name].path}: '{name}' has no tokenizer files, and {sizes[name]} rows in its "
                    f"embedding where '{other}' has {sizes[other]}; copy its tokenizer into the folder, "
                    "rows are matched by token"
                )
        if reference is None:
            raise CheckpointError(
                f"{self.source.folder}: none of the models has tokenizer files, so that their rows cannot be "
                "matched with this tokenizer's tokens; copy theirs into one of the folders"
            )
        return self.models[reference]

    def _tell(self, name: str, ids: Mapping[str, int], own: Mapping[str, int], size: int) -> None:
        further = [token for token, i in own.items() if i < size and token not in ids]
        shared = sum(token in ids for token in own)
        place = self.models[name].path
        if not shared:
            raise CheckpointError(
                f"{place}: the tokenizer of '{name}' shares no token with that of the output "
                f"({self.source.folder}); only models with related tokenizers can be merged"
            )
        if further:
            self.warnings.append(
                f"'{name}' has {len(further):,} tokens that the output's tokenizer lacks ({_list(further)}); "
                "they are left out, 'output.tokenizer: union' keeps them"
            )
        if 2 * shared < len(ids):
            self.warnings.append(
                f"'{name}' has only {shared:,} of the {len(ids):,} tokens of the output's tokenizer; its rows "
                "of the others stand in for nothing of its own"
            )

    def _is_identity(self, name: str) -> bool:
        own = self._maps[name]
        return len(own) == _rows(self.models[name]) and bool((own == np.arange(len(own))).all())

    def _aligned(self, voters: Voters, head: str | None) -> dict[str, Checkpoint]:
        maps = {
            name: self._maps[name] for name in dict.fromkeys([*voters.readers, *sum(voters.stand_ins, ())])
        }
        fill = self._fill(voters, maps)
        views = {}
        for name in voters.readers:
            model = self.models[name]
            alignment = Alignment(maps[name], fill, self.rows)
            names = [*vocabulary_tensors(model.tensors), *([head] if head is not None else [])]
            views[name] = align(model, dict.fromkeys(names, alignment))
        return views

    def _fill(self, voters: Voters, maps: Mapping[str, Rows]) -> Fill:
        donors = list(maps)
        rows = np.full((len(donors), self.rows), -1, dtype=np.int64)
        lacking = np.any([maps[name] < 0 for name in voters.readers], axis=0)
        for group in voters.stand_ins:
            members = [donors.index(name) for name in group]
            own = np.stack([maps[name] for name in group])
            found = (own >= 0).any(axis=0) & lacking
            rows[np.ix_(members, found)] = own[:, found]
            lacking &= ~found
        return Fill(tuple(self.models[name] for name in donors), rows)


def output_vocabulary(recipe: Recipe, checkpoints: Mapping[str, Checkpoint]) -> OutputVocabulary:
    """Return the vocabulary of a recipe's output; the last few are kept."""
    speaking = _speaking(recipe)
    having = (name for name in speaking if has_tokenizer(checkpoints[name].path))
    owner = recipe.output.tokenizer or next(having, speaking[0])
    source = TokenizerSource(owner, checkpoints[owner].path)
    names = dict.fromkeys([*speaking, owner])
    return _output_vocabulary(source, tuple((name, checkpoints[name]) for name in names))


@lru_cache(maxsize=8)
def _output_vocabulary(
    source: TokenizerSource, models: tuple[tuple[str, Checkpoint], ...]
) -> OutputVocabulary:
    return OutputVocabulary(source, dict(models))


def _speaking(recipe: Recipe) -> list[str]:
    """Models with a part in the output's embedding or head, the one that gives the config first."""
    sources = ends(recipe)
    return [name for source in sources for name in (donor_of(recipe, source), *readers(recipe, source))]


def _rows(checkpoint: Checkpoint) -> int:
    embedding = input_embedding(checkpoint.tensors)
    assert embedding is not None, "checkpoints without an embedding are refused"
    return checkpoint.tensors[embedding].shape[0]


def _row_map(ids: Mapping[str, int], own: Mapping[str, int], rows: int, size: int) -> Rows:
    found = np.full(rows, -1, dtype=np.int64)
    for token, i in ids.items():
        row = own.get(token, size)
        if row < size and i < rows:
            found[i] = row
    return found


def _list(tokens: Iterable[str]) -> str:
    tokens = list(tokens)
    shown = ", ".join(repr(token) for token in tokens[:_SHOWN])
    return shown + (", …" if len(tokens) > _SHOWN else "")
