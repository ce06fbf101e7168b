"""The watcher: sees to the end of transfers that no thread waits for (awaited ones, and those with a notification)."""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING

from raynixl.reactor import Reactor, Timer

if TYPE_CHECKING:
    from raynixl.agents.transfer import Transfer


class Watcher:
    """Looks at watched transfers whenever one of their jobs ends, a link moves on, or a deadline comes."""

    def __init__(self, reactor: Reactor) -> None:
        self._reactor = reactor
        self._lock = threading.Lock()  # protects _transfers, _is_closed
        self._transfers: dict[Transfer, Timer] = {}  # with the timer of its deadline
        self._is_closed = False
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        reactor.add(self._bell, self._on_bell)

    def add(self, transfer: Transfer) -> None:
        """Watch a transfer until it ends. Called again when a transfer has got its jobs."""
        with self._lock:
            if self._is_closed:
                return
            if transfer not in self._transfers:
                delay = max(0.0, transfer.deadline - time.monotonic()) + 0.001
                self._transfers[transfer] = self._reactor.call_later(delay, self.look)
            for job in transfer.jobs:
                job.arm(self._bell)
        self._reactor.call_soon(self.look)

    def look(self) -> None:
        """Move every watched transfer on; forget those that have ended."""
        with self._lock:
            transfers = list(self._transfers)
        ended = [transfer for transfer in transfers if transfer.done]
        if ended:
            with self._lock:
                for transfer in ended:
                    timer = self._transfers.pop(transfer, None)
                    if timer is not None:
                        timer.cancel()

    def close(self) -> None:
        """Look a last time and let go; the reactor is closed, and every transfer has ended or will be ended."""
        self.look()
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            self._transfers.clear()
            os.close(self._bell)

    def _on_bell(self, _mask: int) -> None:
        try:
            os.eventfd_read(self._bell)
        except BlockingIOError:
            return
        self.look()
