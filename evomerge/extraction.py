"""Extracting a LoRA adapter from a fine-tune: the best approximation of low rank to what it changed.

Truncated singular value decomposition (Eckart & Young 1936): of all matrices of rank r, U_r S_r V_rᵀ lies
closest to Δ = θ − θ_0. Where a decomposition of the whole matrix would take too long, block subspace iteration
(Halko, Martinsson & Tropp 2011, algorithm 4.4) finds the leading part.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from evomerge.checkpoints import Checkpoint, Role, check_compatible, is_transposed, open_checkpoint, parse
from evomerge.checkpoints.adapter_writer import write_adapter
from evomerge.checkpoints.completeness import input_embedding
from evomerge.checkpoints.model_config import nested_key
from evomerge.checkpoints.names import is_outside
from evomerge.errors import CheckpointError, UserError
from evomerge.threads import one_thread_per_operation

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

EXACT_SIDE = 1024
"""Matrices whose shorter side is at most this long are decomposed exactly."""

_OVERSAMPLING = 16
_ITERATIONS = 4
_PREFIX = "base_model.model."
_HEAD = "lm_head"
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Part:
    """What became of one kind of tensor.

    Attributes:
        kind: last component of the module's name (``q_proj``), or the tensor's role.
        tensors: how many changed.
        how: ``lora``, ``saved`` (whole, in `modules_to_save` or as biases) or ``not covered``.
        rank: largest rank.
        change: ‖Δ‖, Frobenius.
        error: ‖Δ − s B A‖ / ‖Δ‖ with the factors as written; 0 if saved, 1 if not covered.
    """

    kind: str
    tensors: int
    how: str
    rank: int
    change: float
    error: float


@dataclass(frozen=True)
class Extraction:
    """An adapter that has been written, and how well it reproduces the model.

    Attributes:
        path: the PEFT folder.
        parts: by kind of tensor.
        error: relative error over all tensors together.
    """

    path: Path
    parts: tuple[Part, ...]
    error: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {"path": str(self.path), "error": self.error, "parts": [asdict(part) for part in self.parts]}

    def __str__(self) -> str:
        width = max([len(part.kind) for part in self.parts], default=0)
        lines = [f"  {'':<{width}}  tensors  rank  relative error"]
        for part in self.parts:
            rank = str(part.rank) if part.how == "lora" else "–"
            said = {"lora": f"{part.error:.4f}", "saved": "saved whole"}.get(part.how, "NOT COVERED")
            lines.append(f"  {part.kind:<{width}}  {part.tensors:>7}  {rank:>4}  {said}")
        lines.append(f"relative error over all tensors: {self.error:.4f}")
        if any(part.how == "not covered" for part in self.parts):
            lines.append("--save-rest writes what is not covered whole")
        return "\n".join(lines)


@dataclass(frozen=True)
class _Factors:
    """B ``(out, r)`` and A ``(r, in)`` of one module as written, and the squared norms of Δ and of the rest."""

    b: Tensor
    a: Tensor
    alpha: float
    change: float
    left: float


@dataclass
class _Adapter:
    """What is going to be written."""

    config: dict[str, Any]
    tensors: list[tuple[str, tuple[int, ...], torch.dtype, Iterable[Tensor]]] = field(default_factory=list)


def extract_lora(
    model: str | Path,
    base: str | Path,
    out: str | Path,
    *,
    rank: int,
    error: float = 0.0,
    alpha: float | None = None,
    dtype: str = "float32",
    save_rest: bool = False,
    device: str = "cpu",
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Extraction:
    """Write the LoRA adapter of a given rank that comes closest to a fine-tune, as a PEFT folder.

    Every linear layer of a kind (``q_proj``) of which one was changed gets factors, and so does an untied head.
    With the default α the scale α / r is 1.

    Args:
        model: the fine-tune: folder or hub id.
        base: what it was trained from.
        out: the folder to make; it must not exist, or be empty.
        rank: of the factors; those of a smaller matrix are filled up with zeros.
        error: relative error per module at which a smaller rank is enough (`rank_pattern`); 0: `rank` for all.
        alpha: `lora_alpha`; by default the rank.
        dtype: of the factors: float32, bfloat16 or float16.
        save_rest: write other tensors that changed (embeddings, norms, biases) whole.
        device: where the decompositions are computed.
        threads: matrices worked on at the same time on the CPU; None: one per CPU.
        progress: called with (modules done, modules in all).

    Raises:
        UserError: an argument is out of its range, `out` is taken.
        CheckpointError: the models do not fit each other, or have the same weights.
        InfrastructureError: the disk is full.
    """
    out = Path(out)
    _check_arguments(rank, error, alpha, dtype, device, out)
    ancestor = open_checkpoint(base, name="base")
    tuned = open_checkpoint(model, name="model")
    check_compatible(ancestor, {"model": tuned})
    tuned.check_finite()
    ancestor.check_finite()

    changed = [name for name in ancestor.tensors if _differs(name, ancestor, tuned)]
    if not changed:
        raise CheckpointError(
            f"{tuned.path}: has the same weights as {ancestor.path}; there is nothing to extract"
        )
    linear = [name for name in _language(ancestor) if _is_linear(name, ancestor)]
    kinds = {_module(name).rpartition(".")[2] for name in changed if name in set(linear)}
    adapted = [name for name in linear if _module(name).rpartition(".")[2] in kinds]

    rank = min(rank, max(min(ancestor.tensors[name].shape) for name in adapted)) if adapted else rank

    def work(name: str) -> _Factors:
        with torch.no_grad():
            delta = _delta(name, ancestor, tuned, device)
            return _factorise(delta, rank=rank, error=error, alpha=alpha, dtype=DTYPES[dtype])

    factors = dict(zip(adapted, _in_order(work, adapted, device, threads, progress), strict=True))
    rest = [name for name in changed if name not in factors]
    adapter = _lay_out(factors, rank, alpha, _origin(base, ancestor), ancestor)
    saved = _save(rest, adapter, ancestor, tuned, set(factors)) if save_rest else set()
    parts, total = _summary(factors, rest, saved, ancestor, tuned)
    write_adapter(out, adapter.config, adapter.tensors)
    return Extraction(out, parts, total)


def leading_factors(delta: Tensor, rank: int, error: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return B ``(m, r)`` and A ``(r, n)`` so that B A is the best approximation of rank r to `delta`.

    Exact (an eigendecomposition of Δ Δᵀ in float64) where the shorter side is at most `EXACT_SIDE` or `rank` is
    a large part of it; else by subspace iteration, which finds a matrix of rank r itself exactly, and of others
    an approximation whose error is within a few per mille of the best.

    Args:
        delta: ``(m, n)``, float32 or float64.
        rank: r, at most min(m, n); more is cut.
        error: relative error at which fewer columns are enough.
    """
    if delta.shape[0] > delta.shape[1]:
        b, a = leading_factors(delta.T, rank, error)
        return a.T, b.T
    rank = min(rank, delta.shape[0])
    exact = delta.shape[0] <= EXACT_SIDE or 4 * (rank + _OVERSAMPLING) > delta.shape[0]
    left = _exact_basis(delta, rank) if exact else _subspace_basis(delta, rank)
    wide = torch.promote_types(delta.dtype, left.dtype)
    right = left.T @ delta.to(wide)
    sizes = torch.linalg.vector_norm(right.double(), dim=1)
    if error > 0:
        total = float(torch.linalg.vector_norm(delta.double())) ** 2
        rest = total - torch.cumsum(sizes**2, 0)
        enough = int((rest > error**2 * total).sum()) + 1
        rank = max(1, min(rank, enough))
        left, right, sizes = left[:, :rank], right[:rank], sizes[:rank]
    root = sizes.sqrt().to(wide)
    inverse = torch.where(root > 0, 1 / root, torch.zeros_like(root))
    return left * root, right * inverse[:, None]


