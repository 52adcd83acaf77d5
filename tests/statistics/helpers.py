"""Texts, and the same statistics computed the plain way: whole forward passes, every gradient at once."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

TEXTS = ["one and one is two", "a cat sat", "the longest of all these short texts, by far", "x", "no"]


def write_texts(file: Path, texts: Iterable[str] = TEXTS, **extra: list[Any]) -> Path:
    """Write a JSONL file with a ``text`` on each line, and further keys."""
    lines = [{"text": text} for text in texts]
    for key, values in extra.items():
        for line, value in zip(lines, values, strict=True):
            line[key] = value
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return file


def load(folder: Path) -> Any:
    """Load a checkpoint with transformers, in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def encode(folder: Path, texts: Iterable[str] = TEXTS) -> list[torch.Tensor]:
    """Return each text's ids ``(1, T)``."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [torch.tensor([tokenizer(text)["input_ids"]]) for text in texts]


def inputs_of(model: Any, sequences: Iterable[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the inputs of every linear module, ``(tokens, d_in)`` in float64, and those of MoE experts.

    Experts' inputs are under the module's name: hidden states, and the experts chosen for each token under
    the name with ``/chosen``.
    """
    seen: dict[str, list[torch.Tensor]] = defaultdict(list)

    def hook(name: str) -> Any:
        def keep(module: Any, args: Any, output: Any) -> None:
            seen[name].append(args[0].flatten(0, -2).double())
            if name.endswith(".experts"):
                seen[f"{name}/chosen"].append(args[1])

        return keep

    handles = [
        module.register_forward_hook(hook(name))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) or name.endswith(".experts")
    ]
    with torch.no_grad():
        for ids in sequences:
            model(ids)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(rows) for name, rows in seen.items()}


def mean_squares(model: Any, sequences: Iterable[torch.Tensor], start: int = 1) -> dict[str, torch.Tensor]:
    """Return the mean over sequences of (∂ log p / ∂θ)², by parameter, in float64 after each gradient."""
    model.requires_grad_(True)
    names, parameters = zip(*model.named_parameters(), strict=True)
    totals = {
        name: torch.zeros(p.shape, dtype=torch.float64) for name, p in zip(names, parameters, strict=True)
    }
    count = 0
    for ids in sequences:
        if ids.shape[1] <= start:
            continue
        logits = model(ids).logits[0, start - 1 : -1]
        loss = torch.nn.functional.cross_entropy(logits, ids[0, start:], reduction="sum")
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for name, gradient in zip(names, gradients, strict=True):
            if gradient is not None:
                totals[name] += gradient.double() ** 2
        count += 1
    return {name: total / count for name, total in totals.items()}
