"""What the links over sockets share: their end, the process at the other end, and a bounded backlog."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from raynixl.backends.base import Local
from raynixl.backends.forks import close_in_children
from raynixl.errors import PeerLost, RaynixlError
from raynixl.host import is_ending, is_frozen

_READABLE = select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR

Piece = tuple[bytes | memoryview, Sequence[int]]
"""What goes into the socket in one call: bytes, and file descriptors beside them."""


class BaseLink(ABC):
    """One authenticated connection with a peer. Any thread may send; what comes in is the reactor's.

    What the kernel does not take at once waits in a bounded backlog that the reactor flushes.
    """

    backend: str

    def __init__(self, local: Local, sock: socket.socket, *, peer: str, incarnation: str, pid: int) -> None:
        self.peer = peer
        self.incarnation = incarnation
        self.pid = pid
        self.lost: RaynixlError | None = None
        self.has_hung_up = False
        """Whether the other end said itself that it is over: its process has ended, or its agent."""
        self._local = local
        self._sock = sock
        self._fd = sock.fileno()
        self._lock = threading.Lock()  # protects _backlog, _backlog_nbytes, _pidfd and the order of what is sent
        self._backlog: deque[tuple[bytes | memoryview, list[int]]] = deque()
        self._backlog_nbytes = 0
        self._has_unsent = False  # of a link that is gone: what it held back never left
        self._said_bye = False
        self._pidfd = -1
        close_in_children(sock)

    def __repr__(self) -> str:
        state = "open" if self.lost is None else f"lost: {self.lost}"
        return f"{type(self).__name__}({self.peer!r}, pid={self.pid}, {state})"

    def open(self) -> None:
        """Start to receive."""
        self._sock.setblocking(False)
        with self._lock:  # a peer that dies now is heard at once, and its link must not end half open
            if self.pid:
                self._watch()
            self._local.reactor.add(self._fd, self._on_event)

    def flushed(self) -> bool:
        """Whether all that was sent has left this process; what a lost link held back never does."""
        return not self._backlog and not self._has_unsent

    def is_frozen(self) -> bool:
        """Whether the peer's process is stopped."""
        return is_frozen(self.pid)

    def has_ended(self) -> bool:
        """Whether the other end has hung up, on the reactor's thread; if so, take what it still said, and close."""
        if self.lost is None:
            poll = select.poll()
            poll.register(self._fd, select.POLLRDHUP)
            if poll.poll(0):
                self._on_death(0)
        return self.lost is not None

    @property
    def has_let_go(self) -> bool:
        """Whether the peer has announced its end: it does so when nothing of it is under way in our memory any more."""
        return self._said_bye

    def say_bye(self) -> None:
        """Note that the peer announced its end."""
        self._said_bye = True

    def close(self, error: RaynixlError | None = None) -> None:
        """Close; the agent hears of it on the reactor's thread."""
        with self._lock:
            if self.lost is not None:
                return
            self.lost = error or PeerLost(f"the connection to {self.peer!r} was closed", peer=self.peer)
        if self._local.reactor.is_closed:
            self._let_go()
            return
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._local.reactor.call_soon(self._finish)

    @abstractmethod
    def send(self, message: bytes, fds: Sequence[int] = ()) -> None:
        """Send one message, or queue what the kernel does not take."""

    @abstractmethod
    def _transmit(self, data: bytes | memoryview, fds: Sequence[int]) -> int:
        """Put into the socket what it takes; return how many bytes, 0 for none. Whatever is left comes again."""

    @abstractmethod
    def _receive(self) -> bool:
        """Take what one call brings, on the reactor's thread; return whether there was anything."""

    def _post(self, nbytes: int, pieces: Iterable[Piece]) -> None:
        """Send the pieces of one message of so many bytes; none, if too much waits already."""
        with self._lock:
            if self.lost is not None:
                raise PeerLost(f"peer {self.peer!r} is lost: {self.lost}", peer=self.peer)
            self._check_room(nbytes)
            for data, fds in pieces:
                taken = 0 if self._backlog else self._try_transmit(data, fds)
                if taken < len(data):
                    self._queue(data[taken:], fds)

    def _try_transmit(self, data: bytes | memoryview, fds: Sequence[int]) -> int:
        try:
            return self._transmit(data, fds)
        except BlockingIOError:
            return 0
        except OSError as exc:
            self._local.reactor.call_soon(lambda: self._on_death(0))
            raise PeerLost(f"peer {self.peer!r} is gone: {exc.strerror}", peer=self.peer) from exc

    def _check_room(self, nbytes: int) -> None:
        """Refuse a message as a whole, before its first byte, if too much waits already; _lock is held."""
        if self._backlog and self._backlog_nbytes + nbytes > 2 * self._local.config.max_message_nbytes:
            raise PeerLost(
                f"peer {self.peer!r} does not read: {self._backlog_nbytes} bytes wait for it",
                hint="it is frozen or overloaded", peer=self.peer,
            )  # fmt: skip

    def _queue(self, data: bytes | memoryview, fds: Sequence[int]) -> None:
        """Keep something for later; _lock is held."""
        if not self._backlog:
            self._local.reactor.modify(self._fd, select.EPOLLIN | select.EPOLLOUT)
        self._backlog.append((data, [os.dup(fd) for fd in fds]))
        self._backlog_nbytes += len(data)

    def _flush(self) -> None:
        with self._lock:
            while self._backlog and self.lost is None:
                data, fds = self._backlog[0]
                try:
                    taken = self._try_transmit(data, fds)
                except PeerLost:
                    return
                self._backlog_nbytes -= taken
                if taken < len(data):
                    self._backlog[0] = (memoryview(data)[taken:], fds)
                    return
                self._backlog.popleft()
                close_all(fds)
            if self.lost is None:
                self._local.reactor.modify(self._fd, select.EPOLLIN)
        self._local.events.link_flushed(self)

    def _on_event(self, mask: int) -> None:
        if mask & select.EPOLLOUT:
            self._flush()
        if mask & _READABLE and self.lost is None:
            self._receive()  # once: asking for more that seldom is there costs a call; epoll asks again

    def _watch(self) -> None:
        """Hear of the death of the peer's process, on this host; _lock is held."""
        with contextlib.suppress(OSError):  # already gone: the socket says so too
            self._pidfd = os.pidfd_open(self.pid)
            self._local.reactor.add(self._pidfd, self._on_death)

    def _on_death(self, _mask: int) -> None:
        """Hear that the other end is gone; take what it still said, then let go."""
        while self.lost is None and self._receive():
            continue
        self._on_hangup()

    def _on_hangup(self, reason: str = "") -> None:
        self.has_hung_up = self.lost is None
        process = f" (pid {self.pid})" if self.pid else ""
        self.close(PeerLost(f"peer {self.peer!r}{process} {self._ending(reason)}", peer=self.peer))

    def _ending(self, reason: str) -> str:
        if self._said_bye:
            return "closed its agent"
        if self.pid and is_ending(self.pid):
            return "died"
        return f"is gone: {reason}" if reason else "closed the connection"

    def _finish(self) -> None:
        """Let go of the socket on the reactor's thread, where nobody is receiving, and tell the agent."""
        self._local.reactor.remove(self._fd)
        if self._pidfd >= 0:
            self._local.reactor.remove(self._pidfd)
        self._let_go()
        assert self.lost is not None
        self._local.events.link_lost(self, self.lost)

    def _let_go(self) -> None:
        with self._lock:
            self._sock.close()
            if self._pidfd >= 0:
                os.close(self._pidfd)
                self._pidfd = -1
            for _, fds in self._backlog:
                close_all(fds)
            self._has_unsent |= bool(self._backlog)
            self._backlog.clear()


class Links:
    """The links of one backend that stand."""

    def __init__(self, local: Local) -> None:
        self._local = local
        self._lock = threading.Lock()  # protects _links
        self._links: set[BaseLink] = set()

    def add(self, link: BaseLink) -> None:
        """Take a link in; forget those that are lost."""
        with self._lock:
            self._links = {other for other in self._links if other.lost is None} | {link}

    def admit(self, incarnation: str, take_in: Callable[[], None]) -> None:
        """Call `take_in` for a peer that has connected, on the reactor's thread.

        If its earlier link is down, not before the agent has heard of that: else it would lose both.
        """
        with self._lock:
            earlier = [link for link in self._links if link.incarnation == incarnation]
        ended = [link for link in earlier if link.has_ended()]  # each is asked
        if ended:
            self._local.reactor.call_soon(take_in)
        else:
            take_in()

    def close(self) -> None:
        """Close every link."""
        with self._lock:
            links = list(self._links)
        for link in links:
            link.close(PeerLost("this agent was closed", peer=link.peer))


def close_all(fds: Sequence[int]) -> None:
    """Close descriptors."""
    for fd in fds:
        os.close(fd)
