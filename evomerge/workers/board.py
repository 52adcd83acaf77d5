"""Where Ray workers say how far they are, without being asked."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

_NAMESPACE = b"evomerge"


@dataclass(frozen=True)
class Board:
    """How many items of each request are answered, in the key-value store of the cluster's head.

    An actor that works answers nothing else, so it writes. Ray calls this store experimental: without it there is
    no progress within requests, and that is all.

    Attributes:
        name: of the run of the program.
    """

    name: str

    def tell(self, work: str, items: int) -> None:
        """Say how many items of a request are answered; called in a worker."""
        with contextlib.suppress(Exception):
            from ray.experimental import internal_kv

            internal_kv._internal_kv_put(self._key(work), b"%d" % items, namespace=_NAMESPACE)

    def read(self, work: str) -> int:
        """Return how many items of a request are answered, as far as anybody has said."""
        with contextlib.suppress(Exception):
            from ray.experimental import internal_kv

            return int(internal_kv._internal_kv_get(self._key(work), namespace=_NAMESPACE) or 0)
        return 0

    def clear(self) -> None:
        """Take everything down."""
        with contextlib.suppress(Exception):
            from ray.experimental import internal_kv

            internal_kv._internal_kv_del(self._key(""), del_by_prefix=True, namespace=_NAMESPACE)

    def _key(self, work: str) -> bytes:
        return f"{self.name}/{work}".encode()
