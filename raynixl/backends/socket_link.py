"""A link over one Unix packet socket: messages of any size, file descriptors, and word of the peer's death."""

from __future__ import annotations

import array
import socket
import struct
from collections.abc import Sequence

from raynixl.backends.base import Local
from raynixl.backends.link import BaseLink, Piece, close_all

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
_BUFFER_NBYTES = 1 << 20


class SocketLink(BaseLink):
    """One authenticated connection with a peer on this host. Packets are atomic: all of one is taken, or nothing."""

    backend = "shm"

    def __init__(self, local: Local, sock: socket.socket, *, peer: str, incarnation: str, pid: int) -> None:
        super().__init__(local, sock, peer=peer, incarnation=incarnation, pid=pid)
        self.vm_refusal = ""  # why process_vm does not work with this peer, '' if it does
        self._numbers = 0
        self._partial: dict[int, tuple[bytearray, int, list[int]]] = {}

    def open(self) -> None:
        """Start to receive."""
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            self._sock.setsockopt(socket.SOL_SOCKET, option, _BUFFER_NBYTES)
        super().open()

    def send(self, message: bytes, fds: Sequence[int] = ()) -> None:
        """Send one message, or queue what the kernel does not take."""
        if len(message) <= PACKET_NBYTES and not fds:
            self._post(len(message), ((_PACKET.pack(_FIRST | _LAST, 0, len(message)) + message, ()),))
        else:
            self._post(len(message), self._packets(message, fds))

    def _packets(self, message: bytes, fds: Sequence[int]) -> list[Piece]:
        with self._lock:
            self._numbers += 1
            number = self._numbers
        count = max(1, -(-len(message) // PACKET_NBYTES))
        return [
            (
                _PACKET.pack((index == 0) * _FIRST | (index == count - 1) * _LAST, number, len(message))
                + message[index * PACKET_NBYTES : (index + 1) * PACKET_NBYTES],
                fds if index == 0 else (),
            )
            for index in range(count)
        ]

    def _transmit(self, data: bytes | memoryview, fds: Sequence[int]) -> int:
        if not fds:
            return self._sock.send(data, _SEND_FLAGS)
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))
        return self._sock.sendmsg([data], [rights], _SEND_FLAGS)

    def _receive(self) -> bool:
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
            self._drop("packet", fds)
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
        close_all(fds)
        self._local.events.message_dropped(reason)

    def _let_go(self) -> None:
        super()._let_go()
        for _, _, kept in self._partial.values():
            close_all(kept)
        self._partial.clear()


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    fds: list[int] = []
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            numbers = array.array("i")
            numbers.frombytes(data[: len(data) - len(data) % numbers.itemsize])
            fds.extend(numbers)
    return fds
