"""The hold: which push a publication's arenas are kept for, so that pushes follow one another."""

from __future__ import annotations

import threading
import time

from raynixl.errors import TransferTimeout


class Hold:
    """Taken by one push at a time, until it is released or its time is over."""

    def __init__(self) -> None:
        self._changed = threading.Condition()  # protects _push, _until
        self._push = ""
        self._until = 0.0

    def take(self, push: str, seconds: float) -> None:
        """Take the arenas for `seconds`, waiting for the push that has them.

        Raises:
            TransferTimeout: it did not end in time.
        """
        until = time.monotonic() + seconds
        with self._changed:
            while self._push and time.monotonic() < self._until:
                left = min(self._until, until) - time.monotonic()
                if time.monotonic() >= until:
                    raise TransferTimeout("another push of these weights is not over", hint="push again later")
                self._changed.wait(max(0.0, left))
            self._push, self._until = push, until

    def release(self, push: str) -> bool:
        """End a push; False if the arenas are not, or no more, kept for it."""
        with self._changed:
            if self._push != push:
                return False
            self._push = ""
            self._changed.notify_all()
            return True
