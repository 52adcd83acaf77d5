"""Freezing requests into batches: a pure function of the requests, so that every candidate gets the same ones.

Dimensions: B rows of a batch, L tokens of its longest row, P tokens of the prefix, N scored positions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

VERSION = "hf-v2"
LONGEST_TREE = 256
SHORTEST_PREFIX = 16
FULL_ROW = 128
"""Short trees share a row up to this length: fewer rows, so fewer copies of the prefix and less padding."""
MASK_CELLS = 2**24
"""The most elements of a batch's attention mask: what is larger is computed without one."""


@dataclass(frozen=True)
class Inputs:
    """The tokens of one forward pass: trees side by side in rows, all of them behind one prefix.

    A tree is a text's beginning followed by branches. A token sees the prefix, the beginning of its tree
    and its own branch.

    Attributes:
        prefix: what every tree begins with; computed once and not part of the rows.
        ids_BL: input tokens, padded right with 0.
        tree_BL: number of the tree within its row, from 1; 0 is padding. None where every row is one text
            without a prefix: plain causal attention.
        branch_BL: 0 for a tree's beginning, 1, 2, … for its branches; None together with `tree_BL`.
        positions_BL: position of each token in its own text; None together with `tree_BL`.
    """

    prefix: tuple[int, ...]
    ids_BL: Tensor
    tree_BL: Tensor | None = None
    branch_BL: Tensor | None = None
    positions_BL: Tensor | None = None

    @cached_property
    def digest(self) -> bytes:
        """Hash of all of it: equal inputs have equal ones."""
        laid = [self.ids_BL, self.tree_BL, self.branch_BL, self.positions_BL]
        digest = hashlib.sha256(repr((self.prefix, self.ids_BL.shape)).encode())
        for tensor in laid:
            digest.update(b"-" if tensor is None else tensor.cpu().numpy().tobytes())
        return digest.digest()

    def visible_BLK(self) -> Tensor:
        """Return what each token sees of prefix and row: bool, (B, L, P + L)."""
        if self.tree_BL is None or self.branch_BL is None:
            raise ValueError("a batch of single texts needs no mask")
        B, L = self.tree_BL.shape
        tree, branch = self.tree_BL, self.branch_BL
        causal_LL = torch.ones(L, L, dtype=torch.bool, device=tree.device).tril()
        own = causal_LL & (tree[:, None, :] == tree[:, :, None])
        own &= (branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None])
        return torch.cat([own.new_ones(B, L, len(self.prefix)), own], dim=2)

    def key_positions_BK(self) -> Tensor:
        """Return the position of everything that can be seen: (B, P + L)."""
        assert self.positions_BL is not None
        prefix = torch.arange(len(self.prefix), device=self.positions_BL.device)
        return torch.cat([prefix.expand(len(self.positions_BL), -1), self.positions_BL], dim=1)


@dataclass(frozen=True)
class ScoreBatch:
    """One forward pass that scores continuations.

    Attributes:
        inputs: the tokens; a continuation is a branch of its context's tree.
        scored_N: indices into the flattened (B · L) rows whose next token is scored.
        targets_N: those next tokens.
        starts: for each request, where its positions start in N.
        requests: the numbers of the requests.
    """

    inputs: Inputs
    scored_N: Tensor
    targets_N: Tensor
    starts: npt.NDArray[np.int64]
    requests: tuple[int, ...]


@dataclass(frozen=True)
class PromptBatch:
    """One forward pass over prompts that are to be continued.

    Attributes:
        inputs: the tokens; every prompt is a tree without branches.
        last_N: indices into the flattened (B · L) rows of each prompt's last token.
        flat_M: indices into the flattened rows of all tokens of all prompts, one prompt after another.
        owner_M: to which of the N prompts these tokens belong.
        column_M: their positions in the prompts.
        lengths: tokens of each prompt, with the prefix.
        requests: the numbers of the requests.
    """

    inputs: Inputs
    last_N: Tensor
    flat_M: Tensor
    owner_M: Tensor
    column_M: Tensor
    lengths: tuple[int, ...]
    requests: tuple[int, ...]


@dataclass
class _Tree:
    """A text's beginning, its branches, and which requests read their scores from which branch."""

    context: tuple[int, ...]
    branches: dict[tuple[int, ...], list[tuple[int, int]]]
    prefix: int = 0

    @property
    def length(self) -> int:
        """Tokens behind the prefix."""
        return len(self.context) - self.prefix + sum(map(len, self.branches))

    @property
    def forked(self) -> bool:
        return sum(map(bool, self.branches)) > 1


