"""LoRA adapters: reading a PEFT folder, and what it does to which of its modules' weights.

LoRA (Hu et al. 2021, arXiv 2106.09685): W = W_0 + (α / r) · B A; rank-stabilised (Kalajdzievski 2023, arXiv
2312.03732): α / √r. Formulas and names of the tensors follow peft, whose folders these are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from evomerge.checkpoints.adapter_changes import MERGE_FIRST, Change, Product
from evomerge.checkpoints.content import cached_content_hash
from evomerge.checkpoints.files import ADAPTER_CONFIG, ADAPTER_FILE, explain_weights
from evomerge.checkpoints.header import DTYPE_NAMES, MERGEABLE, TensorInfo, read_header
from evomerge.checkpoints.names import is_buffer
from evomerge.checkpoints.open_files import OpenFiles
from evomerge.checkpoints.reader import read_object
from evomerge.errors import CheckpointError, at

# Variants of LoRA that change more than W_0 + s B A, by the key that switches them on.
_VARIANTS = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "monteclora_config": "MonteCLoRA",
    "kasa_config": "KaSA",
    "use_bdlora": "BD-LoRA",
    "arrow_config": "Arrow",
    "layer_replication": "layer replication",
}
_ACTIVATED = "alora_invocation_tokens"
# Initialisations that take something out of the base's weights.
_CHANGING_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")

_FACTOR = re.compile(r"(.+)\.lora_(embedding_)?([AB])(?:\.default)?(?:\.(weight|bias))?")
_TOKENS = re.compile(r"(.+)\.token_adapter\.trainable_tokens_delta(?:\.default)?")
_WHOLE = re.compile(r"(.+?)(?:\.base_layer|\.modules_to_save(?:\.default)?)?\.(\w+)")

_TRAINING_WRAPPERS = re.compile(
    r"(^|\.)(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.)"
)


@dataclass(frozen=True, eq=False)
class Adapter:
    """A PEFT LoRA folder, read but not yet laid on a base.

    Attributes:
        path: the folder.
        config: ``adapter_config.json``.
        tensors: by the name in the file.
        changes: by the name of the changed tensor, as the adapter's modules are called.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    changes: dict[str, Change]
    files: OpenFiles = field(default_factory=OpenFiles, repr=False)

    @property
    def base(self) -> str | None:
        """Where the model that it was trained on lies, as far as it says."""
        name = self.config.get("base_model_name_or_path")
        return name if isinstance(name, str) and name else None

    @property
    def base_revision(self) -> str | None:
        """The base's revision, as far as it says."""
        revision = self.config.get("revision")
        return revision if isinstance(revision, str) and revision else None

    @cached_property
    def sha256(self) -> str:
        """Hash of the content: tensors, and how each is applied.

        Raises:
            CheckpointError: a tensor has NaN or infinite values.
        """
        applied: dict[str, Any] = {}
        for name, change in sorted(self.changes.items()):
            product = change.product
            applied[name] = [
                [info.name for info in change.infos],
                list(change.rows),
                None if product is None else product.scale,
                change.scale,
            ]
        applied["fan_in_fan_out"] = bool(self.config.get("fan_in_fan_out"))
        sources = {self.path / ADAPTER_CONFIG, *(info.file for info in self.tensors.values())}
        return cached_content_hash(self.tensors, applied, self.files, sources)


def read_adapter(path: Path) -> Adapter:
    """Read the headers of a PEFT LoRA folder, and check that it is one that can be used unmerged.

    Raises:
        CheckpointError: another kind of adapter, a variant of LoRA with a formula of its own, missing or odd
            tensors; names the file, the key or tensor, and the way out.
    """
    file = path / ADAPTER_CONFIG
    config = read_object(file)
    _check_kind(config, file)
    weights = path / ADAPTER_FILE
    if not weights.is_file():
        names = [entry.name for entry in path.iterdir()]
        raise CheckpointError(f"{path}: {explain_weights(names, str(path), adapter=True)}")
    tensors = {info.name: info for info in read_header(weights)}
    for info in tensors.values():
        if info.dtype not in MERGEABLE:
            raise CheckpointError(
                f"{weights}: '{info.name}' has dtype {DTYPE_NAMES[info.dtype]}, which cannot be merged"
            )
    changes = _changes(tensors, config, file)
    if not changes:
        raise CheckpointError(f"{weights}: holds no LoRA weights")
    return Adapter(path, config, tensors, changes)


def _check_kind(config: dict[str, Any], file: Path) -> None:
    kind = str(config.get("peft_type", "")).rpartition(".")[2].upper()
    if kind != "LORA":
        raise CheckpointError(
            f"{at(file, 'peft_type')}{config.get('peft_type')!r} is no LoRA adapter; only LoRA can be used as it "
            f"is, {MERGE_FIRST}"
        )
    if config.get(_ACTIVATED):
        raise CheckpointError(
            f"{at(file, _ACTIVATED)}an activated LoRA works on some tokens only and cannot be merged"
        )
    for key, name in _VARIANTS.items():
        if config.get(key):
            raise CheckpointError(f"{at(file, key)}{name} is not plain LoRA; {MERGE_FIRST}")
    patterns = next((key for key in ("rank_pattern", "alpha_pattern") if config.get(key)), None)
    if config.get("target_parameters") and patterns:
        raise CheckpointError(
            f"{at(file, patterns)}ranks and scales of their own are not read for target_parameters; {MERGE_FIRST}"
        )
    init = str(config.get("init_lora_weights", "")).lower()
    if init.startswith(_CHANGING_BASE):
        raise CheckpointError(
            f"{at(file, 'init_lora_weights')}'{init}' changes the base's weights too; save the adapter as plain "
            "LoRA (peft: path_initial_model_for_weight_conversion), or " + MERGE_FIRST
        )


