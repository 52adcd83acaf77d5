"""The output's vocabulary: whose tokenizer it has, and how the parents' embeddings and heads get its rows.

Rows belong together when their tokens are the same string. A row of the output is merged from virtual
operands: of a parent that has the token its own row; else the base's row; else, where the base lacks it too
or none is read, the mean of the rows of the inputs that have it. So a parent without the token has the
difference zero, and a token that the base lacks starts from the mean of the parents that have it. Rows of no
token are padding: they are the tokenizer's owner's, and nobody else's padding has a part in anything.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
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
from evomerge.checkpoints.union import UnionTokenizer
from evomerge.errors import CheckpointError, UserError
from evomerge.methods.registry import get_method
from evomerge.output import UNION, TokenRow, TokenRule
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
        owner: the model whose rows beyond the tokens are kept: the one whose tokenizer it is, or whose is
            extended. None for a folder of other tokens than any model's.
        folder: where its files are.
        union: whether the other models' further tokens are added.
        multiple: what the number of rows is a multiple of; None: the owner's number of rows, or more.
        tokens: JSON of the rules for single tokens.
    """

    owner: str | None
    folder: Path
    union: bool = False
    multiple: int | None = None
    tokens: str = "{}"


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
        self.models = models
        self.warnings: list[str] = []
        self._views: dict[tuple[Voters, str | None], dict[str, Checkpoint]] = {}
        self._maps: dict[str, Rows] = {}
        self._sizes = {name: _rows(model) for name, model in models.items()}
        self._lacking = [name for name, model in models.items() if not has_tokenizer(model.path)]
        self._rules = {
            token: TokenRule.model_validate(rule) for token, rule in json.loads(source.tokens).items()
        }
        self._union = self._joined() if source.union and not self._is_uniform() else None
        self.rows = self._sizes[source.owner] if source.owner else 0
        self._filled = self.rows
        self._uniform = not (source.multiple or self._rules) and self._is_uniform() and not self._is_padded()
        if not self._uniform:
            self._compare()

    @property
    def has_tokenizer(self) -> bool:
        """Whether there is a tokenizer at all; models can be merged without."""
        return has_tokenizer(self.source.folder)

    @property
    def ids(self) -> Mapping[str, int]:
        """The id of every token."""
        return self._union.ids if self._union is not None else read_vocabulary(self.source.folder).ids

    def write(self, out: Path) -> None:
        """Write the tokenizer's files into an existing folder."""
        if self._union is not None:
            self._union.write(out)
        else:
            copy_tokenizer(out, self.source.folder)

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """Give a folder with the tokenizer's files: the model's own, or one that is removed at the end."""
        if self._union is None:
            yield self.source.folder
            return
        with tempfile.TemporaryDirectory(prefix="evomerge-tokenizer-") as place:
            self.write(Path(place))
            yield Path(place)

    def view(self, voters: Voters, head: str | None) -> Mapping[str, Checkpoint]:
        """Return the readers as the output sees their ends; nothing where they are so already.

        Args:
            voters: from `voters`.
            head: of the output, None where it is tied.
        """
        key = (voters, head)
        if key not in self._views:
            read = {name: self.models[name] for name in voters.readers}
            moved = bool(self._rules) or (
                not self._uniform and any(not self._is_identity(name) for name in read)
            )
            tied = head is not None and any(model.tied for model in read.values())
            if moved:
                self._views[key] = self._aligned(voters, head)
            elif tied and head is not None:
                self._views[key] = {n: with_head(m, head) if m.tied else m for n, m in read.items()}
            else:
                self._views[key] = {}
        return self._views[key]

    def _joined(self) -> UnionTokenizer | None:
        others = [
            (model.path, self._sizes[name])
            for name, model in self.models.items()
            if name not in (*self._lacking, self.source.owner)
        ]
        union = UnionTokenizer(self.source.folder, tuple(others))
        return union if len(union.ids) > len(read_vocabulary(self.source.folder).ids) else None

    def _is_uniform(self) -> bool:
        """Whether all models have the output's rows as they are, judged by the bytes of their tokenizers."""
        if self.source.owner is None or len(set(self._sizes.values())) > 1:
            return False
        having = [model.path for name, model in self.models.items() if name not in self._lacking]
        own = [self.source.folder] if self.has_tokenizer else []
        return len({vocabulary_digest(path) for path in [*having, *own]}) <= 1

    def _is_padded(self) -> bool:
        """Whether models with one tokenizer have further rows, in which only the owner's count."""
        # Other formats are read with transformers, which a plain merge does without.
        if not (self.source.folder / "tokenizer.json").is_file():
            return False
        return len({i for i in self.ids.values() if i < self.rows}) < self.rows

    def _compare(self) -> None:
        """Find the row of each output token in each model."""
        reference, sizes, owner = self._reference(), self._sizes, self.source.owner
        ids = self.ids
        digest = vocabulary_digest(self.source.folder) if self._union is None else None
        theirs: dict[str, Mapping[str, int]] = {}
        for name, model in self.models.items():
            path = (reference if name in self._lacking else model).path
            theirs[name] = ids if vocabulary_digest(path) == digest else read_vocabulary(path).ids
        kinds = {(id(own), sizes[name]): own for name, own in theirs.items()}.items()
        held = [i for token, i in ids.items() if any(own.get(token, size) < size for (_, size), own in kinds)]
        tokens = 1 + max(held if owner else ids.values(), default=-1)
        owned = sizes[owner] if owner else 0
        if self.source.multiple:
            self.rows = -(-tokens // self.source.multiple) * self.source.multiple
        else:
            self.rows = max(tokens, owned)
        self._filled = min(self.rows, max(tokens, owned))
        for name, own in theirs.items():
            self._maps[name] = _row_map(ids, own, self.rows, sizes[name])
        used = np.zeros(self.rows, dtype=bool)
        used[[i for i in ids.values() if i < self.rows]] = True
        if owner:
            padding = np.nonzero(~used[:owned])[0]
            self._maps[owner][padding] = padding
        for name, own in theirs.items():
            self._tell(name, ids, own, sizes[name])
        nobody = used & np.all([rows < 0 for rows in self._maps.values()], axis=0)
        homeless = [
            token for token, i in ids.items() if i < self.rows and nobody[i] and token not in self._rules
        ]
        if homeless:
            self.warnings.append(
                f"{len(homeless):,} tokens of the output's tokenizer are known to no model ({_list(homeless)}); "
                "their rows are zero"
            )

    def _reference(self) -> Checkpoint:
        """Return the model whose tokenizer stands for those that have none."""
        sizes = self._sizes
        having = [name for name in self.models if name not in self._lacking]
        reference = next((n for n in having if n == self.source.owner), next(iter(having), None))
        for name in self._lacking:
            other = reference or next((n for n in sizes if sizes[n] != sizes[name]), None)
            if other is not None and sizes[name] != sizes[other]:
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
        if own is ids:
            return
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
        fill, forced = self._fill(voters, maps)
        views = {}
        for name in voters.readers:
            model = self.models[name]
            own = maps[name].copy()
            own[forced] = -1
            alignment = Alignment(own, fill, self._filled)
            names = [*vocabulary_tensors(model.tensors), *([head] if head is not None else [])]
            views[name] = align(model, dict.fromkeys(names, alignment))
        return views

    def _fill(self, voters: Voters, maps: Mapping[str, Rows]) -> tuple[Fill, list[int]]:
        """Return what stands in for rows that a reader lacks, and the rows that it replaces for all."""
        named = (rule.source.model for rule in self._rules.values())
        donors = list(dict.fromkeys([*maps, *(name for name in named if name is not None)]))
        rows = np.full((len(donors), self.rows), -1, dtype=np.int64)
        lacking = np.any([maps[name] < 0 for name in voters.readers], axis=0)
        for group in voters.stand_ins:
            members = [donors.index(name) for name in group]
            own = np.stack([maps[name] for name in group])
            found = (own >= 0).any(axis=0) & lacking
            rows[np.ix_(members, found)] = own[:, found]
            lacking &= ~found
        forced = []
        for token, rule in self._rules.items():
            i = self.ids.get(token, self.rows)
            if i >= self.rows:
                raise UserError(
                    "the output's tokenizer has no such token", key=f"output.tokenizer.tokens.{token}"
                )
            rows[:, i] = -1
            if rule.source.model is not None:
                rows[donors.index(rule.source.model), i] = self._row_of(token, rule.source)
            if rule.force:
                forced.append(i)
        return Fill(tuple(self.models[name] for name in donors), rows), forced

    def _row_of(self, token: str, source: TokenRow) -> int:
        """Return the row that a rule names in its model."""
        name = str(source.model)
        if source.token_id is not None:
            row, what = source.token_id, f"row {source.token_id}"
        else:
            wanted = source.token if source.token is not None else token
            model = self._reference() if name in self._lacking else self.models[name]
            row = read_vocabulary(model.path).ids.get(wanted, self._sizes[name])
            what = f"token {wanted!r}"
        if row >= self._sizes[name]:
            raise UserError(
                f"the model '{name}' has no {what}", key=f"output.tokenizer.tokens.{token}.source"
            )
        return row


def output_vocabulary(recipe: Recipe, checkpoints: Mapping[str, Checkpoint]) -> OutputVocabulary:
    """Return the vocabulary of a recipe's output; the last few are kept.

    Raises:
        CheckpointError: a tokenizer is missing or cannot be read, or the models share no token.
        UserError: a rule for a token that there is not.
    """
    speaking = _speaking(recipe)
    wanted = recipe.output.vocabulary
    named = wanted.source if recipe.output.tokenizer is not None else None
    having = (name for name in speaking if has_tokenizer(checkpoints[name].path))
    owner: str | None = next(having, speaking[0])
    folder = checkpoints[str(owner)].path
    if named in recipe.models:
        owner, folder = named, checkpoints[named].path
    elif wanted.is_folder(recipe.models):
        folder = Path(wanted.source)
        same = has_tokenizer(checkpoints[str(owner)].path) and (
            read_vocabulary(folder).ids == read_vocabulary(checkpoints[str(owner)].path).ids
        )
        owner = owner if same else None
    union = wanted.source == UNION and UNION not in recipe.models
    rules = {token: rule.model_dump(exclude_none=True) for token, rule in wanted.tokens.items()}
    source = TokenizerSource(owner, folder, union, wanted.pad_to_multiple_of, json.dumps(rules))
    lending = [rule.source.model for rule in wanted.tokens.values() if rule.source.model is not None]
    names = dict.fromkeys(
        [*([owner] if owner else []), *speaking, *lending, *(recipe.models if union else [])]
    )
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
    if own is ids:
        known = np.fromiter(ids.values(), dtype=np.int64, count=len(ids))
        known = known[known < min(rows, size)]
        found = np.full(rows, -1, dtype=np.int64)
        found[known] = known
        return found
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
