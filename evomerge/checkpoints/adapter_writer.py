"""Writing a PEFT folder: an adapter's config and its tensors."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evomerge.checkpoints.files import ADAPTER_CONFIG, ADAPTER_FILE
from evomerge.checkpoints.header import build_header
from evomerge.errors import InfrastructureError, UserError
from evomerge.folders import hidden_beside

Entry = tuple[str, tuple[int, ...], torch.dtype, Iterable[Tensor]]
"""Name, shape and dtype of a tensor, and its elements in order in contiguous pieces."""


def write_adapter(out: Path, config: Mapping[str, Any], tensors: Sequence[Entry]) -> None:
    """Write an adapter's folder; nothing is seen of it before it is complete.

    Args:
        out: the folder to make; it must not exist, or be empty.
        config: ``adapter_config.json``.
        tensors: those with wider dtypes come first in the file, so that every tensor is aligned.

    Raises:
        UserError: the folder cannot be written.
        InfrastructureError: the disk is full; nothing is left behind.
    """
    out = Path(os.path.abspath(out))
    partial = hidden_beside(out)
    ordered = sorted(tensors, key=lambda tensor: -tensor[2].itemsize)
    header, _ = build_header([tensor[:3] for tensor in ordered])
    try:
        partial.mkdir(parents=True)
        with (partial / ADAPTER_FILE).open("wb") as stream:
            stream.write(header)
            for _, _, _, pieces in ordered:
                for piece in pieces:
                    stream.write(piece.reshape(-1).view(torch.uint8).numpy().data)
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (partial / ADAPTER_CONFIG).write_text(text, encoding="utf-8")
        os.rename(partial, out)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "the disk is full; make room or choose another folder" if full else error.strerror
        raise (InfrastructureError if full else UserError)(f"{out}: cannot be written: {reason}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
