"""The acceptor: takes connections from listening sockets and has each newcomer prove who it is."""

from __future__ import annotations

import errno
import logging
import select
import socket
from collections.abc import Callable, Sequence

from raynixl.backends.base import Local
from raynixl.backends.forks import close_in_children
from raynixl.backends.greeting import MAX_STRANGERS, Newcomer
from raynixl.backends.wire import Wire

logger = logging.getLogger(__name__)

PAUSE_SECONDS = 0.2
_SHORTAGES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


class Acceptor:
    """Accepts on the reactor, bounds the strangers, and looks away while the process has no descriptors for them.

    Owns the listening sockets. `admit` gets each newcomer that has proved who it is, on the reactor's thread.
    """

    def __init__(
        self,
        local: Local,
        sockets: Sequence[socket.socket],
        *,
        wire: Callable[[socket.socket], Wire],
        probe: int,
        admit: Callable[[Newcomer], None],
    ) -> None:
        self._local = local
        self._sockets = list(sockets)
        self._wire = wire
        self._probe = probe
        self._admit = admit
        self._strangers: list[Newcomer] = []  # on the reactor's thread; the oldest first
        self.is_closed = False
        for one in self._sockets:
            one.setblocking(False)
            close_in_children(one)
            local.reactor.add(one.fileno(), lambda _mask, one=one: self._on_knock(one))  # type: ignore[misc]

    def close(self) -> None:
        """Stop listening and send the strangers away; idempotent."""
        if self.is_closed:
            return
        self.is_closed = True
        for one in self._sockets:
            self._local.reactor.remove(one.fileno())
            one.close()
        for newcomer in list(self._strangers):
            newcomer.refuse("closing")

    def _on_knock(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except OSError as exc:
            if exc.errno in _SHORTAGES:
                self._pause(exc)
            return  # whoever knocked has left, or the listener was closed
        self._strangers = [other for other in self._strangers if other.is_open]
        if len(self._strangers) >= MAX_STRANGERS:  # a friend greets within a millisecond: the slowest is none
            self._strangers.pop(0).refuse("too many at once")
        newcomer = Newcomer(self._local, self._wire(sock), self._probe, self._admit)
        self._strangers.append(newcomer)
        if self.is_closed:
            newcomer.refuse("closing")

    def _pause(self, error: OSError) -> None:
        """Look away from those who knock while there are no descriptors for them: epoll would ask again at once."""
        if self.is_closed:
            return
        logger.warning("agent %r cannot accept connections: %s", self._local.name, error)
        self._local.events.message_dropped("greeting: no descriptors")
        self._turn(0)
        self._local.reactor.call_later(PAUSE_SECONDS, lambda: self._turn(select.EPOLLIN))

    def _turn(self, events: int) -> None:
        if not self.is_closed:
            for one in self._sockets:
                self._local.reactor.modify(one.fileno(), events)
