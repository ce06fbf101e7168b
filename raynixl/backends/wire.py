"""Wires: how greetings travel on a socket, and what the kernel says about the process at the other end."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import struct
from typing import Protocol

from raynixl.backends.socket_owner import owner
from raynixl.errors import IntegrityError

MAX_GREETING_NBYTES = 4096

_CREDENTIALS = struct.Struct("3i")
_LENGTH = struct.Struct("<I")


class Wire(Protocol):
    """Carries greetings until both ends are proved; then the socket is the link's, with nothing of it read ahead."""

    sock: socket.socket

    def send(self, greeting: bytes) -> None:
        """Send one greeting, as long as the socket's timeout allows.

        Raises:
            OSError: they hung up, or it did not go out in time.
        """

    def receive(self) -> bytes | None:
        """Call recv once; return the greeting that it completes, or None if more is to come.

        Raises:
            IntegrityError: it is no greeting.
            OSError: they hung up, or there was nothing in time.
        """

    def is_own_user(self) -> bool:
        """Whether the process at the other end is this user's, on this host."""


class PacketWire:
    """A Unix packet socket: each packet is one greeting."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    def send(self, greeting: bytes) -> None:
        """Send one packet."""
        self.sock.send(greeting, socket.MSG_NOSIGNAL)

    def receive(self) -> bytes | None:
        """Receive one packet."""
        data = self.sock.recv(MAX_GREETING_NBYTES)
        if not data:
            raise ConnectionResetError
        return data

    def is_own_user(self) -> bool:
        """The kernel remembers who connected, and who listened."""
        return _credentials(self.sock)[1] == os.geteuid()


class StreamWire:
    """A TCP socket: a length before each greeting. Never reads beyond the greeting that it waits for."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        with contextlib.suppress(OSError):  # it has been reset already
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # else each answer waits 40 ms for the next one
        self._data = b""
        self._wanted = _LENGTH.size

    def send(self, greeting: bytes) -> None:
        """Send the length and the greeting; one that does not fit into the socket's buffer at once is an OSError."""
        self.sock.sendall(_LENGTH.pack(len(greeting)) + greeting, socket.MSG_NOSIGNAL)

    def receive(self) -> bytes | None:
        """Receive some of what is missing."""
        more = self.sock.recv(self._wanted - len(self._data))
        if not more:
            raise ConnectionResetError
        self._data += more
        if len(self._data) < self._wanted:
            return None
        if self._wanted > _LENGTH.size:
            greeting, self._data, self._wanted = self._data[_LENGTH.size :], b"", _LENGTH.size
            return greeting
        (nbytes,) = _LENGTH.unpack(self._data)
        if not 0 < nbytes <= MAX_GREETING_NBYTES:
            raise IntegrityError(f"a greeting of {nbytes} bytes", hint="whoever connected does not speak raynixl")
        self._wanted += nbytes
        return None

    def is_own_user(self) -> bool:
        """TCP keeps no credentials: the kernel's table of connections names the owner of each end on this host."""
        with contextlib.suppress(OSError):
            theirs, ours = self.sock.getpeername(), self.sock.getsockname()
            if ipaddress.ip_address(theirs[0].partition("%")[0]).is_loopback:
                return owner(self.sock.family, theirs[:2], ours[:2]) == os.geteuid()
        return False


def peer_pid(sock: socket.socket) -> int:
    """Return the process at the other end of a Unix socket, as the kernel knows it."""
    return _credentials(sock)[0]


def _credentials(sock: socket.socket) -> tuple[int, int, int]:
    """Return process, user and group of the other end."""
    pid, uid, gid = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return int(pid), int(uid), int(gid)