def pack_scores(
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    batch_tokens: int,
    max_length: int,
    tree: bool,
    device: torch.device,
    one_length: bool = False,
) -> tuple[ScoreBatch, ...]:
    """Pack (context, continuation) pairs of tokens into batches of at most `batch_tokens`.

    A text longer than `max_length` + 1 tokens loses its beginning. Equal inputs are computed once.

    Args:
        tree: continuations of one context share a tree of up to `LONGEST_TREE` tokens or twice the
            context, short trees share a row, and what many contexts begin with becomes a prefix.
        one_length: texts of different lengths share no batch.

    Raises:
        ValueError: a continuation is empty or longer than `max_length`.
    """
    trees: list[_Tree] = []
    open_trees: dict[tuple[int, ...], _Tree] = {}
    for number, (context, continuation) in enumerate(pairs):
        if not 0 < len(continuation) <= max_length:
            raise ValueError(
                f"a continuation of {len(continuation)} tokens cannot be scored (model length {max_length})"
            )
        whole = [*context, *continuation][-(max_length + 1) :]
        start = tuple(whole[: -len(continuation)])
        branch = tuple(continuation[:-1])
        current = open_trees.get(start)
        if current is None or branch not in current.branches:
            if current is None or not _joins(current, branch, tree):
                current = open_trees[start] = _Tree(start, {})
                trees.append(current)
            current.branches[branch] = []
        current.branches[branch].append((number, continuation[-1]))
    return tuple(
        _score_batch(rows, device)
        for rows in _batches(trees, batch_tokens, share=tree, most=10**9, one_length=one_length)
    )


def pack_prompts(
    prompts: Sequence[Sequence[int]], *, batch_tokens: int, most: int, device: torch.device
) -> tuple[PromptBatch, ...]:
    """Pack prompts (not empty) into batches of at most `batch_tokens` tokens and `most` prompts."""
    trees = [_Tree(tuple(prompt), {(): [(number, 0)]}) for number, prompt in enumerate(prompts)]
    return tuple(_prompt_batch(rows, device) for rows in _batches(trees, batch_tokens, share=True, most=most))


def group_by_prefix(texts: Sequence[tuple[int, ...]], least: int) -> list[tuple[int, list[int]]]:
    """Choose what is computed once for several texts.

    The trie of the texts is cut from its leaves: texts that begin alike become a group where that saves
    at least `least` tokens over leaving them in the group around it, and `SHORTEST_PREFIX` are shared. At
    least one token of each text is left outside of the prefix.

    Returns:
        (tokens of the prefix, numbers of the texts) of each group; the last one may have no prefix.
    """
    order = sorted(range(len(texts)), key=lambda number: (texts[number], number))
    groups: list[tuple[int, list[int]]] = []
    # The open nodes of the trie, outermost first, with the texts that no deeper group has taken.
    nodes: list[tuple[int, list[int]]] = [(0, [])]

    def close(shared: int) -> None:
        """Close the nodes that lie deeper than the next text reaches."""
        while nodes[-1][0] > shared:
            depth, members = nodes.pop()
            outer = max(nodes[-1][0], shared)
            if depth >= SHORTEST_PREFIX and (len(members) - 1) * (depth - outer) >= max(1, least):
                groups.append((depth, members))
            elif members:
                if nodes[-1][0] < shared:
                    nodes.append((shared, []))
                nodes[-1][1].extend(members)

    previous: tuple[int, ...] = ()
    for number in order:
        text = texts[number]
        close(_common(previous, text))
        nodes.append((len(text) - 1, [number]))
        previous = text
    close(0)
    alone = [number for _, members in nodes for number in members]
    return [*groups, (0, alone)] if alone else groups


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """Return how many tokens two texts begin with in common, at most one less than either has."""
    same, differ = 0, max(0, min(len(a), len(b)) - 1)
    if a[:differ] == b[:differ]:
        return differ
    while differ - same > 1:
        middle = (same + differ) // 2
        same, differ = (middle, differ) if a[:middle] == b[:middle] else (same, middle)
    return same


def _joins(tree: _Tree, branch: tuple[int, ...], forks: bool) -> bool:
    """Whether a tree can take another branch; one without tokens only reads the context."""
    if not branch or not any(tree.branches):
        return True
    return forks and tree.length + len(branch) <= max(LONGEST_TREE, 2 * len(tree.context))


def _batches(
    trees: Sequence[_Tree], budget: int, *, share: bool, most: int, one_length: bool = False
) -> list[list[list[_Tree]]]:
    """Arrange trees in batches of rows; those of a batch have one prefix.

    Longest first; ties by content, so that equal work always lands in equal batches.
    """
    batches = []
    for group in _share_prefixes(trees, budget) if share else [list(trees)]:
        group.sort(key=lambda tree: (-tree.length, tree.context, tuple(tree.branches)))
        rows: list[list[_Tree]] = []
        for tree in group:
            joined = _length(rows[-1]) + tree.length if rows and share else FULL_ROW + 1
            if joined <= min(FULL_ROW, budget) and len(rows[-1]) < most:
                rows[-1].append(tree)
            else:
                rows.append([tree])
        rows.sort(key=_length, reverse=True)
        batch: list[list[_Tree]] = []
        for row in rows:
            other = one_length and batch and _length(batch[0]) != _length(row)
            if batch and (other or not _fits([*batch, row], budget, most)):
                batches.append(batch)
                batch = []
            batch.append(row)
        batches.append(batch)
    return batches


