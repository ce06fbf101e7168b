"""Reads into one slot, resolved once and posted again at every push for as long as all lies where it lay."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from raynixl.agents import Prepared

_MOST_BLOCKS = 1 << 20  # some 100 bytes each
_MOST_READS = 1 << 14


class Reads:
    """Prepared reads by what they read, the last ones used. Safe in threads.

    They hold on to the memory that they read into: `clear` lets go of it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # protects all below
        self._reads: OrderedDict[Hashable, Prepared] = OrderedDict()
        self._blocks = 0

    def __len__(self) -> int:
        return len(self._reads)

    def get(self, key: Hashable, make: Callable[[], Prepared]) -> Prepared:
        """Return the read of a key, made now if it is not there."""
        with self._lock:
            found = self._reads.get(key)
            if found is not None:
                self._reads.move_to_end(key)
                return found
        made = make()
        with self._lock:
            self._drop(key)
            self._reads[key] = made
            self._blocks += made.count
            while len(self._reads) > 1 and (self._blocks > _MOST_BLOCKS or len(self._reads) > _MOST_READS):
                self._drop(next(iter(self._reads)))
        return made

    def clear(self) -> None:
        """Forget all."""
        with self._lock:
            self._reads.clear()
            self._blocks = 0

    def _drop(self, key: Hashable) -> None:
        dropped = self._reads.pop(key, None)
        if dropped is not None:
            self._blocks -= dropped.count
