"""Tensors seen as rows of their last dimension; a tensor with fewer than two dimensions is one row."""

from __future__ import annotations

from collections.abc import Iterator

from evomerge.methods.operands import STRIP, Chunk, Operands
from evomerge.methods.vectors import Layout


def row_layout(operands: Operands) -> Layout:
    """Return how a tensor that is not empty is cut into rows."""
    width = operands.shape[-1] if len(operands.shape) > 1 else operands.size
    return Layout("out", operands.size // width, width)


def whole_rows(operands: Operands) -> Iterator[Chunk]:
    """Cut a tensor into chunks of whole rows, with scratch memory of their own."""
    width = row_layout(operands).columns
    return operands.fork().chunks(max(1, STRIP // width) * width)
