"""Inboxes: messages that came in under one topic, waiting to be taken."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from raynixl.agents.waiters import Waiters
from raynixl.config import check_wait
from raynixl.errors import AgentClosed, RaynixlError, TransferTimeout
from raynixl.reactor import Reactor


@dataclass(frozen=True, slots=True)
class Notification:
    """Bytes from a peer; for a notification that followed a transfer, its data is visible here."""

    peer: str
    payload: bytes


class Inbox:
    """A queue of messages under one topic. Any thread or event loop may take from it; each message is taken once."""

    def __init__(self, topic: str, reactor: Reactor) -> None:
        self.topic = topic
        self._reactor = reactor
        self._queue: deque[Notification] = deque()
        self._waiters = Waiters()

    def __len__(self) -> int:
        return len(self._queue)

    def put(self, note: Notification) -> None:
        """Add a message and wake those who wait; called on the reactor's thread."""
        self._queue.append(note)
        self.wake()

    def wake(self) -> None:
        """Make asynchronous waiters look again."""
        self._waiters.wake()

    def take_now(self) -> Notification:
        """Take the next message without waiting.

        Raises:
            IndexError: none is here.
        """
        return self._queue.popleft()

    def drain(self) -> list[Notification]:
        """Take all messages that are here, without waiting."""
        notes = []
        while self._queue:
            try:
                notes.append(self._queue.popleft())
            except IndexError:  # another thread was faster
                break
        return notes

    def wait(self, timeout: float, *, check: Callable[[], RaynixlError | None] | None = None) -> Notification:
        """Take the next message, waiting for it; `check` may end the wait with an error, such as a lost peer.

        Raises:
            TransferTimeout: none came in time.
            AgentClosed: the agent was closed meanwhile.
            ConfigError: the timeout is no time.
        """
        found: list[RaynixlError] = []
        deadline = time.monotonic() + check_wait(timeout)

        def is_ready() -> bool:
            if self._queue:
                return True
            if check is None:
                return False
            error = check()
            if error is not None:
                found[:] = [error]
            return error is not None

        while True:
            try:
                return self._queue.popleft()
            except IndexError:
                ready = self._reactor.run_until(is_ready, deadline)
            if self._queue:
                continue
            if found:
                raise found[0]
            self._refuse_closed()
            if not ready or time.monotonic() > deadline:
                raise self._timeout(timeout)

    async def take(self, timeout: float, *, check: Callable[[], RaynixlError | None] | None = None) -> Notification:
        """Take the next message as `wait` does, from an event loop."""
        deadline = time.monotonic() + check_wait(timeout)
        while True:
            future = self._waiters.add()  # before looking: what comes after the look resolves it
            try:
                if self._queue:
                    return self._queue.popleft()
                error = check() if check is not None else None
                if error is not None:
                    raise error
                self._refuse_closed()
                await asyncio.wait_for(future, max(0.0, deadline - time.monotonic()))
            except IndexError:  # another taker was faster
                continue
            except TimeoutError as exc:
                if isinstance(exc, RaynixlError):
                    raise
                if not self._queue:
                    raise self._timeout(timeout) from None
            finally:
                self._waiters.discard(future)

    def _refuse_closed(self) -> None:
        if self._reactor.is_closed:
            raise AgentClosed("the agent was closed while waiting for a message")

    def _timeout(self, timeout: float) -> TransferTimeout:
        what = f"message under {self.topic!r}" if self.topic else "notification"
        return TransferTimeout(f"no {what} came within {timeout:g} s", hint="see whether the peer is alive")
