"""Replies: the answer to one request, when it has come."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING

from raynixl.agents.waiters import Waiters
from raynixl.config import check_wait
from raynixl.errors import AgentClosed, RaynixlError, TransferTimeout

if TYPE_CHECKING:
    from raynixl.agents.connection import Connection
    from raynixl.reactor import Reactor

_HAND_OVER_SECONDS = 1.0
"""An answer that was taken off the list of those expected is being handed over: that takes microseconds."""


class Reply:
    """The answer to one request: `wait(timeout=)` or `await`; any thread, any event loop, any number of times."""

    __slots__ = (
        "_deadline", "_error", "_forget", "_is_given_up", "_payload", "_reactor", "_seconds", "_waiters", "connection",
        "fds", "takes_fds", "topic",
    )  # fmt: skip

    def __init__(
        self,
        reactor: Reactor,
        connection: Connection,
        topic: str,
        *,
        timeout: float,
        forget: Callable[[], bool],
        takes_fds: bool = False,
    ) -> None:
        self.connection = connection
        self.topic = topic
        self.fds: list[int] = []
        self.takes_fds = takes_fds
        self._is_given_up = False
        self._reactor = reactor
        self._forget = forget
        self._seconds = timeout
        self._deadline = time.monotonic() + timeout
        self._payload: bytes | None = None
        self._error: RaynixlError | None = None
        self._waiters = Waiters()

    def __repr__(self) -> str:
        state = "here" if self._is_here() else "expected"
        return f"Reply({self.topic!r} from {self.connection.name!r}, {state})"

    @property
    def done(self) -> bool:
        """Whether an answer or an error is here, or the deadline has passed."""
        return self._is_here() or self.is_overdue(time.monotonic())

    def is_overdue(self, now: float) -> bool:
        """Whether the deadline has passed."""
        return now > self._deadline

    def wait(self, timeout: float | None = None) -> bytes:
        """Return the answer. `timeout` bounds this wait, not the request: wait again if it passes.

        Raises:
            TransferTimeout: none came in time.
            PeerLost: the peer went away first.
            RaynixlError: what the peer's handler raised.
        """
        until = self._deadline if timeout is None else min(self._deadline, time.monotonic() + check_wait(timeout))
        self._reactor.run_until(self._is_here, until)
        if not self._is_here() and time.monotonic() >= self._deadline and not self._expire():
            self._reactor.run_until(self._is_here, time.monotonic() + _HAND_OVER_SECONDS)
        return self._result(timeout)

    def give_up(self) -> None:
        """Want no answer any more; descriptors that came with it, or come yet, are closed."""
        self._is_given_up = True
        self._forget()
        self._close_fds()

    def __await__(self) -> Generator[object, None, bytes]:
        """Return the answer, from an event loop."""
        if not self._is_here():
            yield from self._arrival().__await__()
        return self._result(None)

    async def _arrival(self) -> None:
        if not await self._arrives(self._deadline - time.monotonic()) and not self._expire():
            await self._arrives(_HAND_OVER_SECONDS)

    async def _arrives(self, seconds: float) -> bool:
        future = self._waiters.add()
        try:
            if not self._is_here() and not self._reactor.is_closed:
                await asyncio.wait_for(future, max(0.0, seconds))
        except TimeoutError:
            return self._is_here()
        finally:
            self._waiters.discard(future)
        return True

    def _expire(self) -> bool:
        """Expect an answer no more, as the deadline has passed; False if one is being handed over just now."""
        if not self._forget():
            return False
        self.resolve(None, self.overdue())
        return True

    def _is_here(self) -> bool:
        return self._payload is not None or self._error is not None

    def _result(self, timeout: float | None) -> bytes:
        if self._error is not None:
            raise self._error
        if self._payload is not None:
            return self._payload
        if self._reactor.is_closed:
            raise AgentClosed("the agent was closed while waiting for an answer")
        raise self.overdue() if timeout is None else self._late(timeout)

    def overdue(self) -> TransferTimeout:
        """Return the error of a request whose deadline passed."""
        return self._late(self._seconds)

    def _late(self, seconds: float) -> TransferTimeout:
        return TransferTimeout(
            f"peer {self.connection.name!r} did not answer {self.topic!r} within {seconds:g} s",
            hint="it is frozen or overloaded", peer=self.connection.name,
        )  # fmt: skip

    def resolve(self, payload: bytes | None, error: RaynixlError | None = None, fds: Sequence[int] = ()) -> None:
        """Take the answer; called once, by whoever took the reply off the list of those expected."""
        self.fds.extend(fds)
        if self._is_given_up:
            self._close_fds()
        self._payload, self._error = payload, error
        self._waiters.wake()

    def _close_fds(self) -> None:
        while self.fds:
            try:
                os.close(self.fds.pop())
            except IndexError:  # the thread that hands the answer over has closed them
                return
