"""Random masks without a generator: a hash of each element's index decides whether it is kept."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

UInt32 = npt.NDArray[np.uint32]
Bool = npt.NDArray[np.bool_]

_STRIP = 1 << 16
_COUNTER: UInt32 = np.arange(_STRIP, dtype=np.uint32)


@dataclass(frozen=True)
class MaskKey:
    """What random masks depend on.

    Attributes:
        seed: the recipe's seed.
        experts: content hash (hex) of each input, in the merge's order.
        tensor: the source tensor's name.
    """

    seed: int
    experts: tuple[str, ...]
    tensor: str


def hash_v1(seed: int, expert: str, tensor: str, start: int, out: UInt32) -> UInt32:
    """Fill `out` with the hashes of the element indices ``start, start + 1, …``; u = hash · 2⁻³².

    This definition is a contract: recipes give the same bytes for as long as it stands.
    For the 64-bit index i, let ``hi = i >> 32`` and ``lo = i & 0xffffffff``. The key words are the first
    two little-endian uint32 of the SHA-256 of the UTF-8 text ::

        "hash_v1" US str(seed) US expert US tensor US str(hi)          (US = "\\x1f", decimal numbers)

    and with all arithmetic modulo 2³² ::

        x = lo ^ key[0]
        x = (x ^ (x >> 17)) * 0xed5ad4bb
        x = x ^ key[1]
        x = (x ^ (x >> 11)) * 0xac4c1b51
        x = (x ^ (x >> 15)) * 0x31848bab
        x = x ^ (x >> 14)

    (C. Wellons' "triple32" with a second key word in its first round). For each key it is a permutation
    of the 32-bit integers.

    Args:
        seed: the recipe's seed.
        expert: content hash of the expert.
        tensor: source tensor name.
        start: index of the first element.
        out: ``(n,)`` uint32, overwritten.
    """
    shifted = np.empty(min(_STRIP, out.size), dtype=np.uint32)
    done = 0
    while done < out.size:
        hi, lo = divmod(start + done, 1 << 32)
        strip = out[done : done + min(_STRIP, (1 << 32) - lo)]
        _mix(lo, key_words(seed, expert, tensor, hi), strip, shifted[: strip.size])
        done += strip.size
    return out


def device_hashes(
    seed: int, expert: str, tensor: str, start: int, length: int, device: torch.device
) -> Tensor:
    """Return `hash_v1` of `length` elements from `start` on, ``(length,)`` int64 on a device."""
    parts = []
    while length > 0:
        hi, lo = divmod(start, 1 << 32)
        count = min(length, (1 << 32) - lo)
        first, second = key_words(seed, expert, tensor, hi)
        x = torch.arange(lo, lo + count, device=device).bitwise_xor_(first)
        for word, shift, factor in ((0, 17, 0xED5AD4BB), (second, 11, 0xAC4C1B51), (0, 15, 0x31848BAB)):
            # The product wraps around modulo 2⁶⁴, which leaves its lower half right.
            x.bitwise_xor_(word).bitwise_xor_(x >> shift).mul_(factor).bitwise_and_(0xFFFFFFFF)
        parts.append(x.bitwise_xor_(x >> 14))
        start, length = start + count, length - count
    return torch.cat(parts)


def keep_mask(hashes: UInt32, density: float, out: Bool) -> Bool:
    """Mark where u = hash · 2⁻³² < density; masks of one key are nested in density.

    Args:
        hashes: ``(n,)`` uint32 from `hash_v1`.
        density: in [0, 1].
        out: ``(n,)`` bool, overwritten.
    """
    limit = limit_of(density)
    if limit >= 1 << 32:
        out.fill(True)
        return out
    return np.less(hashes, np.uint32(limit), out=out)


def limit_of(density: float) -> int:
    """Return the hash from which on an element is dropped; 2³² or more: none is."""
    return math.ceil(density * 2.0**32)


def key_words(seed: int, expert: str, tensor: str, hi: int) -> tuple[int, int]:
    """Return the two key words of `hash_v1` for the elements whose index has the upper half `hi`."""
    text = "\x1f".join(["hash_v1", str(seed), expert, tensor, str(hi)])
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def _mix(lo: int, key: tuple[int, int], x: UInt32, shifted: UInt32) -> None:
    np.add(_COUNTER[: x.size], np.uint32(lo), out=x)
    np.bitwise_xor(x, np.uint32(key[0]), out=x)
    _xorshift(x, 17, shifted)
    np.multiply(x, np.uint32(0xED5AD4BB), out=x)
    np.bitwise_xor(x, np.uint32(key[1]), out=x)
    _xorshift(x, 11, shifted)
    np.multiply(x, np.uint32(0xAC4C1B51), out=x)
    _xorshift(x, 15, shifted)
    np.multiply(x, np.uint32(0x31848BAB), out=x)
    _xorshift(x, 14, shifted)


def _xorshift(x: UInt32, bits: int, shifted: UInt32) -> None:
    np.right_shift(x, np.uint32(bits), out=shifted)
    np.bitwise_xor(x, shifted, out=x)
