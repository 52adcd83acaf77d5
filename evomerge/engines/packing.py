"""Freezing requests into batches.

Dimensions: B rows of a batch, L tokens of its longest row, N scored positions of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

T = TypeVar("T")
VERSION = "hf-v1"
LONGEST_TREE = 256
SHORTEST_PREFIX = 16


@dataclass(frozen=True)
class ScoreBatch:
    """One forward pass that scores continuations.

    A row is a context followed by one or more branches: the inputs of its continuations, side by side.
    Each branch sees the context and itself.

    Attributes:
        ids_BL: input tokens, padded right with 0.
        branch_BL: 0 for the context, 1, 2, … for its branches, None if no row has more than one.
        positions_BL: position of each token in its own text; None together with `branch_BL`.
        scored_N: indices into the flattened (B · L) rows whose next token is scored.
        targets_N: those next tokens.
        starts: for each request, where its positions start in N.
        requests: the numbers of the requests.
    """

    ids_BL: Tensor
    branch_BL: Tensor | None
    positions_BL: Tensor | None
    scored_N: Tensor
    targets_N: Tensor
    starts: npt.NDArray[np.int64]
    requests: tuple[int, ...]

    def mask_BLL(self) -> Tensor:
        """Return the attention mask of a batch with branches: bool, (B, 1, L, L), True = may be seen."""
        if self.branch_BL is None:
            raise ValueError("a batch without branches needs no mask")
        L = self.branch_BL.shape[1]
        causal_LL = torch.ones(L, L, dtype=torch.bool, device=self.branch_BL.device).tril()
        keys = self.branch_BL[:, None, None, :]
        return causal_LL & ((keys == 0) | (keys == self.branch_BL[:, None, :, None]))


@dataclass(frozen=True)
class GenerationBatch:
    """Prompts that are continued together.

    Attributes:
        prefix: tokens that all prompts share and that are computed once; may be empty.
        ids_BL: the rest of each prompt, padded left with its own first token: so padding adds nothing to
            what a repetition penalty has seen.
        lengths: tokens of each rest.
        requests: the numbers of the requests.
    """

    prefix: tuple[int, ...]
    ids_BL: Tensor
    lengths: tuple[int, ...]
    requests: tuple[int, ...]


@dataclass
class _Row:
    """A context, its branches, and which requests read their scores from which branch."""

    context: tuple[int, ...]
    branches: dict[tuple[int, ...], list[tuple[int, int]]]

    @property
    def length(self) -> int:
        return len(self.context) + sum(map(len, self.branches))


def pack_scores(
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    batch_tokens: int,
    max_length: int,
    tree: bool,
    device: torch.device,
) -> tuple[ScoreBatch, ...]:
    """Pack (context, continuation) pairs of tokens into batches of at most `batch_tokens`.

    A text longer than `max_length` + 1 tokens loses its beginning. Equal inputs are computed once. With
    `tree`, continuations of one context share a row of up to `LONGEST_TREE` tokens or twice the context.

    Raises:
        ValueError: a continuation is empty or longer than `max_length`.
    """
    rows: list[_Row] = []
    open_rows: dict[tuple[int, ...], _Row] = {}
    for number, (context, continuation) in enumerate(pairs):
        if not 0 < len(continuation) <= max_length:
            raise ValueError(
                f"a continuation of {len(continuation)} tokens cannot be scored (model length {max_length})"
            )
        whole = [*context, *continuation][-(max_length + 1) :]
        start = tuple(whole[: -len(continuation)])
        branch = tuple(continuation[:-1])
        row = open_rows.get(start)
        if row is None or branch not in row.branches:
            if row is None or not _joins(row, branch, tree):
                row = open_rows[start] = _Row(start, {})
                rows.append(row)
            row.branches[branch] = []
        row.branches[branch].append((number, continuation[-1]))
    # Longest first; ties by content, so that equal work always lands in equal batches.
    rows.sort(key=lambda row: (-row.length, row.context, tuple(row.branches)))
    return tuple(
        _score_batch(group, device) for group in _within_budget(rows, batch_tokens, lambda row: row.length)
    )


def _joins(row: _Row, branch: tuple[int, ...], tree: bool) -> bool:
    """Whether a row can take another branch; one without tokens only reads the context."""
    if not branch or not any(row.branches):
        return True
    return tree and row.length + len(branch) <= max(LONGEST_TREE, 2 * len(row.context))


def _score_batch(rows: Sequence[_Row], device: torch.device) -> ScoreBatch:
    B, L = len(rows), max(row.length for row in rows)
    ids = torch.zeros(B, L, dtype=torch.long)
    branches = torch.zeros(B, L, dtype=torch.long)
    positions = torch.zeros(B, L, dtype=torch.long)
    scored: list[int] = []
    targets: list[int] = []
    starts: list[int] = []
    requests: list[int] = []
    for b, row in enumerate(rows):
        context = len(row.context)
        ids[b, :context] = torch.tensor(row.context)
        positions[b, :context] = torch.arange(context)
        end = context
        for number, (branch, readers) in enumerate(row.branches.items(), start=1):
            begin, end = end, end + len(branch)
            ids[b, begin:end] = torch.tensor(branch, dtype=torch.long)
            branches[b, begin:end] = number
            positions[b, begin:end] = torch.arange(context, context + len(branch))
            inputs = [b * L + context - 1, *range(b * L + begin, b * L + end)]
            for request, last in readers:
                starts.append(len(scored))
                requests.append(request)
                scored += inputs
                targets += [*branch, last]
    forked = any(sum(map(bool, row.branches)) > 1 for row in rows)
    return ScoreBatch(
        ids.to(device),
        branches.to(device) if forked else None,
        positions.to(device) if forked else None,
        torch.tensor(scored, device=device),
        torch.tensor(targets, device=device),
        np.array(starts, dtype=np.int64),
        tuple(requests),
    )


def pack_generations(
    prompts: Sequence[Sequence[int]], *, batch_tokens: int, share_prefix: bool, device: torch.device
) -> tuple[GenerationBatch, ...]:
    """Pack prompts (not empty) into batches of at most `batch_tokens` prompt tokens, longest first.

    With `share_prefix`, the tokens that all prompts of a batch start with are set apart if there are at
    least `SHORTEST_PREFIX`; one token of each prompt always stays.
    """
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), tuple(prompts[i])))
    batches = []
    for group in _within_budget(order, batch_tokens, lambda i: len(prompts[i])):
        shared = _shared([prompts[i] for i in group]) if share_prefix and len(group) > 1 else 0
        shared = shared if shared >= SHORTEST_PREFIX else 0
        rests = [prompts[i][shared:] for i in group]
        L = max(map(len, rests))
        ids = torch.tensor([[rest[0]] * (L - len(rest)) + list(rest) for rest in rests], device=device)
        lengths = tuple(map(len, rests))
        batches.append(GenerationBatch(tuple(prompts[group[0]][:shared]), ids, lengths, tuple(group)))
    return tuple(batches)


def _shared(prompts: Sequence[Sequence[int]]) -> int:
    limit = min(map(len, prompts)) - 1
    first = prompts[0]
    return next((n for n in range(limit) if any(p[n] != first[n] for p in prompts)), limit)


def _within_budget(things: Sequence[T], budget: int, length: Callable[[T], int]) -> list[list[T]]:
    """Cut a sequence, longest first, into groups whose count times longest length stays in the budget."""
    groups: list[list[T]] = []
    for thing in things:
        if groups and (len(groups[-1]) + 1) * length(groups[-1][0]) <= budget:
            groups[-1].append(thing)
        else:
            groups.append([thing])
    return groups
