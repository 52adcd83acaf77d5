"""Tiny models with tokenizers of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.merging.helpers import read64

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
SPECIAL = ["<s>", "</s>", "<pad>"]
PERMUTED = [*reversed(BYTES), *SPECIAL]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def write_tokenizer(
    folder: Path,
    words: Sequence[str] = (),
    added: Sequence[str] = (),
    *,
    order: Sequence[str] = (*SPECIAL, *BYTES),
    eos: str = "</s>",
) -> dict[str, int]:
    """Write a byte-level BPE tokenizer and return its ids.

    Args:
        folder: made if need be.
        words: ASCII words (a leading ``Ġ`` for a space) that get merges, after `order`.
        added: special tokens behind the vocabulary.
        order: the first tokens.
        eos: the end-of-sequence token.
    """
    vocab = {token: i for i, token in enumerate(order)}
    merges = []
    for word in words:
        for end in range(2, len(word) + 1):
            if word[:end] not in vocab:
                vocab[word[:end]] = len(vocab)
                merges.append((word[: end - 1], word[end - 1]))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in added])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token=eos, pad_token="<pad>"
    )
    folder.mkdir(parents=True, exist_ok=True)
    fast.save_pretrained(folder)
    return fast.get_vocab()


def write_model(
    folder: Path,
    ids: dict[str, int],
    seed: int,
    *,
    rows: int | None = None,
    eos: str = "</s>",
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> Path:
    """Write a one-layer random Llama with a row per token, or `rows`, beside its tokenizer."""
    generator = torch.Generator().manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=rows or len(ids),
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
            tie_word_embeddings=tied,
            bos_token_id=ids["<s>"],
            eos_token_id=ids[eos],
            pad_token_id=ids["<pad>"],
            **config,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    model.to(dtype).save_pretrained(folder)
    return folder


class World:
    """Three models: base (padded), a (other order, a word and a token of its own), b (a's token, more padding)."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.ids = {
            "base": write_tokenizer(folder / "base", ["the", "Ġcat"]),
            "a": write_tokenizer(folder / "a", ["Ġdog"], ["<|im_end|>"], order=PERMUTED),
            "b": write_tokenizer(folder / "b", ["the"], ["<|im_end|>", "<tool>"]),
        }
        self.rows = {"base": 272, "a": len(self.ids["a"]), "b": 288}
        self.models = {
            name: write_model(folder / name, ids, seed, rows=self.rows[name], **options)
            for seed, (name, ids) in enumerate(self.ids.items())
        }

    def row(self, tensors: Mapping[str, torch.Tensor], name: str, token: str) -> torch.Tensor | None:
        """Return a model's row of a token as stored, or None."""
        return tensors[name][self.ids[name][token]] if token in self.ids[name] else None


def stored(world: World, tensor: str) -> dict[str, torch.Tensor]:
    """Return each model's embedding or head in float64; a tied head is the embedding."""
    found = {name: read64(path) for name, path in world.models.items()}
    return {name: tensors.get(tensor, tensors[EMBEDDING]) for name, tensors in found.items()}
