"""A link over one TCP connection: messages of the agent and of the backend, and word of a host that vanished."""

from __future__ import annotations

import contextlib
import math
import socket
import struct
from collections.abc import Callable, Iterator, Sequence

from raynixl.backends.base import Local
from raynixl.backends.link import BaseLink
from raynixl.errors import IntegrityError, PeerLost
from raynixl.host import is_frozen

_FRAME = struct.Struct("<IB")  # length of the body, channel
_MESSAGE, _CONTROL = 0, 1
_SLACK_NBYTES = 64
_SEND_FLAGS = int(socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
_JOIN_NBYTES = 1 << 16
"""Up to here, copying a message behind its header is cheaper than a second call."""
_BUFFER_NBYTES = 1 << 16
_TURN_NBYTES = 1 << 14
"""What is received in one turn of small messages: more would keep other peers waiting."""
_MAX_KEEPALIVE_SECONDS = 32_767  # the kernel takes no more
_TCP_INFO_HEAD = struct.Struct("=8B13I")  # linux/tcp.h: struct tcp_info up to tcpi_last_data_recv and last_ack_recv
_RETRANSMITS, _PROBES, _LAST_ACK_MS = 2, 3, 20

OnControl = Callable[["StreamLink", bytes], None]


class Frames:
    """Cuts a stream of bytes into frames, however it was split on its way."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._rest = bytearray()  # the beginning of a frame
        self._wanted = _FRAME.size  # how long it must be before it is looked at again

    @property
    def missing(self) -> int:
        """How many bytes, at least, the frame that has begun still lacks."""
        return self._wanted - len(self._rest)

    def feed(self, chunk: memoryview) -> Iterator[tuple[int, bytes]]:
        """Take what came; yield the channel and body of each frame that is whole.

        Raises:
            IntegrityError: a header announces what no peer sends; nothing after it can be understood.
        """
        if self._rest:
            self._rest += chunk
            if len(self._rest) < self._wanted:
                return
            chunk, self._rest = memoryview(self._rest), bytearray()
        at, end = 0, len(chunk)
        self._wanted = _FRAME.size
        while end - at >= _FRAME.size:
            nbytes, channel = _FRAME.unpack_from(chunk, at)
            if nbytes > self._limit or channel > _CONTROL:
                raise IntegrityError(f"a frame of {nbytes} bytes on channel {channel}")
            begin = at + _FRAME.size
            if begin + nbytes > end:
                self._wanted = _FRAME.size + nbytes
                break
            at = begin + nbytes
            yield channel, bytes(chunk[begin:at])
        self._rest += chunk[at:]


class StreamLink(BaseLink):
    """One authenticated connection with a peer on any host; frames of (length, channel, body) on a TCP stream.

    Who the peer is was proved when it connected; what follows is neither signed nor encrypted.
    `pid` is 0 for a peer on another host. `probe`, where the backend sets it, says of such a peer whether it left
    a one-sided read without an answer for a whole heartbeat. What comes on the backend's own channel goes to
    `on_control`, on the reactor's thread; an IntegrityError that it raises ends the link. Descriptors do not travel.
    """

    backend = "ucx"

    def __init__(
        self, local: Local, sock: socket.socket, *, peer: str, incarnation: str, on_control: OnControl, pid: int = 0
    ) -> None:
        super().__init__(local, sock, peer=peer, incarnation=incarnation, pid=pid)
        self.probe: Callable[[], bool] | None = None
        self._on_control = on_control
        self._frames = Frames(local.config.max_message_nbytes + _SLACK_NBYTES)
        self._view = memoryview(bytearray(_BUFFER_NBYTES))

    def open(self) -> None:
        """Start to receive, and to look after the peer's host."""
        config = self._local.config
        often = min(max(1, round(config.heartbeat_interval)), _MAX_KEEPALIVE_SECONDS)
        for level, option, value in (
            (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1), (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
            (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, often), (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, often),
            (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, min(127, math.ceil(config.heartbeat_timeout / often) + 3)),
        ):  # fmt: skip
            self._sock.setsockopt(level, option, value)
        super().open()
        self._local.reactor.call_later(config.heartbeat_interval, self._look)

    def send(self, message: bytes, fds: Sequence[int] = ()) -> None:
        """Send one message, or queue what the kernel does not take."""
        self._send(_MESSAGE, message)

    def send_control(self, body: bytes) -> None:
        """Send the backend's own message, in order with the agent's."""
        self._send(_CONTROL, body)

    def watch_process(self, pid: int) -> None:
        """Learn which process of this host the peer is: its death and its being stopped are then seen at once."""
        with self._lock:
            if self.lost is None and self._pidfd < 0:
                self.pid = pid
                self._watch()

    def is_frozen(self) -> bool:
        """Whether the peer's process is stopped or, on another host, does not answer even one-sided reads."""
        if self.pid:
            return is_frozen(self.pid)
        return self.probe is not None and self.probe()

    def _send(self, channel: int, body: bytes) -> None:
        header = _FRAME.pack(len(body), channel)
        if len(body) <= _JOIN_NBYTES:
            self._post(len(body), ((header + body, ()),))
        else:
            self._post(len(body), ((header, ()), (memoryview(body), ())))

    def _transmit(self, data: bytes | memoryview, fds: Sequence[int]) -> int:
        return self._sock.send(data, _SEND_FLAGS)

    def _receive(self) -> bool:
        limit = min(max(self._frames.missing, _TURN_NBYTES), _BUFFER_NBYTES)
        reason = ""
        try:
            nbytes = self._sock.recv_into(self._view, limit)
        except BlockingIOError:
            return False
        except ConnectionError as exc:
            nbytes, reason = 0, str(exc.strerror)
        except OSError as exc:  # its host has not been heard for long, or cannot be reached: the process may live on
            self.close(PeerLost(f"peer {self.peer!r} is out of reach: {exc.strerror}", peer=self.peer))
            return False
        if not nbytes:
            self._on_hangup(reason)
            return False
        try:
            self._take(self._view[:nbytes])
        except IntegrityError as exc:
            self._local.events.message_dropped("frame")
            self.close(PeerLost(f"peer {self.peer!r} sent what no agent sends: {exc.message}", peer=self.peer))
        return True

    def _take(self, chunk: memoryview) -> None:
        for channel, body in self._frames.feed(chunk):
            if channel == _MESSAGE:
                self._local.events.message_received(self, body, ())
            else:
                self._on_control(self, body)
            if self.lost is not None:
                return

    def _let_go(self) -> None:
        super()._let_go()
        self._view = memoryview(b"")  # agents remember the links of peers that are gone

    def _look(self) -> None:
        """End the link when the peer's host does not answer even the kernel's own probes.

        The kernel would do that by TCP_USER_TIMEOUT, but also when the host answers and its process does not read.
        """
        if self.lost is not None:
            return
        silence = 0.0
        with contextlib.suppress(OSError):  # closed a moment ago
            silence = _host_silence(self._sock)
        if silence >= self._local.config.heartbeat_timeout:
            self.close(PeerLost(f"the host of peer {self.peer!r} has not answered for {silence:.1f} s", peer=self.peer))
        else:
            self._local.reactor.call_later(self._local.config.heartbeat_interval, self._look)


def _host_silence(sock: socket.socket) -> float:
    """Return for how many seconds the kernel at the other end has answered nothing; 0 if it owes no answer."""
    info = _TCP_INFO_HEAD.unpack(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_HEAD.size))
    # Each answer sets the counts back, so two that are unanswered mean that one is overdue.
    return info[_LAST_ACK_MS] / 1000 if info[_RETRANSMITS] + info[_PROBES] >= 2 else 0.0
