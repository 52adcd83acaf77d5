"""Names of two tensors of the tiny Llamas, and a file taken apart."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

Q = "model.layers.1.self_attn.q_proj.weight"
EMBEDDING = "model.embed_tokens.weight"


def split(file: Path) -> tuple[dict[str, Any], bytes]:
    """Take a safetensors file apart: header and data."""
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]
