"""What the files of checkpoints and adapters are called, and what to say where the right ones are missing."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection

CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLED_FILE = "pytorch_model.bin"
PICKLED_INDEX = "pytorch_model.bin.index.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"
COMPACT_FILE = "evomerge_compact.json"
PICKLED_ADAPTER = "adapter_model.bin"

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def explain_weights(
    names: Collection[str], source: str, *, pickled: bool = False, adapter: bool = False
) -> str:
    """Return why a folder or repository with files of these names cannot be used, and the way out.

    Args:
        names: of all files.
        source: what the user calls it.
        pickled: whether pickled weights are looked for.
        adapter: whether it is an adapter.
    """
    pickles = sorted(name for name in names if any(fnmatch.fnmatchcase(name, p) for p in _PICKLES))
    if pickled:
        if any(name.endswith(".safetensors") for name in names):
            return "has safetensors weights; there is nothing to convert"
        wanted = PICKLED_ADAPTER if adapter else f"{PICKLED_FILE} or {PICKLED_INDEX}"
        return f"holds no weights that can be converted: there is no {wanted}"
    if pickles:
        standard = {PICKLED_ADAPTER} if adapter else {PICKLED_FILE, PICKLED_INDEX}
        how = (
            f"'evomerge convert {source} NEW_FOLDER' reads them without running any"
            if standard & set(names)
            else "convert them to safetensors (transformers: from_pretrained(folder).save_pretrained(new_folder))"
        )
        return (
            f"has only pickled weights ({pickles[0]}), which are never opened unasked because they can run code; "
            f"{how}"
        )
    gguf = sorted(name for name in names if name.endswith(".gguf"))
    if gguf:
        return (
            f"has only GGUF weights ({gguf[0]}); name the original safetensors checkpoint, or convert it "
            "(transformers: from_pretrained(folder, gguf_file=...).save_pretrained(new_folder))"
        )
    if adapter:
        return f"holds no weights: there is no {ADAPTER_FILE}"
    return f"holds no weights: there is neither {SINGLE_FILE} nor {INDEX_FILE}"
