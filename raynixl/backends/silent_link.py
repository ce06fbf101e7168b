"""Links of backends that carry no messages: they live and die with the connection that the agent has otherwise."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from raynixl.backends.base import Local
from raynixl.errors import BackendUnavailable, RaynixlError
from raynixl.record import AgentRecord


class SilentLink:
    """Says which incarnation of which peer bindings belong to. There is nothing at its other end.

    Whether the peer lives is known to the link that carries its messages; the agent closes both together.
    """

    def __init__(self, local: Local, record: AgentRecord, *, backend: str) -> None:
        self.backend = backend
        self.peer = record.name
        self.incarnation = record.incarnation
        self.process = record.pid
        """The peer's process, by which a backend finds it where both are one process; no claim that it lives."""
        self.lost: RaynixlError | None = None
        self._local = local
        self._lock = threading.Lock()  # protects lost: it is reported once

    def __repr__(self) -> str:
        return f"SilentLink({self.backend!r}, {self.peer!r}, {self.lost or 'open'})"

    def send(self, message: bytes, fds: Sequence[int] = ()) -> None:
        """Refuse: messages go over the agent's other link with the peer."""
        raise BackendUnavailable(
            f"{self.backend} carries no messages", hint="add shm or another backend that does", peer=self.peer
        )

    def flushed(self) -> bool:
        """Nothing is ever held back."""
        return True

    def is_frozen(self) -> bool:
        """Only the link that carries messages can tell."""
        return False

    def close(self, error: RaynixlError | None = None) -> None:
        """Close, and report it once."""
        reason = error or RaynixlError(f"the link with {self.peer!r} was closed", peer=self.peer)
        with self._lock:
            is_first, self.lost = self.lost is None, self.lost or reason
        if is_first and not self._local.reactor.is_closed:
            self._local.reactor.call_soon(lambda: self._local.events.link_lost(self, reason))
