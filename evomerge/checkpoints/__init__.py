"""Hugging Face checkpoints: finding, reading, comparing and writing them; what their tensors are called."""

from evomerge.checkpoints.adapted import AdaptedCheckpoint, commits
from evomerge.checkpoints.compatibility import check_compatible
from evomerge.checkpoints.header import TensorInfo
from evomerge.checkpoints.locate import find, is_adapter, locate
from evomerge.checkpoints.names import ROLES, Position, Role, TensorName, is_buffer, is_transposed, parse
from evomerge.checkpoints.reader import Checkpoint, open_checkpoint
from evomerge.checkpoints.tokenizer import (
    CHAT_TEMPLATE_FILES,
    TOKENIZER_FILES,
    check_tokenizers,
    load_tokenizer,
    tokenizer_sha256,
)
from evomerge.checkpoints.writer import CheckpointWriter, Layout, parse_size

__all__ = [
    "CHAT_TEMPLATE_FILES",
    "ROLES",
    "TOKENIZER_FILES",
    "AdaptedCheckpoint",
    "Checkpoint",
    "CheckpointWriter",
    "Layout",
    "Position",
    "Role",
    "TensorInfo",
    "TensorName",
    "check_compatible",
    "check_tokenizers",
    "commits",
    "find",
    "is_adapter",
    "is_buffer",
    "is_transposed",
    "load_tokenizer",
    "locate",
    "open_checkpoint",
    "parse",
    "parse_size",
    "tokenizer_sha256",
]
