"""Gates and jobs of the ctypes twin: who is inside a region's memory, and one run of a program.

Ctrl-C may be raised wherever a function begins, a loop goes round or a call of C returns. Wherever that is, no lock
stays held, and a gate that was entered is left: whoever enters notes it in a list, and may leave by it twice.
"""

from __future__ import annotations

import math
import os
import threading
import time
from typing import Protocol

from raynixl.conditions import Condition
from raynixl.native.codes import CANCELLED, CLOSED, DONE, PENDING, TIMEOUT

__all__ = ["Gate", "Job", "deadline_after", "fork_generation", "leave_gates"]

_forks = 0
_WORDS = 1 << 64


def _count_fork() -> None:
    global _forks
    _forks += 1


os.register_at_fork(after_in_child=_count_fork)


def fork_generation() -> int:
    """How often this process was forked off its ancestors: threads and locks of an older count are gone."""
    return _forks


def deadline_after(timeout: float) -> float:
    """Return `timeout` seconds from now on the monotonic clock; negative and NaN count as now."""
    return time.monotonic() + (timeout if timeout > 0 else 0.0)


class Work(Protocol):
    """What a job copies: pieces, behind gates."""

    @property
    def pieces(self) -> int:
        """How many pieces there are."""

    def piece_nbytes(self, piece: int) -> int:
        """Bytes of one piece."""

    def copy(self, piece: int) -> int:
        """Copy one piece; return 0 or -errno."""

    def digest(self, piece: int, shift: int, seed: int) -> tuple[int, int]:
        """Return the digest of a piece; see native.Digesting."""

    def closed(self) -> int:
        """Return the code of the first gate whose closing stops those inside, else 0."""


class Crew(Protocol):
    """Whose threads carry jobs out."""

    def wake(self) -> None:
        """Hear that a place has become free while pieces remain."""

    def retire(self, job: Job) -> None:
        """Hear that a job has ended."""

    def settled(self, job: Job) -> None:
        """Hear that nobody copies for a job any more."""

    def expire(self, now: float) -> None:
        """End the jobs whose deadline has passed."""


class Gate:
    """The door through which every operation enters a region's memory."""

    __slots__ = ("_aborted", "_changed", "_code", "_inside")

    def __init__(self) -> None:
        self._changed = Condition()  # protects all below
        self._code = 0
        self._aborted = 0
        self._inside = 0

    def close(self, code: int, *, abort: bool = True) -> None:
        """Refuse every later entry with `code`; the first code stays. Those inside stop soon if `abort`."""
        if not 2 <= code < 1 << 29:
            raise ValueError("the code of a closed gate is 2 or more")
        with self._changed:
            if self._code == 0:
                self._code = code
            if abort:
                self._aborted = self._code

    def drain(self, timeout: float) -> bool:
        """Wait until nobody is inside; False at the timeout."""
        with self._changed:
            limit = min(timeout, threading.TIMEOUT_MAX) if timeout > 0 else 0.0
            return self._changed.wait_for(lambda: self._inside == 0, limit)

    @property
    def code(self) -> int:
        """The code it was closed with; 0 while it is open."""
        return self._code

    @property
    def inflight(self) -> int:
        """How many operations are inside."""
        return self._inside

    @property
    def aborted(self) -> int:
        """The code if those inside are to stop, else 0."""
        return self._aborted

    def enter(self, entered: list[Gate] | None = None) -> int:
        """Count the caller in, and note that in a list; return 0, or the code that refuses it."""
        with self._changed:
            if self._code == 0:
                self._inside += 1
                if entered is not None:
                    entered.append(self)
            return self._code

    def leave(self, entered: list[Gate] | None = None) -> None:
        """Count the caller out, and take the gate from the end of the list."""
        with self._changed:
            if self._inside == 1:
                self._changed.notify_all()
            self._inside -= 1
            if entered is not None:
                entered.pop()


def leave_gates(entered: list[Gate]) -> None:
    """Leave the gates of a list, which is empty then; after an interrupt it can be called again."""
    while entered:
        entered[-1].leave(entered)


