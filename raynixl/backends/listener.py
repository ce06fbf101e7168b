"""The TCP sockets of an agent that peers on the network connect to, and how to connect to those of a peer."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import socket
import time
from collections.abc import Callable, Sequence

from raynixl.backends.acceptor import Acceptor
from raynixl.backends.base import Local
from raynixl.backends.greeting import Newcomer
from raynixl.backends.wire import StreamWire
from raynixl.errors import BackendUnavailable, ConfigError, PeerLost, TransferTimeout

logger = logging.getLogger(__name__)

Endpoint = tuple[str, int]
"""An address in numbers, and a port."""

BACKLOG = 1024
HEAD_START = 0.25
"""Seconds that an address has for itself before the next is tried beside it (RFC 8305 says so, too)."""
_TRIES = 16
_BUSY = frozenset({errno.EADDRINUSE, errno.EACCES})


class Listener:
    """Listens on one or more addresses, on one port number if they all have it free, and greets who connects."""

    def __init__(
        self,
        local: Local,
        *,
        hosts: Sequence[str],
        port: int,
        admit: Callable[[Newcomer], None],
        probe: int = 0,
    ) -> None:
        sockets = _listen(hosts, port)
        self.endpoints: list[Endpoint] = [(host, one.getsockname()[1]) for host, one in sockets.items()]
        self._acceptor = Acceptor(local, list(sockets.values()), wire=StreamWire, probe=probe, admit=admit)

    def __repr__(self) -> str:
        return f"Listener({', '.join(f'{host} port {port}' for host, port in self.endpoints)})"

    @property
    def is_closed(self) -> bool:
        """Whether close was called."""
        return self._acceptor.is_closed

    def close(self) -> None:
        """Stop listening and send away who has not proved himself yet; idempotent."""
        self._acceptor.close()


def dial(endpoints: Sequence[Endpoint], *, peer: str, deadline: float) -> socket.socket:
    """Connect to a peer at whichever of its addresses answers first, by the monotonic deadline.

    An address that says nothing delays the next by HEAD_START only; one that refuses, not at all.

    Raises:
        PeerLost: every address refuses.
        TransferTimeout: none has answered in time.
        BackendUnavailable: this process has no descriptor left for a socket.
    """
    race = _Race(endpoints, peer)
    try:
        while race.winner is None:
            race.run(deadline)
        return race.winner
    finally:
        race.close()


class _Race:
    """Connections that are tried beside each other until one stands."""

    def __init__(self, endpoints: Sequence[Endpoint], peer: str) -> None:
        self.winner: socket.socket | None = None
        self._peer = peer
        self._waiting = list(dict.fromkeys(endpoints))
        self._running: dict[int, tuple[socket.socket, Endpoint]] = {}
        self._said: dict[Endpoint, str] = {}
        self._next_start = 0.0
        self._poll = select.poll()

    def run(self, deadline: float) -> None:
        """Start the next if it is its turn, then wait for something to happen."""
        now = time.monotonic()
        if self._waiting and (not self._running or now >= self._next_start):
            self._next_start = now + HEAD_START
            self._start(self._waiting.pop(0))
            return
        if not self._running:
            raise PeerLost(f"peer {self._peer!r} answers at none of its addresses: {self._report()}", peer=self._peer)
        if now >= deadline:
            raise TransferTimeout(f"peer {self._peer!r} did not answer in time: {self._report()}", peer=self._peer)
        until = min(deadline, self._next_start) if self._waiting else deadline
        for fd, _ in self._poll.poll(max(0.0, until - now) * 1000 + 1):
            self._finish(fd)

    def close(self) -> None:
        """Give up every connection but the winner."""
        for sock, _ in self._running.values():
            sock.close()
        self._running.clear()

    def _start(self, endpoint: Endpoint) -> None:
        try:
            family, target = _resolve(endpoint)
            sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        except OSError as exc:
            if exc.errno in (errno.EMFILE, errno.ENFILE):
                raise BackendUnavailable(
                    f"no socket for peer {self._peer!r}: {exc.strerror}", hint="raise ulimit -n", peer=self._peer
                ) from exc
            self._said[endpoint] = str(exc.strerror)
            return
        code = sock.connect_ex(target)
        if code not in (0, errno.EINPROGRESS):
            self._fail(sock, endpoint, code)
            return
        self._running[sock.fileno()] = (sock, endpoint)
        self._poll.register(sock, select.POLLOUT)

    def _finish(self, fd: int) -> None:
        """Hear how one attempt ended."""
        if self.winner is not None:
            return
        sock, endpoint = self._running.pop(fd)
        self._poll.unregister(fd)
        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code == 0 and _is_own_echo(sock):
            code = errno.ECONNREFUSED
        if code:
            self._fail(sock, endpoint, code)
        else:
            self.winner = sock

    def _fail(self, sock: socket.socket, endpoint: Endpoint, code: int) -> None:
        sock.close()
        self._said[endpoint] = os.strerror(code)
        self._next_start = 0.0

    def _report(self) -> str:
        """Say what each address said."""
        tried = {endpoint: "no answer" for _, endpoint in self._running.values()}
        untried = dict.fromkeys(self._waiting, "not tried")
        said = self._said | tried | untried
        return ", ".join(f"{host} port {port} ({what})" for (host, port), what in said.items()) or "it names none"


def _is_own_echo(sock: socket.socket) -> bool:
    """Whether TCP has joined the socket with itself, as it may where nobody listens on a port of this host."""
    try:
        return bool(sock.getsockname() == sock.getpeername())
    except OSError:  # reset a moment ago: what comes next will say so
        return False


def _resolve(endpoint: Endpoint) -> tuple[int, tuple[str, int] | tuple[str, int, int, int]]:
    """Return family and socket address; never asks a name server.

    Raises:
        OSError: it is no address and port.
    """
    host, port = endpoint
    if not 0 <= port < 1 << 16:
        raise OSError(errno.EINVAL, "no port")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except ValueError as exc:
        raise OSError(errno.EINVAL, "no address") from exc
    family, _, _, _, target = found[0]
    return family, target  # type: ignore[return-value]


def _listen(hosts: Sequence[str], port: int) -> dict[str, socket.socket]:
    """Return a listening socket for each address that exists here: on `port`, or on one that they all have free.

    Raises:
        ConfigError: `port` cannot be had.
        BackendUnavailable: none of the addresses can be listened on.
    """
    for _ in range(_TRIES):
        try:
            return _listen_on_one_port(hosts, port)
        except OSError as exc:
            if port:
                raise ConfigError(
                    f"port {port} cannot be had on {', '.join(hosts)}: {exc.strerror}",
                    hint="choose another AgentConfig.listen_port, or 0 for any",
                ) from exc
    sockets: dict[str, socket.socket] = {}
    for host in hosts:  # some of which exist: their ports were taken
        with contextlib.suppress(BackendUnavailable):
            sockets.update(_listen_on_one_port([host], 0))
    return sockets


def _listen_on_one_port(hosts: Sequence[str], port: int) -> dict[str, socket.socket]:
    """Listen on each address; those that this host lacks by now are left out.

    Raises:
        OSError: the port is taken.
        BackendUnavailable: none of the addresses can be listened on.
    """
    sockets: dict[str, socket.socket] = {}
    failures: dict[str, str] = {}
    try:
        for host in dict.fromkeys(hosts):
            try:
                sockets[host] = _listen_on(host, port)
            except OSError as exc:
                if exc.errno in _BUSY:
                    raise
                failures[host] = str(exc.strerror)
                logger.warning("cannot listen on %s: %s", host, exc.strerror)
            else:
                port = sockets[host].getsockname()[1]
    except BaseException:
        for one in sockets.values():
            one.close()
        raise
    if not sockets:
        said = ", ".join(f"{host} ({what})" for host, what in failures.items()) or "none was given"
        raise BackendUnavailable(f"no address to listen on: {said}", hint="see AgentConfig.interfaces")
    return sockets


def _listen_on(host: str, port: int) -> socket.socket:
    family, target = _resolve((host, port))
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        # Both an earlier process's sockets and this one must say so, for its port to be had while connections linger.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:  # IPv4 addresses have sockets of their own
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(target)
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock
