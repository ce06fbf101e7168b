"""Reads into one slot, resolved once and posted again at every push for as long as all lies where it lay."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from raynixl.agents import Prepared, Transfer

_MOST_BLOCKS = 1 << 20  # some 100 bytes each
_MOST_READS = 1 << 14
_KEPT_PULLS = 4  # sources have two copies, which they may use in turn


@dataclass(slots=True)
class _Kept:
    read: Prepared
    pull: int


class Reads:
    """Prepared reads by what they read. Safe in threads.

    There is room for so many. Those that some pulls have not used make way for others; where all are used, what comes
    beyond is not kept: pulls go through all of them in turn, so that no read would be found again if the oldest went.

    They hold on to the memory that they read into: `clear` lets go of it. Those that have failed and may still write
    are remembered, as what they bring would come after what was checked.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # protects all below
        self._kept: dict[Hashable, _Kept] = {}
        self._blocks = 0
        self._pull = 0
        self._has_swept = False
        self._late: list[Transfer] = []

    def __len__(self) -> int:
        return len(self._kept)

    def begin(self) -> None:
        """Hear that a pull begins."""
        with self._lock:
            self._pull += 1
            self._has_swept = False

    def get(self, key: Hashable, make: Callable[[], Prepared]) -> Prepared:
        """Return the read of a key, made now if it is not there."""
        with self._lock:
            found = self._kept.get(key)
            if found is not None:
                found.pull = self._pull
                return found.read
        made = make()
        with self._lock:
            if key not in self._kept and self._has_room(made.count):
                self._kept[key] = _Kept(made, self._pull)
                self._blocks += made.count
        return made

    def failed(self, read: Transfer) -> None:
        """Hear of a read that did not end well. It may still write: a GPU cannot be stopped."""
        if not _is_settled(read, 0.0):
            with self._lock:
                self._late.append(read)

    def wait_quiet(self, seconds: float) -> bool:
        """Wait until no read that has failed writes any more; False if one still may after so many seconds."""
        while self._late:
            with self._lock:
                late = self._late[0] if self._late else None
            if late is not None and not _is_settled(late, seconds):
                return False
            with self._lock:
                self._late = [one for one in self._late if one is not late]
        return True

    def clear(self) -> None:
        """Forget all."""
        with self._lock:
            self._kept.clear()
            self._late = []
            self._blocks = 0

    def _has_room(self, blocks: int) -> bool:
        """Whether one more can be kept; those long unused are dropped for it, which is looked for once a pull."""
        if not self._is_full(blocks):
            return True
        if not self._has_swept:
            self._has_swept = True
            self._kept = {key: one for key, one in self._kept.items() if one.pull > self._pull - _KEPT_PULLS}
            self._blocks = sum(one.read.count for one in self._kept.values())
        return not self._is_full(blocks)

    def _is_full(self, blocks: int) -> bool:
        return len(self._kept) >= _MOST_READS or self._blocks + blocks > _MOST_BLOCKS


def _is_settled(read: Transfer, seconds: float) -> bool:
    return all(job.wait_settled(seconds) for job in read.jobs)