def _exact_basis(delta: Tensor, rank: int) -> Tensor:
    """Return the `rank` leading left singular vectors, ``(m, rank)``, in float64."""
    wide = delta.double()
    vectors = torch.linalg.eigh(wide @ wide.T)[1]
    leading: Tensor = vectors.flip(1)[:, :rank]
    return leading


def _subspace_basis(delta: Tensor, rank: int) -> Tensor:
    """Return about the `rank` leading left singular vectors, ``(m, rank)``, in the dtype of `delta`."""
    generator = torch.Generator().manual_seed(0)
    width = min(rank + max(_OVERSAMPLING, rank // 2), delta.shape[0])
    start = torch.randn(delta.shape[1], width, generator=generator).to(delta)
    basis = torch.linalg.qr(delta @ start)[0]
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(delta @ torch.linalg.qr(delta.T @ basis)[0])[0]
    small = (basis.T @ delta).double()
    vectors = torch.linalg.eigh(small @ small.T)[1].flip(1)[:, :rank]
    leading: Tensor = basis @ vectors.to(basis.dtype)
    return leading


def _factorise(
    delta: Tensor, *, rank: int, error: float, alpha: float | None, dtype: torch.dtype
) -> _Factors:
    change = float(torch.linalg.vector_norm(delta.double())) ** 2
    b, a = leading_factors(delta, rank, error) if change > 0 else (delta[:, :1], delta[:1])
    if error == 0:
        # One rank for all: what serves adapters and what converts them between layouts may know no other.
        b, a = pad(b, (0, rank - b.shape[1])), pad(a, (0, 0, 0, rank - a.shape[0]))
    own = float(b.shape[1]) if alpha is None else alpha
    scale = own / b.shape[1]
    b, a = (factor.div(math.sqrt(scale)).to(dtype).cpu().contiguous() for factor in (b, a))
    wide = torch.promote_types(delta.dtype, torch.float32)
    left = delta - scale * (b.to(delta.device, wide) @ a.to(delta.device, wide))
    return _Factors(b, a, own, change, float(torch.linalg.vector_norm(left.double())) ** 2)


def _delta(name: str, base: Checkpoint, tuned: Checkpoint, device: str) -> Tensor:
    """Return θ − θ_0 as an (out, in) matrix in float32, float64 if a model is."""
    dtypes = (base.read_dtype(name), tuned.read_dtype(name))
    wide = torch.float64 if torch.float64 in dtypes else torch.float32
    ours, theirs = (checkpoint.tensor(name).to(device, wide) for checkpoint in (base, tuned))
    delta = theirs - ours
    return delta.T.contiguous() if is_transposed(base.config, name) else delta


def _language(base: Checkpoint) -> list[str]:
    """Return the tensors of the language model, which is what an adapter changes."""
    return [name for name in base.tensors if not is_outside(name)]


def _is_linear(name: str, base: Checkpoint) -> bool:
    tensor = parse(name)
    matrix = len(base.tensors[name].shape) == 2 and name.endswith(".weight")
    return (
        matrix and (isinstance(tensor.position, int) or tensor.role == "head") and tensor.role != "embedding"
    )


def _module(name: str) -> str:
    """Return the path of a tensor's module; heads have the one name that transformers gives them."""
    return _HEAD if parse(name).role == "head" else name.rpartition(".")[0]


def _path(name: str, base: Checkpoint) -> str:
    """Return the path of a tensor's module in the live model, where a multimodal one nests its language model."""
    module = _module(name)
    nested = nested_key(base.config) is not None and module != _HEAD
    return f"model.language_model.{module.removeprefix('model.')}" if nested else module


def _targets(names: Iterable[str], base: Checkpoint) -> str | list[str]:
    """Return `target_modules`: kinds of modules; of a multimodal model, those of the language model alone."""
    kinds = sorted({_module(name).rpartition(".")[2] for name in names})
    if nested_key(base.config) is None:
        return kinds
    return rf"(.*\.language_model\..*\.)?({'|'.join(kinds)})"


def _differs(name: str, base: Checkpoint, tuned: Checkpoint) -> bool:
    return any(
        not torch.equal(theirs.to(torch.float64), ours.to(torch.float64))
        for ours, theirs in zip(_pieces(name, base), _pieces(name, tuned), strict=True)
    )


def _pieces(name: str, checkpoint: Checkpoint) -> Iterator[Tensor]:
    """Yield a tensor's elements in order, in flat pieces."""
    numel = checkpoint.tensors[name].numel
    for start in range(0, numel, _CHUNK):
        out = torch.empty(min(_CHUNK, numel - start), dtype=checkpoint.read_dtype(name))
        yield checkpoint.read_into(name, start, out)


def _in_order(
    work: Callable[[str], _Factors],
    names: list[str],
    device: str,
    threads: int | None,
    progress: Callable[[int, int], None] | None,
) -> Iterator[_Factors]:
    """Run the decompositions, several at a time on a CPU, each on one thread, so that it gives the same bits."""
    count = (threads or len(os.sched_getaffinity(0))) if device == "cpu" else 1
    with one_thread_per_operation(), ThreadPoolExecutor(count) as pool:
        for done, factors in enumerate(pool.map(work, names), start=1):
            if progress is not None:
                progress(done, len(names))
            yield factors


def _origin(base: str | Path, ancestor: Checkpoint) -> str:
    """Return what the adapter names as its base: the hub id as it was given, or the folder."""
    return str(ancestor.path) if Path(base).expanduser().exists() else str(base)


def _lay_out(
    factors: Mapping[str, _Factors], rank: int, alpha: float | None, origin: str, base: Checkpoint
) -> _Adapter:
    rank = max(own.b.shape[1] for own in factors.values()) if factors else rank
    main = float(rank) if alpha is None else alpha
    adapter = _Adapter(
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": origin,
            "inference_mode": True,
            "r": rank,
            "lora_alpha": _whole(main),
            "lora_dropout": 0.0,
            "use_rslora": False,
            "bias": "none",
            "fan_in_fan_out": any(is_transposed(base.config, name) for name in factors),
            "init_lora_weights": True,
            "target_modules": _targets(factors, base),
            "modules_to_save": None,
            "rank_pattern": {},
            "alpha_pattern": {},
        }
    )
    for name, own in factors.items():
        module = _path(name, base)
        if own.b.shape[1] != rank:
            adapter.config["rank_pattern"][module] = own.b.shape[1]
        if own.alpha != main:
            adapter.config["alpha_pattern"][module] = _whole(own.alpha)
        for factor, tensor in (("A", own.a), ("B", own.b)):
            adapter.tensors.append(
                (f"{_PREFIX}{module}.lora_{factor}.weight", tuple(tensor.shape), tensor.dtype, [tensor])
            )
    return adapter


def _save(
    rest: list[str], adapter: _Adapter, base: Checkpoint, tuned: Checkpoint, adapted: set[str]
) -> set[str]:
    """Add changed tensors as a whole: biases of linear layers as biases, modules else; return their names."""
    modules = {_path(name, base) for name in adapted}
    linear = {_module(name) for name in _language(base) if _is_linear(name, base)}
    biases = [name for name in rest if name.endswith(".bias") and _module(name) in linear]
    others = [name for name in rest if name not in biases and not is_outside(name)]
    paths = {_path(name, base) for name in others}
    # peft compares the end of a module's path with these names, without regard to its parts.
    saved = paths if nested_key(base.config) else {path.rpartition(".")[2] for path in paths}
    whole = [name for name in _language(base) if _path(name, base).endswith(tuple(saved))]
    clash = sorted(end for end in saved if any(module.endswith(end) for module in modules))
    if clash:
        raise CheckpointError(
            f"{tuned.path}: '{clash[0]}' has both linear layers and other tensors that changed; an adapter cannot "
            "save the latter whole, leave out --save-rest"
        )
    if biases:
        adapter.config["bias"] = "all"
    if saved:
        adapter.config["modules_to_save"] = sorted(saved)
    embedding = input_embedding(base.tensors)
    if base.tied and embedding in whole:
        adapter.config["ensure_weight_tying"] = True
        adapter.tensors.append(
            (
                f"{_PREFIX}{_HEAD}.weight",
                tuned.tensors[embedding].shape,
                tuned.read_dtype(embedding),
                _pieces(embedding, tuned),
            )
        )
    for name in [*biases, *whole]:
        module, leaf = _path(name, base), name.rpartition(".")[2]
        key = f"{module}.base_layer.{leaf}" if name in biases and module in modules else f"{module}.{leaf}"
        info = tuned.tensors[name]
        adapter.tensors.append((_PREFIX + key, info.shape, tuned.read_dtype(name), _pieces(name, tuned)))
    return {*biases, *others}


def _summary(
    factors: Mapping[str, _Factors], rest: list[str], saved: set[str], base: Checkpoint, tuned: Checkpoint
) -> tuple[tuple[Part, ...], float]:
    """Return errors by kind of tensor, and the relative error over everything."""
    rows: dict[tuple[str, str], list[tuple[int, float, float]]] = {}
    for name, own in factors.items():
        key = (_module(name).rpartition(".")[2], "lora")
        rows.setdefault(key, []).append((own.b.shape[1], own.change, own.left))
    for name in rest:
        change = sum(
            float((theirs.double() - ours.double()).square().sum())
            for ours, theirs in zip(_pieces(name, base), _pieces(name, tuned), strict=True)
        )
        role: Role | str = "bias" if name.endswith(".bias") else parse(name).role
        role = "outside the language model" if is_outside(name) else role
        how = "saved" if name in saved else "not covered"
        rows.setdefault((role, how), []).append((0, change, 0.0 if name in saved else change))
    parts = []
    for (kind, how), entries in rows.items():
        change, left = sum(e[1] for e in entries), sum(e[2] for e in entries)
        parts.append(
            Part(kind, len(entries), how, max(e[0] for e in entries), math.sqrt(change), _ratio(left, change))
        )
    everything = [entry for entries in rows.values() for entry in entries]
    return tuple(parts), _ratio(sum(e[2] for e in everything), sum(e[1] for e in everything))


def _ratio(left: float, change: float) -> float:
    return math.sqrt(left / change) if change > 0 else 0.0


def _whole(value: float) -> int | float:
    return int(value) if value == int(value) else value


def _check_arguments(
    rank: int, error: float, alpha: float | None, dtype: str, device: str, out: Path
) -> None:
    if rank < 1:
        raise UserError(f"--rank {rank}: should be 1 or more")
    if not 0 <= error < 1:
        raise UserError(f"--error {error:g}: should be from 0 up to 1, e.g. 0.05")
    if alpha is not None and not (math.isfinite(alpha) and alpha > 0):
        raise UserError(f"--alpha {alpha:g}: should be a number above 0")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {device}: torch sees no CUDA device here")
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: should be one of {', '.join(DTYPES)}")
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UserError(f"{out}: exists already and is not an empty folder; name a new one")
