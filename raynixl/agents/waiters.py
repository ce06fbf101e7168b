"""Waiters: coroutines, of any number of event loops, that wait for what a thread brings about."""

from __future__ import annotations

import asyncio
import contextlib


class Waiters:
    """Futures to be resolved together. Any thread may wake; loops may be closed meanwhile."""

    __slots__ = ("_futures",)

    def __init__(self) -> None:
        self._futures: dict[asyncio.Future[None], asyncio.AbstractEventLoop] = {}

    def __len__(self) -> int:
        return len(self._futures)

    def add(self) -> asyncio.Future[None]:
        """Return a future of the running loop that the next `wake` resolves."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        self._futures[future] = loop
        return future

    def discard(self, future: asyncio.Future[None]) -> None:
        """Forget a future that nobody awaits any more."""
        self._futures.pop(future, None)

    def wake(self) -> None:
        """Resolve every future that is here."""
        while self._futures:
            try:
                future, loop = self._futures.popitem()
            except KeyError:  # another thread was faster
                return
            with contextlib.suppress(RuntimeError):  # the loop was closed: nobody waits there
                loop.call_soon_threadsafe(_resolve, future)


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