def _changes(tensors: Mapping[str, TensorInfo], config: dict[str, Any], file: Path) -> dict[str, Change]:
    """Sort the file's tensors by the tensor that they change."""
    parts: dict[str, dict[str, TensorInfo]] = {}
    for name, info in tensors.items():
        module, leaf, part = _taken_apart(name, file)
        if is_buffer(f"{module}.{leaf}"):
            continue
        own = parts.setdefault(f"{module}.{leaf}", {})
        if part in own:
            raise CheckpointError(f"{info.file}: '{name}' and '{own[part].name}' are the same weight")
        own[part] = info
    return {name: _change(name, own, config, file) for name, own in parts.items()}


def _taken_apart(name: str, file: Path) -> tuple[str, str, str]:
    """Return module, leaf and part of a tensor's name in an adapter."""
    path = (
        _TRAINING_WRAPPERS.sub(r"\1", name).replace("..", ".").lstrip(".").removeprefix("base_model.model.")
    )
    if "lora_magnitude_vector" in path:
        raise CheckpointError(f"{file}: '{name}' belongs to DoRA, which is not plain LoRA; {MERGE_FIRST}")
    if match := _FACTOR.fullmatch(path):
        module, embedding, factor, leaf = match.groups()
        if leaf == "bias":
            if factor == "B" and not embedding:
                return module, "bias", "shift"
        else:
            return module, "weight", f"embedding_{factor}" if embedding else factor
    elif match := _TOKENS.fullmatch(path):
        return match[1], "weight", "tokens"
    elif (match := _WHOLE.fullmatch(path)) and ".lora_" not in path:
        return match[1], match[2], "whole"
    raise CheckpointError(f"{file}: '{name}' is not a weight that LoRA adapters have; {MERGE_FIRST}")


def _change(name: str, parts: dict[str, TensorInfo], config: dict[str, Any], file: Path) -> Change:
    module = name.rpartition(".")[0]
    product = None
    scale = 1.0
    factors = [parts.get(key) for key in ("A", "B", "embedding_A", "embedding_B")]
    if any(factors):
        kind = "embedding_" if factors[2] or factors[3] else ""
        a, b = parts.get(f"{kind}A"), parts.get(f"{kind}B")
        if a is None or b is None or len([f for f in factors if f]) > 2:
            there = a or b
            raise CheckpointError(
                f"{there.file if there else file}: the LoRA factors of '{module}' are incomplete"
            )
        if len(a.shape) != 2 or len(b.shape) != 2:
            raise CheckpointError(
                f"{a.file}: '{a.name}' has shape {list(a.shape)}; adapters of convolutions cannot be used as they "
                f"are, {MERGE_FIRST}"
            )
        rank = _number(config, "rank_pattern", "r", module, file)
        fused = config.get("target_parameters") and module.replace(".base_layer", "").endswith("experts")
        several = max(1, a.shape[0] // int(rank)) if fused else 1
        if a.shape[0] != rank * several or b.shape[1] != rank * several:
            raise CheckpointError(
                f"{a.file}: '{a.name}' and '{b.name}' have shapes {list(a.shape)} and {list(b.shape)}, but "
                f"{ADAPTER_CONFIG} gives rank {rank:g} to '{module}'"
            )
        product = Product(a, b, _scale(module, config, file), transposed=bool(kind))
    if "shift" in parts:
        scale = _scale(module, config, file)
    rows: tuple[int, ...] = ()
    if "tokens" in parts:
        rows = _token_indices(module, config, file, parts["tokens"])
    return Change(parts.get("whole"), parts.get("tokens"), rows, product, parts.get("shift"), scale)


def _scale(module: str, config: dict[str, Any], file: Path) -> float:
    """Return α / r, or α / √r for rank-stabilised LoRA."""
    rank = _number(config, "rank_pattern", "r", module, file)
    alpha = _number(config, "alpha_pattern", "lora_alpha", module, file)
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _number(config: dict[str, Any], patterns: str, default: str, module: str, file: Path) -> float:
    """Return a module's rank or α: that of the first pattern that matches the end of its path, or the default."""
    key, value = default, config.get(default, 8)
    for pattern, own in (config.get(patterns) or {}).items():
        try:
            matches = re.match(rf"(.*\.)?({pattern})$", module)
        except re.error as error:
            raise CheckpointError(
                f"{at(file, patterns)}'{pattern}' is no regular expression: {error}"
            ) from None
        if matches:
            key, value = f"{patterns}.{pattern}", own
            break
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise CheckpointError(f"{at(file, key)}{value!r} is not a number")
    if default == "r" and (value != int(value) or value < 1):
        raise CheckpointError(
            f"{at(file, key)}{value!r} is not a rank; it should be a whole number from 1 on"
        )
    return float(value)


def _token_indices(module: str, config: dict[str, Any], file: Path, info: TensorInfo) -> tuple[int, ...]:
    key = "trainable_token_indices"
    given = config.get(key)
    if isinstance(given, dict):
        given = next((rows for name, rows in given.items() if f".{module}".endswith(f".{name}")), None)
    if not isinstance(given, list) or not all(type(row) is int and row >= 0 for row in given):
        raise CheckpointError(f"{at(file, key)}should list the token ids whose rows '{info.name}' holds")
    if len(set(given)) < len(given) or len(given) != info.shape[0]:
        raise CheckpointError(
            f"{at(file, key)}lists {len(given)} token ids (different ones: {len(set(given))}), '{info.name}' has "
            f"{info.shape[0]} rows"
        )
    return tuple(given)
