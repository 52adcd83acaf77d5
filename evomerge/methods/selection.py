"""Exact order statistics of values that are computed chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

_DIGIT = 16


def ascending(chunks: Callable[[], Iterable[Tensor]], ranks: Sequence[int]) -> list[float]:
    """Return the elements at some places of the ascending order, exactly; nothing of their number is stored.

    Radix selection: the bit patterns of floating-point numbers that are not negative are ordered as the
    numbers are, so that a histogram of their upper 16 bits says which of them to count further.

    Args:
        chunks: begins the same sequence of chunks anew with each call; flat, one dtype, float32 or float64,
            no element negative.
        ranks: places, the smallest element's is 0.
    """
    left = list(ranks)
    prefixes = [0] * len(left)
    bits, shift = 0, 0
    while not bits or shift:
        counts: dict[int, npt.NDArray[np.int64]] = {}
        for chunk in chunks():
            numbers = chunk.cpu().numpy()
            if not bits:
                bits = shift = numbers.itemsize * 8
            keys: npt.NDArray[Any] = numbers.view(f"u{numbers.itemsize}")
            upper = keys >> keys.dtype.type(shift - _DIGIT)
            for prefix in set(prefixes):
                digits = upper if shift == bits else upper[upper >> keys.dtype.type(_DIGIT) == prefix]
                found = np.bincount((digits & keys.dtype.type(0xFFFF)).astype(np.intp), minlength=1 << _DIGIT)
                counts[prefix] = counts[prefix] + found if prefix in counts else found
        for i, prefix in enumerate(prefixes):
            upto = np.cumsum(counts[prefix])
            digit = int(np.searchsorted(upto, left[i], side="right"))
            left[i] -= int(upto[digit] - counts[prefix][digit])
            prefixes[i] = prefix << _DIGIT | digit
        shift -= _DIGIT
    patterns = np.array(prefixes, dtype=f"u{bits // 8}")
    return [float(number) for number in patterns.view(f"f{bits // 8}")]