class Job:
    """One run of a program by several threads; ends exactly once, with one code."""

    def __init__(
        self, engine: Crew, program: Work, entered: list[Gate], deadline: float, digest: tuple[int, int] | None
    ) -> None:
        self.participants = 1
        self._engine = engine
        self._program = program
        self._entered = entered
        self._deadline = deadline
        self._forks = _forks
        self._wish = digest
        self._ended = Condition()  # protects all below
        self._code = PENDING
        self._inside = 0
        self._cursor = 0
        self._pieces_done = 0
        self._nbytes_done = 0
        self._digest = (0, 0)
        self._settled = False
        self._armed: list[int] = []

    @property
    def code(self) -> int:
        """PENDING until it has ended; looking applies the deadline."""
        if self._code == PENDING:
            if self._forks != _forks:
                self._code = CLOSED  # our threads stayed in the parent
            elif time.monotonic() >= self._deadline:
                self._end(TIMEOUT)
        return self._code

    @property
    def nbytes_done(self) -> int:
        """Bytes of the pieces that are complete."""
        return self._nbytes_done

    @property
    def digest(self) -> tuple[int, int] | None:
        """The digest of all that it has copied; None if none was wanted."""
        return None if self._wish is None else self._digest

    @property
    def settled(self) -> bool:
        """Whether it has ended and nobody copies for it any more."""
        return self.code != PENDING and (self._settled or self._forks != _forks)

    @property
    def deadline(self) -> float:
        """When it ends with TIMEOUT, on the monotonic clock."""
        return self._deadline

    def wait(self, timeout: float) -> bool:
        """Wait for the end, copying meanwhile if a participant's place is free."""
        deadline = deadline_after(timeout)
        while self.code == PENDING:
            if time.monotonic() >= deadline:
                return False
            if self.participate(deadline):
                continue
            left = min(deadline, self._deadline) - time.monotonic()
            with self._ended:
                self._ended.wait_for(lambda: self._code != PENDING, max(0.0, min(left, threading.TIMEOUT_MAX)))
        return True

    def wait_settled(self, timeout: float) -> bool:
        """Wait until it has ended and nobody copies for it any more, without helping."""
        deadline = deadline_after(timeout)
        while not self.settled:
            now = time.monotonic()
            if now >= deadline:
                return False
            left = min(deadline, self._deadline if now < self._deadline else math.inf) - now
            with self._ended:
                self._ended.wait_for(lambda: self._settled, max(0.0, min(left, threading.TIMEOUT_MAX)))
        return True

    def cancel(self, code: int) -> bool:
        """End it with `code` unless it has ended."""
        if code < 2:
            raise ValueError("the code of a cancelled job is 2 or more")
        return self._forks == _forks and self._end(code)

    def arm(self, fd: int) -> bool:
        """Have 1 written to a duplicate of the eventfd when it ends; False if it has."""
        if self.code != PENDING:
            return False
        duplicate = os.dup(fd)
        with self._ended:
            if self._code == PENDING:
                self._armed.append(duplicate)
                return True
        os.close(duplicate)
        return False

    def has_place(self) -> bool:
        """Whether another thread could help."""
        return self._code == PENDING and self._inside < self.participants and self._cursor < self._program.pieces

    def participate(self, deadline: float) -> bool:
        """Copy pieces until none is left or the deadline passes; False if there is no place."""
        taken: list[int] = []
        try:
            if not self._take_place(taken):
                return False
            self._work(deadline)
        except BaseException:  # Ctrl-C in a waiter: its piece is half done, and nobody will do it again
            self._end(CANCELLED)
            raise
        finally:
            if taken:
                try:
                    self._leave(taken)
                except BaseException:  # Ctrl-C here
                    self._leave(taken)
                    raise
        return True

    def _take_place(self, taken: list[int]) -> bool:
        with self._ended:
            if self._forks != _forks or not self.has_place():
                return False
            self._inside += 1
            taken.append(1)
            return True

    def _work(self, deadline: float) -> None:
        while self._code == PENDING:
            now = time.monotonic()
            if now >= self._deadline:
                self._end(TIMEOUT)
                return
            if now >= deadline:
                return
            self._engine.expire(now)
            if closed := self._program.closed():
                self._end(closed)
                return
            with self._ended:
                piece, self._cursor = self._cursor, self._cursor + 1
            if piece >= self._program.pieces:
                return
            if error := self._program.copy(piece):
                self._end(error)
                return
            found = (0, 0) if self._wish is None else self._program.digest(piece, *self._wish)
            with self._ended:
                self._digest = ((self._digest[0] + found[0]) % _WORDS, (self._digest[1] + found[1]) % _WORDS)
                self._pieces_done += 1
                self._nbytes_done += self._program.piece_nbytes(piece)

    def _leave(self, taken: list[int]) -> None:
        """Give a place back, and end the job if that was all; after an interrupt it can be called again."""
        with self._ended:
            if taken:
                self._inside -= 1
                taken.pop()
            pending = self._code == PENDING
            done = pending and self._inside == 0 and self._pieces_done == self._program.pieces
            if done:
                self._finish(DONE)
            elif not pending:
                self._settle()
            unfinished = self._cursor < self._program.pieces
        if self._code != PENDING:
            self._announce()
        elif unfinished:
            self._engine.wake()

    def _end(self, code: int) -> bool:
        with self._ended:
            if self._code != PENDING:
                return False
            self._finish(code)
        self._announce()
        return True

    def _finish(self, code: int) -> None:
        """Set the code, under the lock; the gates are left before anyone can see it if nobody is inside."""
        self._settle()
        self._ended.notify_all()
        self._code = code

    def _settle(self) -> None:
        if self._inside == 0 and not self._settled:
            leave_gates(self._entered)
            self._engine.settled(self)
            self._ended.notify_all()
            self._settled = True

    def _announce(self) -> None:
        with self._ended:
            armed, self._armed = self._armed, []
        for fd in armed:
            try:
                os.eventfd_write(fd, 1)
            except BlockingIOError:  # full, hence readable already
                pass
            finally:
                os.close(fd)
        self._engine.retire(self)
