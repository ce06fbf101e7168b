"""The job of what a thread of ours moves piece by piece: the face of the core's `Job`."""

from __future__ import annotations

import contextlib
import os
import time

from raynixl.conditions import Condition
from raynixl.native import PENDING, TIMEOUT


class StagedJob:
    """Ends exactly once, with one code; settled once the thread that worked for it has left its memory."""

    def __init__(self, timeout: float) -> None:
        self._deadline = time.monotonic() + max(0.0, timeout)
        self._changed = Condition()  # protects all below
        self._code = PENDING
        self._nbytes_done = 0
        self._settled = False
        self._armed: list[int] = []
        self.is_refused = False
        """Whether no thread took it, and none must any more: whoever posted it was told."""

    @property
    def code(self) -> int:
        """PENDING until it has ended; looking applies the deadline."""
        if self._code == PENDING and time.monotonic() >= self._deadline:
            self.end(TIMEOUT)
        return self._code

    @property
    def nbytes_done(self) -> int:
        """Bytes of the pieces that are complete."""
        return self._nbytes_done

    @property
    def settled(self) -> bool:
        """Whether it has ended and nothing touches its memory any more."""
        return self.code != PENDING and self._settled

    @property
    def left(self) -> float:
        """Seconds until its deadline, a moment at least."""
        return max(0.001, self._deadline - time.monotonic())

    def wait(self, timeout: float) -> bool:
        """Wait for the end. False at the timeout."""
        with self._changed:
            self._changed.wait_for(lambda: self._code != PENDING, min(max(0.0, timeout), self.left))
        return self.code != PENDING

    def wait_settled(self, timeout: float) -> bool:
        """Wait until nothing touches its memory any more. False at the timeout."""
        with self._changed:
            return self._changed.wait_for(lambda: self._settled, max(0.0, timeout))

    def cancel(self, code: int) -> bool:
        """End it with `code` unless it has ended."""
        if code < 2:
            raise ValueError("the code of a cancelled job is 2 or more")
        return self.end(code)

    def arm(self, fd: int) -> bool:
        """Have 1 written to a duplicate of the eventfd when it ends; False if it has."""
        with self._changed:
            if self._code != PENDING:
                return False
            self._armed.append(os.dup(fd))
            return True

    def count(self, nbytes: int) -> None:
        """Hear that more bytes are where they belong."""
        self._nbytes_done += nbytes

    def end(self, code: int) -> bool:
        """Set the code, unless there is one."""
        with self._changed:
            if self._code != PENDING:
                return False
            self._code = code
            armed, self._armed = self._armed, []
            self._changed.notify_all()
        for fd in armed:
            with contextlib.suppress(BlockingIOError):  # full, hence readable already
                os.eventfd_write(fd, 1)
            os.close(fd)
        return True

    def settle(self) -> None:
        """Hear that the thread that worked for it has left its memory."""
        with self._changed:
            self._settled = True
            self._changed.notify_all()
