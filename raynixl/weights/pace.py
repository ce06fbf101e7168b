"""The pace: how long a read may take before its giver counts as stalled, by how long the other reads of a pull took."""

from __future__ import annotations

import threading

STALL_SECONDS = 5.0
"""For which a giver is waited for as long as nothing has come."""
_SLOWEST = 1e8  # bytes a second that a giver should reach
_TIMES = 20.0  # as long as the slowest read so far: chunks are alike, and waiting in turn for others costs few times
_LEAST_SECONDS = 2.0  # a busy machine may keep a thread waiting for a second
_MAX_DOUBLINGS = 10


class Pace:
    """The pace of one pull. Safe in threads; reads no clock."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # protects all below
        self._slowest = 0.0
        self._doublings = 0
        self._doubled_at = 0.0

    def landed(self, seconds: float) -> None:
        """Note a read that took so long."""
        with self._lock:
            self._slowest = max(self._slowest, seconds)
            self._doublings = 0

    def stalled(self, began: float, now: float) -> None:
        """Note that a read was waited for in vain. While nothing else comes, the next ones get twice the time.

        So a link that is slower than all we expect brings its chunks in nonetheless.
        """
        with self._lock:
            if began >= self._doubled_at:  # those that were under way together count once
                self._doubled_at = now
                self._doublings = min(self._doublings + 1, _MAX_DOUBLINGS)

    def patience(self, nbytes: int) -> float:
        """Return how long to wait for so many bytes."""
        longest = STALL_SECONDS + nbytes / _SLOWEST
        with self._lock:
            usual = min(longest, max(_LEAST_SECONDS, _TIMES * self._slowest)) if self._slowest else longest
            return float(usual * 2**self._doublings)
