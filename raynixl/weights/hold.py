"""The hold: which push a publication's arenas are kept for, so that pushes follow one another."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from raynixl.errors import TransferTimeout

_LOOK_SECONDS = 0.2
"""How often who waits looks whether the one who pushes is gone."""


class Hold:
    """Taken by one push at a time, until it is released, its time is over, or who pushes is gone."""

    def __init__(self) -> None:
        self._changed = threading.Condition()  # protects everything below
        self._push = ""
        self._until = 0.0
        self._is_gone: Callable[[], bool] = _never

    def take(self, push: str, seconds: float, *, is_gone: Callable[[], bool] | None = None) -> None:
        """Take the arenas for `seconds`, waiting for the push that has them.

        Raises:
            TransferTimeout: it did not end in time.
        """
        until = time.monotonic() + seconds
        with self._changed:
            while self._is_taken():
                left = until - time.monotonic()
                if left <= 0:
                    raise TransferTimeout("another push of these weights is not over", hint="push again later")
                self._changed.wait(min(left, _LOOK_SECONDS))
            self._push, self._until = push, until
            self._is_gone = _never if is_gone is None else is_gone

    def release(self, push: str) -> bool:
        """End a push; False if the arenas are not, or no more, kept for it."""
        with self._changed:
            if self._push != push:
                return False
            self._push = ""
            self._changed.notify_all()
            return True

    def _is_taken(self) -> bool:
        return bool(self._push) and time.monotonic() < self._until and not self._is_gone()


def _never() -> bool:
    return False
