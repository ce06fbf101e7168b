"""One run of a program of one-sided operations in ctypes.

Operations are posted without a callback, in batches of half a window: a flush behind each batch says by its callback
when to look at them. So UCX asks for the GIL once a batch, not once a row.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from raynixl.conditions import Condition
from raynixl.native import twin_ucp as ucp
from raynixl.native.codes import CANCELLED, CLOSED, DONE, LOST, PENDING, RESET, TIMEOUT
from raynixl.native.twin_job import deadline_after, fork_generation

if TYPE_CHECKING:
    from raynixl.native.twin_rma import Rma

__all__ = ["RmaJob"]

_PATIENCE = 100e-6  # how long a post stays with a transfer of which nothing is heard, in seconds
_STAY = 10e-3  # and how long in all
_ERRORS: Final = {
    ucp.NO_MEMORY: -errno.ENOMEM,
    ucp.UNSUPPORTED: -errno.EOPNOTSUPP,
    ucp.INVALID_ADDRESS: -errno.EFAULT,
}


class RmaJob:
    """One run of a program: owned by the one who posts it, then by its rail's thread; ends once, with one code."""

    def __init__(self, program: Rma, deadline: float) -> None:
        self._program = program
        self._deadline = deadline
        self._forks = fork_generation()
        self._ended = Condition()  # protects the end, and the descriptors armed for it
        self._code = PENDING
        self._armed: list[int] = []
        self.ended = math.inf
        self.is_settled = False
        self.is_handed_over = False
        # Of the owner:
        self._batches: deque[deque[int]] = deque()  # UCX's requests, oldest batch first
        self._cursor = 0
        self._completed = 0  # operations
        self._all_posted = False
        self._error = 0

    @property
    def code(self) -> int:
        """PENDING until it has ended; looking applies the deadline."""
        if self._code == PENDING:
            if self._is_forked:
                return CLOSED  # UCX is the parent's
            if time.monotonic() >= self._deadline:
                self._end(TIMEOUT)
        return self._code

    @property
    def nbytes_done(self) -> int:
        """Bytes of the operations that are complete, taken to be the first ones."""
        completed = min(self._completed, len(self._program.rows))
        return int(self._program.done_nbytes[completed - 1]) if completed else 0

    @property
    def settled(self) -> bool:
        """Whether it has ended and UCX has let go of the memory."""
        return self.code != PENDING and (self.is_settled or self._is_forked)

    def wait(self, timeout: float) -> bool:
        """Wait for the end; False at the timeout."""
        deadline = deadline_after(timeout)
        while self.code == PENDING:
            if not self._sleep(deadline, lambda: self._code != PENDING):
                return False
        return True

    def wait_settled(self, timeout: float) -> bool:
        """Wait until UCX has let go of the memory; False at the timeout."""
        deadline = deadline_after(timeout)
        while not self.settled:
            if not self._sleep(deadline, lambda: self.is_settled):
                return False
        return True

    def cancel(self, code: int) -> bool:
        """End it with `code` unless it has ended."""
        if code < 2:
            raise ValueError("the code of a cancelled job is 2 or more")
        return not self._is_forked and self._end(code)

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

    def start(self, is_inline: bool) -> None:
        """Post, see it through if it is quick, else leave it to the rail."""
        try:
            self.advance()
            if is_inline:
                self._see_through()
        except BaseException:  # Ctrl-C between two rows: a flush behind them still finds out when they are over
            self._end(CANCELLED)
            raise
        finally:
            if not self.is_settled:
                self._hand_over()

    def advance(self) -> None:
        """Take what has completed, and post more. Of the owner."""
        batches = self._batches
        while not self.is_settled:
            while batches and self._take(batches[0]):
                batches.popleft()
            if self._all_posted or len(batches) >= 2:
                break
            self._post_batch()
        if self._all_posted and not batches and not self.is_settled:
            self._settle()

    def apply_gates(self) -> None:
        """End it if a gate was closed with abort."""
        if closed := self._program.closed():
            self._end(closed)

    def reset(self) -> None:
        """Close its endpoints with RESET."""
        for endpoint in self._program.endpoints:
            endpoint.close(RESET)

    @property
    def _is_forked(self) -> bool:
        return self._forks != fork_generation()

    def _sleep(self, deadline: float, is_ready: Callable[[], bool]) -> bool:
        now = time.monotonic()
        if now >= deadline:
            return False
        left = min(deadline, self._deadline if now < self._deadline else math.inf) - now
        with self._ended:
            self._ended.wait_for(is_ready, min(left, threading.TIMEOUT_MAX))
        return True

    def _see_through(self) -> None:
        now = time.monotonic()
        quiet, until = now + _PATIENCE, now + _STAY
        while not self.is_settled and now < min(quiet, until):
            events = sum([rail.progress() for rail in self._program.rails])
            self.advance()
            now = time.monotonic()
            if events:
                quiet = now + _PATIENCE

    def _hand_over(self) -> None:
        program = self._program
        bells: deque[int] = deque()
        self._batches.append(bells)
        if self._enter_endpoints():
            self._flush(bells, program.ringing_flush)
            self._leave_endpoints()
        for rail in program.rails:
            rail.signal()
        self.is_handed_over = True  # from here on the rail may be closed at any time
        program.rails[0].adopt(self)

    def _take(self, requests: deque[int]) -> bool:
        """Let go of the requests that are complete, in order; whether all are."""
        library = self._program.rails[0].ucp
        while requests:
            status = library.check_status(requests[0])
            if status == ucp.IN_PROGRESS:
                return False
            library.request_free(requests.popleft())
            if status != ucp.OK:
                self._failed(status)
            self._completed += 1
        return True

    def _post_batch(self) -> None:
        program = self._program
        requests: deque[int] = deque()
        self._batches.append(requests)
        if not self._enter_endpoints():
            self._all_posted = True
            return
        try:
            self._post_rows(requests)
            if self.is_handed_over:
                self._flush(requests, program.ringing_flush)
            elif self._all_posted and program.is_write and self._cursor > 0:
                # Also after an error: what has left this process must have landed before it is over.
                self._flush(requests, program.flush)
        finally:
            self._leave_endpoints()
        if self.is_handed_over:
            for rail in program.rails:
                rail.signal()

    def _post_rows(self, requests: deque[int]) -> None:
        program = self._program
        library = program.rails[0].ucp
        post, keep = library.put_nbx if program.is_write else library.get_nbx, requests.append
        ways = [
            (key.endpoint, key.endpoint.handle, key.handle, ctypes.addressof(param))
            for (_, key), param in zip(program.paths, program.params, strict=True)
        ]
        for path, local, remote, nbytes in program.rows[self._cursor : self._cursor + program.batch].tolist():
            endpoint, ep, rkey, param = ways[path]
            if endpoint.code != 0:
                self._fail(endpoint.code)
            if self._error != 0 or self._code != PENDING:
                self._all_posted = True
                return
            self._cursor += 1
            result = post(ep, local, nbytes, remote, rkey, param)
            if result is None:
                self._completed += 1
            elif result < ucp.FIRST_ERROR:
                keep(result)
            else:
                self._completed += 1
                self._failed(ucp.error_of(result))
        self._all_posted = self._cursor == len(program.rows)

    def _flush(self, requests: deque[int], param: ucp.RequestParam) -> None:
        for endpoint in self._program.endpoints:
            if endpoint.code != 0:
                self._fail(endpoint.code)
                continue
            result = endpoint.rail.ucp.ep_flush_nbx(endpoint.handle, ctypes.addressof(param))
            if result is None:
                continue
            if result < ucp.FIRST_ERROR:
                requests.append(result)
            else:
                self._failed(ucp.error_of(result))

    def _enter_endpoints(self) -> bool:
        endpoints = self._program.endpoints
        for i, endpoint in enumerate(endpoints):
            if code := endpoint.enter():
                for entered in endpoints[:i]:
                    entered.leave()
                self._fail(code)
                return False
        return True

    def _leave_endpoints(self) -> None:
        for endpoint in self._program.endpoints:
            endpoint.leave()

    def _failed(self, status: int) -> None:
        """Hear an error of UCX. What an endpoint that we closed says is not UCX's word but ours."""
        endpoints = self._program.endpoints
        code = next((endpoint.code for endpoint in endpoints if endpoint.code), _ERRORS.get(status, LOST))
        if code == LOST:
            for endpoint in endpoints:
                endpoint.failed(status)
        self._fail(code)

    def _fail(self, code: int) -> None:
        """The first error is the one that counts."""
        if self._error == 0:
            self._error = code

    def _settle(self) -> None:
        self._program.leave()
        with self._ended:
            self.is_settled = True
            self._ended.notify_all()
        self._announce(self._error if self._error != 0 else DONE)
        self._program.rails[0].retire(self)

    def _end(self, code: int) -> bool:
        if not self._announce(code):
            return False
        self._program.rails[0].ring()  # if UCX does not let go of it soon, its endpoints are reset
        return True

    def _announce(self, code: int) -> bool:
        with self._ended:
            if self._code != PENDING:
                return False
            self.ended = time.monotonic()
            self._code = code
            armed, self._armed = self._armed, []
            self._ended.notify_all()
        for fd in armed:
            with contextlib.suppress(BlockingIOError):  # full, hence readable already
                os.eventfd_write(fd, 1)
            os.close(fd)
        return True
