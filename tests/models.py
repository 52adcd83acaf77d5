"""Tiny random checkpoints for tests: real Hugging Face folders, made in milliseconds."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
)

_VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4}

ARCHITECTURES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "mistral": (MistralConfig, MistralForCausalLM, {}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 8}),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM, _GEMMA),
    "gemma3_text": (Gemma3TextConfig, Gemma3ForCausalLM, _GEMMA),
    "phi3": (Phi3Config, Phi3ForCausalLM, {}),
    "gpt_neox": (GPTNeoXConfig, GPTNeoXForCausalLM, {}),
    "stablelm": (StableLmConfig, StableLmForCausalLM, {}),
    "gpt2": (GPT2Config, GPT2LMHeadModel, {}),
    "olmo2": (Olmo2Config, Olmo2ForCausalLM, {}),
    "mixtral": (MixtralConfig, MixtralForCausalLM, {"num_local_experts": 3}),
    "qwen3_moe": (
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
        {"head_dim": 8, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    ),
}
"""Config class, model class, and what a tiny config needs besides the sizes, by ``model_type``."""

WRAPPERS: dict[str, tuple[Any, Any, str, dict[str, Any]]] = {
    "gemma3": (
        Gemma3Config,
        Gemma3ForConditionalGeneration,
        "gemma3_text",
        {
            "vision_config": _VISION,
            "mm_tokens_per_image": 4,
            "image_token_index": 258,
            "boi_token_index": 257,
            "eoi_token_index": 256,
        },
    ),
}
"""Multimodal models: config class, model class, the text model's kind, and the rest of a tiny config."""

KINDS = ("llama", "mistral", "qwen2", "qwen3")
VOCAB = 259


def make_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Write a byte-level tokenizer of 259 tokens: 256 bytes, <s>, </s> and <pad>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", "<pad>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    folder.mkdir(parents=True, exist_ok=True)
    fast.save_pretrained(folder)
    return fast


def make_model(
    folder: Path,
    seed: int = 0,
    *,
    base: Path | None = None,
    noise: float = 0.02,
    kind: str = "llama",
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    hidden: int = 32,
    layers: int = 4,
    max_shard_size: str = "5GB",
    tokenizer: bool = True,
    live_form: bool = False,
    **config: Any,
) -> Path:
    """Write a tiny random model; with `base`, that model plus seeded noise (an "expert").

    `live_form` writes the names and shapes that transformers has in memory instead of the published ones.
    """
    wrapper = WRAPPERS.get(kind)
    config_class, model_class, own = _architecture(wrapper[2] if wrapper else kind)
    generator = torch.Generator().manual_seed(seed)
    settings: Any = {
        "vocab_size": VOCAB,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tied,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        **own,
        **config,
    }
    if wrapper is None:
        settings = config_class(**settings)
    else:
        config_class, model_class, _, rest = wrapper
        settings = config_class(text_config=settings, tie_word_embeddings=tied, **copy.deepcopy(rest))
    if base is None:
        model = model_class(settings)
        with torch.no_grad():
            for parameter in model.parameters():
                spread = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(1 + 0.1 * spread if parameter.dim() == 1 else 0.15 * spread)
    else:
        model = model_class.from_pretrained(base, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(noise * torch.randn(parameter.shape, generator=generator))
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size, save_original_format=not live_form)
    if tokenizer:
        make_tokenizer(folder)
    return folder


def _architecture(kind: str) -> tuple[Any, Any, dict[str, Any]]:
    if kind in ARCHITECTURES:
        return ARCHITECTURES[kind]
    config = CONFIG_MAPPING[kind]
    return config, MODEL_FOR_CAUSAL_LM_MAPPING[config], {}


def make_family(folder: Path, **options: Any) -> dict[str, Path]:
    """Write a base and three experts: ``base``, ``a``, ``b``, ``c``."""
    base = make_model(folder / "base", seed=1, **options)
    paths = {"base": base}
    for i, name in enumerate("abc"):
        paths[name] = make_model(folder / name, seed=10 + i, base=base, **options)
    return paths