def _share_prefixes(trees: Sequence[_Tree], budget: int) -> list[list[_Tree]]:
    """Give trees their prefixes, where these save a quarter of a forward pass; return those of each prefix."""
    groups: dict[tuple[int, ...], list[_Tree]] = {}
    for prefix, members in group_by_prefix([tree.context for tree in trees], budget // 4):
        for tree in (trees[number] for number in members):
            tree.prefix = prefix
            if tree.length * (prefix + tree.length) > MASK_CELLS:
                # Too long for a mask: branches share their whole context, a single text needs none.
                tree.prefix = len(tree.context) - 1 if tree.forked else 0
            groups.setdefault(tree.context[: tree.prefix], []).append(tree)
    return list(groups.values())


def _fits(rows: Sequence[Sequence[_Tree]], budget: int, most: int) -> bool:
    """Whether rows, the longest first, can be one batch."""
    B, L, P = len(rows), _length(rows[0]), rows[0][0].prefix
    masked = P > 0 or any(len(row) > 1 or row[0].forked for row in rows)
    return budget >= B * L and sum(map(len, rows)) <= most and not (masked and B * L * (P + L) > MASK_CELLS)


def _length(row: Sequence[_Tree]) -> int:
    return sum(tree.length for tree in row)


def _inputs(rows: Sequence[Sequence[_Tree]], device: torch.device) -> tuple[Inputs, list[list[int]]]:
    """Lay rows out; also return where each tree begins, as an index into the flattened (B · L) rows."""
    B, L, P = len(rows), _length(rows[0]), rows[0][0].prefix
    ids, trees, branches, positions = (np.zeros((B, L), dtype=np.int64) for _ in range(4))
    begins: list[list[int]] = []
    for b, row in enumerate(rows):
        end = 0
        begins.append([])
        for number, tree in enumerate(row, start=1):
            begins[b].append(b * L + end)
            rest = tree.context[P:]
            begin, end = end, end + len(rest)
            ids[b, begin:end] = rest
            positions[b, begin:end] = np.arange(P, P + len(rest))
            trees[b, begin : begin + tree.length] = number
            for label, branch in enumerate(tree.branches, start=1):
                begin, end = end, end + len(branch)
                ids[b, begin:end] = branch
                branches[b, begin:end] = label
                positions[b, begin:end] = np.arange(len(tree.context), len(tree.context) + len(branch))
    prefix = rows[0][0].context[:P]
    laid = [torch.from_numpy(array).to(device) for array in (ids, trees, branches, positions)]
    if P or any(len(row) > 1 or row[0].forked for row in rows):
        return Inputs(prefix, *laid), begins
    return Inputs(prefix, laid[0]), begins


def _score_batch(rows: Sequence[Sequence[_Tree]], device: torch.device) -> ScoreBatch:
    inputs, begins = _inputs(rows, device)
    scored: list[int] = []
    targets: list[int] = []
    starts: list[int] = []
    requests: list[int] = []
    for begin, tree in ((begins[b][t], tree) for b, row in enumerate(rows) for t, tree in enumerate(row)):
        end = begin + len(tree.context) - tree.prefix
        last = end - 1
        for branch, readers in tree.branches.items():
            own, end = range(end, end + len(branch)), end + len(branch)
            for request, target in readers:
                starts.append(len(scored))
                requests.append(request)
                scored += [last, *own]
                targets += [*branch, target]
    return ScoreBatch(
        inputs,
        torch.tensor(scored, device=device),
        torch.tensor(targets, device=device),
        np.array(starts, dtype=np.int64),
        tuple(requests),
    )


def _prompt_batch(rows: Sequence[Sequence[_Tree]], device: torch.device) -> PromptBatch:
    inputs, begins = _inputs(rows, device)
    placed = [(begins[b][t], tree) for b, row in enumerate(rows) for t, tree in enumerate(row)]
    flat = [np.arange(begin, begin + tree.length) for begin, tree in placed]
    owner = [np.full(tree.length, n) for n, (_, tree) in enumerate(placed)]
    column = [np.arange(tree.prefix, len(tree.context)) for _, tree in placed]
    last = np.array([indices[-1] for indices in flat])
    last_N, flat_M, owner_M, column_M = (
        torch.from_numpy(array).to(device) for array in (last, *map(np.concatenate, (flat, owner, column)))
    )
    lengths = tuple(len(tree.context) for _, tree in placed)
    requests = tuple(tree.branches[()][0][0] for _, tree in placed)
    return PromptBatch(inputs, last_N, flat_M, owner_M, column_M, lengths, requests)
