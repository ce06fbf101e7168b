"""A link over one Unix packet socket: messages of any size, file descriptors, and word of the peer's death."""

from __future__ import annotations

import array
import contextlib
import os
import select
import socket
import struct
import threading
from collections import deque
from collections.abc import Sequence

from raynixl.backends.base import Local
from raynixl.errors import PeerLost, RaynixlError
from raynixl.host import is_ending, is_frozen

_PACKET = struct.Struct("<BQI")  # first/last flags, message number, message length
_FIRST, _LAST = 1, 2
PACKET_NBYTES = 60_000
"""Payload of one packet: well below the socket buffer that every Linux grants."""
MAX_FDS = 4
_ANCILLARY = socket.CMSG_SPACE(MAX_FDS * array.array("i").itemsize)
_SEND_FLAGS = int(socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
_RECEIVE_FLAGS = int(socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC)
_TRUNCATED = int(socket.MSG_TRUNC)
_RECEIVE_NBYTES = PACKET_NBYTES + _PACKET.size
_READABLE = select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR
_BUFFER_NBYTES = 1 << 20


class SocketLink:
    """One authenticated connection with a peer on this host. Packets are atomic, so any thread may send.

    What the kernel does not take at once waits in a bounded backlog that the reactor flushes.
    """

    backend = "shm"

    def __init__(self, local: Local, sock: socket.socket, *, peer: str, incarnation: str, pid: int) -> None:
        self.peer = peer
        self.incarnation = incarnation
        self.pid = pid
        self.lost: RaynixlError | None = None
        self.vm_refusal = ""  # why process_vm does not work with this peer, '' if it does
        self._local = local
        self._sock = sock
        self._fd = sock.fileno()
        self._lock = threading.Lock()  # protects _backlog, _backlog_nbytes, _numbers and the order of packets
        self._backlog: deque[tuple[bytes, list[int]]] = deque()
        self._backlog_nbytes = 0
        self._numbers = 0
        self._partial: dict[int, tuple[bytearray, int, list[int]]] = {}
        self._said_bye = False
        self._pidfd = -1

    def __repr__(self) -> str:
        state = "open" if self.lost is None else f"lost: {self.lost}"
        return f"SocketLink({self.peer!r}, pid={self.pid}, {state})"

    def open(self) -> None:
        """Start to receive."""
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            self._sock.setsockopt(socket.SOL_SOCKET, option, _BUFFER_NBYTES)
        self._sock.setblocking(False)
        with self._lock:  # a peer that dies now is heard at once, and its link must not end half open
            with contextlib.suppress(OSError):  # already gone: the socket says so too
                self._pidfd = os.pidfd_open(self.pid)
                self._local.reactor.add(self._pidfd, self._on_death)
            self._local.reactor.add(self._fd, self._on_event)

    def send(self, message: bytes, fds: Sequence[int] = ()) -> None:
        """Send one message, or queue what the kernel does not take."""
        if len(message) <= PACKET_NBYTES and not fds:
            packets = [_PACKET.pack(_FIRST | _LAST, 0, len(message)) + message]
        else:
            packets = self._packets(message)
        with self._lock:
            if self.lost is not None:
                raise PeerLost(f"peer {self.peer!r} is lost: {self.lost}", peer=self.peer)
            self._check_room(len(message))
            for index, packet in enumerate(packets):
                extra = list(fds) if index == 0 else []
                if self._backlog or not self._try_send(packet, extra):
                    self._queue(packet, extra)

    def flushed(self) -> bool:
        """Whether the backlog is empty."""
        return not self._backlog

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

    def _packets(self, message: bytes) -> list[bytes]:
        with self._lock:
            self._numbers += 1
            number = self._numbers
        count = max(1, -(-len(message) // PACKET_NBYTES))
        return [
            _PACKET.pack((index == 0) * _FIRST | (index == count - 1) * _LAST, number, len(message))
            + message[index * PACKET_NBYTES : (index + 1) * PACKET_NBYTES]
            for index in range(count)
        ]

    def _try_send(self, packet: bytes, fds: list[int]) -> bool:
        try:
            if fds:
                rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))
                self._sock.sendmsg([packet], [rights], _SEND_FLAGS)
            else:
                self._sock.send(packet, _SEND_FLAGS)
        except BlockingIOError:
            return False
        except OSError as exc:
            self._local.reactor.call_soon(self._on_hangup)
            raise PeerLost(f"peer {self.peer!r} is gone: {exc.strerror}", peer=self.peer) from exc
        return True

    def _check_room(self, nbytes: int) -> None:
        """Refuse a message as a whole, before its first packet, if too much waits already; _lock is held."""
        if self._backlog and self._backlog_nbytes + nbytes > 2 * self._local.config.max_message_nbytes:
            raise PeerLost(
                f"peer {self.peer!r} does not read: {self._backlog_nbytes} bytes wait for it",
                hint="it is frozen or overloaded", peer=self.peer,
            )  # fmt: skip

    def _queue(self, packet: bytes, fds: list[int]) -> None:
        """Keep a packet for later; _lock is held."""
        if not self._backlog:
            self._local.reactor.modify(self._fd, select.EPOLLIN | select.EPOLLOUT)
        self._backlog.append((packet, [os.dup(fd) for fd in fds]))
        self._backlog_nbytes += len(packet)

    def _flush(self) -> None:
        with self._lock:
            while self._backlog and self.lost is None:
                packet, fds = self._backlog[0]
                try:
                    if not self._try_send(packet, fds):
                        return
                except PeerLost:
                    return
                self._backlog.popleft()
                self._backlog_nbytes -= len(packet)
                _close_all(fds)
            if self.lost is None:
                self._local.reactor.modify(self._fd, select.EPOLLIN)
        self._local.events.link_flushed(self)

    def _on_event(self, mask: int) -> None:
        if mask & select.EPOLLOUT:
            self._flush()
        if mask & _READABLE and self.lost is None:
            self._receive()  # one packet: asking for a second that seldom is there costs a call; epoll asks again

    def _receive(self) -> bool:
        """Take one packet; return whether there was one."""
        try:
            packet, ancillary, flags, _ = self._sock.recvmsg(_RECEIVE_NBYTES, _ANCILLARY, _RECEIVE_FLAGS)
        except BlockingIOError:
            return False
        except OSError:
            packet, ancillary, flags = b"", [], 0
        fds = _descriptors(ancillary) if ancillary else []
        if not packet:
            self._on_hangup()
            return False
        if len(packet) < _PACKET.size or flags & _TRUNCATED:
            _close_all(fds)
            self._local.events.message_dropped("packet")
        else:
            self._assemble(packet, fds)
        return True

    def _assemble(self, packet: bytes, fds: list[int]) -> None:
        """Take one packet; hand on the message that it completes."""
        flags, number, length = _PACKET.unpack_from(packet)
        body = packet[_PACKET.size :]
        if flags == _FIRST | _LAST and len(body) == length:
            self._local.events.message_received(self, body, fds)
            return
        if flags & _FIRST:
            if length > self._local.config.max_message_nbytes or len(self._partial) >= 64:
                self._drop("oversized message", fds)
                return
            if number in self._partial:
                self._drop("packet", self._partial.pop(number)[2])
            self._partial[number] = (bytearray(), length, fds)
            fds = []
        if fds or number not in self._partial:
            self._drop("packet", fds)
            return
        data, total, kept = self._partial[number]
        data += body
        if len(data) > total or (flags & _LAST and len(data) != total):
            del self._partial[number]
            self._drop("packet", kept)
        elif flags & _LAST:
            del self._partial[number]
            self._local.events.message_received(self, bytes(data), kept)

    def _drop(self, reason: str, fds: list[int]) -> None:
        _close_all(fds)
        self._local.events.message_dropped(reason)

    def _on_death(self, _mask: int) -> None:
        """The peer's process ended; take what it still said, then let go."""
        while self.lost is None and self._receive():
            continue
        self._on_hangup()

    def _on_hangup(self) -> None:
        self.close(PeerLost(f"peer {self.peer!r} (pid {self.pid}) {self._ending()}", peer=self.peer))

    def _ending(self) -> str:
        if self._said_bye:
            return "closed its agent"
        return "died" if is_ending(self.pid) else "closed the connection"

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
                _close_all(fds)
            self._backlog.clear()
            for _, _, kept in self._partial.values():
                _close_all(kept)
            self._partial.clear()


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    fds: list[int] = []
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            numbers = array.array("i")
            numbers.frombytes(data[: len(data) - len(data) % numbers.itemsize])
            fds.extend(numbers)
    return fds


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
