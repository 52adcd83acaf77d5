"""What does not depend on the candidate is computed once a worker and kept here."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

T = TypeVar("T")


class TensorCache:
    """Candidate-independent reductions: Gram matrices, magnitude tables.

    What came first stays. A search goes through the same tensors again and again, and for such a cycle an
    eviction of the least recently used would lose every value just before it is needed.

    Args:
        limit: bytes that the kept values may take together.

    Attributes:
        nbytes: bytes that they take.
        full: whether a value has been turned away.

    May be shared by threads; two threads that miss the same key at once may both compute it (the results
    are equal).
    """

    def __init__(self, limit: int = 1 << 30) -> None:
        self.limit = limit
        self.nbytes = 0
        self.full = False
        self._values: dict[Hashable, Any] = {}
        self._lock = threading.Lock()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._values

    def get(self, key: Hashable, build: Callable[[], T]) -> T:
        """Return the value of `key`; `build` makes it when it is not there."""
        with self._lock:
            if key in self._values:
                found: T = self._values[key]
                return found
        value = build()
        size = int(getattr(value, "nbytes", 0)) or sys.getsizeof(value)
        with self._lock:
            if key not in self._values:
                if self.nbytes + size <= self.limit:
                    self._values[key] = value
                    self.nbytes += size
                else:
                    self.full = True
        return value
