"""Synthetic checkpoints for timing: a random Llama and fine-tunes of it, bfloat16, written tensor by tensor."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from evomerge.checkpoints.header import build_header

SHAPES = {
    "135m": {"hidden": 576, "inner": 1536, "layers": 30, "heads": 9, "groups": 3, "vocabulary": 49152},
    "1b": {"hidden": 2048, "inner": 5632, "layers": 22, "heads": 32, "groups": 4, "vocabulary": 32000},
    "8b": {"hidden": 4096, "inner": 14336, "layers": 32, "heads": 32, "groups": 8, "vocabulary": 128256},
}


def layout(size: str) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    """Return name, shape and dtype of every tensor; 135m has tied embeddings, the others have a head."""
    s = SHAPES[size]
    hidden, inner, narrow = s["hidden"], s["inner"], s["hidden"] // s["heads"] * s["groups"]
    shapes: list[tuple[str, tuple[int, ...]]] = [("model.embed_tokens.weight", (s["vocabulary"], hidden))]
    for layer in range(s["layers"]):
        prefix = f"model.layers.{layer}"
        shapes += [
            (f"{prefix}.input_layernorm.weight", (hidden,)),
            (f"{prefix}.self_attn.q_proj.weight", (hidden, hidden)),
            (f"{prefix}.self_attn.k_proj.weight", (narrow, hidden)),
            (f"{prefix}.self_attn.v_proj.weight", (narrow, hidden)),
            (f"{prefix}.self_attn.o_proj.weight", (hidden, hidden)),
            (f"{prefix}.post_attention_layernorm.weight", (hidden,)),
            (f"{prefix}.mlp.gate_proj.weight", (inner, hidden)),
            (f"{prefix}.mlp.up_proj.weight", (inner, hidden)),
            (f"{prefix}.mlp.down_proj.weight", (hidden, inner)),
        ]
    shapes.append(("model.norm.weight", (hidden,)))
    if size != "135m":
        shapes.append(("lm_head.weight", (s["vocabulary"], hidden)))
    return [(name, shape, torch.bfloat16) for name, shape in shapes]


def config(size: str) -> dict[str, object]:
    """Return the checkpoint's config.json."""
    s = SHAPES[size]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": s["hidden"],
        "intermediate_size": s["inner"],
        "num_hidden_layers": s["layers"],
        "num_attention_heads": s["heads"],
        "num_key_value_heads": s["groups"],
        "vocab_size": s["vocabulary"],
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": size == "135m",
        "torch_dtype": "bfloat16",
    }


def make(folder: Path, size: str, models: int) -> list[Path]:
    """Write ``base`` and the fine-tunes ``ft1`` …, unless they are there: weights N(0, .02²), deltas N(0, .001²)."""
    tensors = layout(size)
    header, offsets = build_header(tensors)
    paths = [folder / size / ("base" if k == 0 else f"ft{k}") for k in range(models)]
    for k, path in enumerate(paths):
        file = path / "model.safetensors"
        total = offsets[-1] + torch.Size(tensors[-1][1]).numel() * 2
        if file.is_file() and file.stat().st_size == total:
            continue
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.json").write_text(json.dumps(config(size), indent=2))
        with file.open("wb") as stream:
            stream.write(header)
            for i, (_, shape, _) in enumerate(tensors):
                weights = _normal(shape, 0.02, seed=i)
                if k:
                    weights += _normal(shape, 0.001, seed=1000 * k + i)
                stream.write(weights.bfloat16().view(torch.uint8).numpy().data)
    return paths


def _normal(shape: tuple[int, ...], spread: float, seed: int) -> torch.Tensor:
    """Return normal numbers, from a table of 2²⁰ that begins at a random place: fast, and close enough for timing."""
    generator = torch.Generator().manual_seed(seed)
    numel = torch.Size(shape).numel()
    table = torch.randn(min(numel, (1 << 20) + 7), generator=generator)
    repeats = -(-numel // table.numel())
    return table.repeat(repeats)[:numel].mul_(spread).reshape(-1)
