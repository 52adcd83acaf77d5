"""From text to token ids, exactly as lm-eval's Hugging Face model does it."""

from __future__ import annotations

import hashlib
import json
from typing import Any


class Encoder:
    """A tokenizer with lm-eval's conventions (`lm_eval.models.huggingface.HFLM`, version 0.4.13).

    Args:
        tokenizer: a Hugging Face tokenizer.

    Attributes:
        prefix: the token that conditions a text without context: BOS, else EOS.
        eos: text of the EOS token, or None.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        if bos is None and eos is None:
            raise ValueError("the tokenizer has neither a BOS nor an EOS token")
        self.prefix: int = eos if bos is None else bos
        self._prefix_text: str = tokenizer.decode(self.prefix)
        self.eos: str | None = None if eos is None else tokenizer.decode(eos, skip_special_tokens=False)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Return the tokens of a text; special tokens are left out if asked, or if it brings its own BOS."""
        if not special or text.startswith(self._prefix_text):
            return list(self.tokenizer.encode(text, add_special_tokens=False))
        return list(self.tokenizer.encode(text))

    def pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Encode context and continuation so that together they are the tokens of the whole text.

        Spaces at the end of the context belong to the continuation. At least one context token comes
        back: `prefix` where there is none.
        """
        if context == "":
            tokens = self.encode(continuation, special=False)
            if tokens[:1] == [self.prefix]:
                return tokens[:1], tokens[1:]
            return [self.prefix], tokens
        stripped = context.rstrip()
        whole = self.encode(context + continuation)
        start = self.encode(stripped)
        if not start:
            return [self.prefix], whole
        return start, whole[len(start) :]

    def prompt(self, context: str) -> list[int]:
        """Encode the prompt of a generation; at least one token comes back."""
        bos = self.tokenizer.bos_token
        own_bos = bos is not None and context.startswith(bos)
        tokens = list(
            self.tokenizer(context, **({"add_special_tokens": False} if own_bos else {}))["input_ids"]
        )
        return tokens or [self.prefix]

    @property
    def sha256(self) -> str:
        """Hash of everything on which token ids depend."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        content = (
            backend.to_str()
            if backend is not None
            else json.dumps(sorted(self.tokenizer.get_vocab().items()))
        )
        special = {str(k): str(v) for k, v in self.tokenizer.special_tokens_map.items()}
        probe = self.tokenizer.encode("a")
        text = json.dumps([content, sorted(special.items()), probe])
        return hashlib.sha256(text.encode()).hexdigest()
