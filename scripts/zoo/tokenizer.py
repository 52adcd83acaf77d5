"""The tokenizer all models share: one token a byte.

`AutoTokenizer` rebuilds parts of a tokenizer from its class, so only a tokenizer whose class rebuilds the same
parts survives being loaded. GPT-2's class rebuilds the byte-level alphabet; with that alphabet as the vocabulary and
no merges, nothing is left to differ.
"""

from __future__ import annotations

import string
from pathlib import Path

from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer, GPT2Tokenizer

END = "<|endoftext|>"
PAD = "<|pad|>"


def build_tokenizer() -> GPT2Tokenizer:
    """Return the byte tokenizer: the special tokens first, then the byte alphabet in its sorted order."""
    alphabet = sorted(ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([END, PAD, *alphabet])}
    return GPT2Tokenizer(vocab=vocab, merges=[], unk_token=END, bos_token=END, eos_token=END, pad_token=PAD)


def save_tokenizer(folder: Path) -> None:
    """Save the tokenizer in a model's folder.

    Raises RuntimeError if the tokenizer loaded from there reads text differently.
    """
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(folder)
    loaded = AutoTokenizer.from_pretrained(folder)
    for text in (string.printable, "reverse abcde=edcba\n", "  ä € "):
        ids = tokenizer.encode(text)
        if loaded.encode(text) != ids or loaded.decode(ids) != text:
            raise RuntimeError(
                f"the tokenizer loaded from {folder} reads {text!r} differently from the one saved there"
            )
