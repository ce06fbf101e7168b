"""TCP sockets of this process that a library has opened: found in /proc, and touched only while they are the same."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from raynixl.backends.ucx_filter import compile_filter, count

_SO_ATTACH_FILTER, _SO_DETACH_FILTER = 26, 27  # of Linux' <asm-generic/socket.h>; the socket module lacks them
_TCP = (socket.AF_INET, socket.AF_INET6)
_NO_LINGER = struct.pack("@ii", 1, 0)
_AS_IT_IS = socket.SOCK_STREAM | socket.SOCK_NONBLOCK
"""The type to state for somebody's socket: Python then leaves it as it is, whatever the default timeout."""


@dataclass(frozen=True, slots=True)
class OwnSocket:
    """One TCP socket of this process, as it was when it was looked at: its descriptor may be another's by now."""

    fd: int
    inode: int
    here: tuple[str, int]
    there: str = ""
    """The address at the other end; '' if it listens."""
    port: int = 0
    """The port at the other end."""

    @property
    def is_open(self) -> bool:
        """Whether it still is what it was."""
        with self._hold() as sock:
            return sock is not None

    def attach(self, program: bytes) -> None:
        """Have the kernel drop what the filter does not let in, in place of an earlier filter.

        Raises:
            OSError: the kernel refuses.
        """
        with self._hold() as sock:
            if sock is not None:
                _attach(sock, program)

    def detach(self) -> None:
        """Take the filter away, if there is one."""
        with self._hold() as sock, contextlib.suppress(OSError):  # ENOENT: there is none
            if sock is not None:
                sock.setsockopt(socket.SOL_SOCKET, _SO_DETACH_FILTER, 0)

    def send_away(self) -> None:
        """Close the connections that wait to be accepted."""
        with self._hold() as sock, contextlib.suppress(OSError):  # until there is none left
            while sock is not None and not os.get_blocking(sock.fileno()):
                sock.accept()[0].close()

    def shut_down(self) -> None:
        """End the connection; its owner hears of it as if the other end had hung up."""
        with self._hold() as sock, contextlib.suppress(OSError):  # reset already
            if sock is not None:
                sock.shutdown(socket.SHUT_RDWR)

    def discard_unsent(self) -> None:
        """Have the kernel throw away what is not sent yet when the owner closes it, and reset the connection."""
        with self._hold() as sock, contextlib.suppress(OSError):
            if sock is not None:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)

    def is_to(self, worker: bytes) -> bool:
        """Whether it is connected to one of the sockets that a worker's address names, as far as can be seen."""
        if not self.there:
            return False
        family = socket.AF_INET6 if ":" in self.there else socket.AF_INET
        host = socket.inet_pton(family, self.there.partition("%")[0])
        return host in worker and self.port.to_bytes(2, "big") in worker

    @contextlib.contextmanager
    def _hold(self) -> Iterator[socket.socket | None]:
        """Have the socket for a moment, whatever its owner does with his descriptor; None if he has closed it."""
        try:
            if os.fstat(self.fd).st_ino != self.inode:
                yield None
                return
            sock = socket.socket(type=_AS_IT_IS, fileno=os.dup(self.fd))
        except OSError:
            yield None
            return
        with sock:
            yield sock if os.fstat(sock.fileno()).st_ino == self.inode else None


def own_sockets() -> Iterator[OwnSocket]:
    """Look at the TCP sockets of this process that listen or are connected.

    Nothing is duplicated: to close a duplicate of somebody's file would take his record locks away.
    """
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # closed by now, or no socket
            status = os.fstat(int(name))
            if stat.S_ISSOCK(status.st_mode):
                sock = socket.socket(type=_AS_IT_IS, fileno=int(name))
                try:
                    found = _look_at(sock, status.st_ino)
                finally:
                    sock.detach()
                if found is not None:
                    yield found


def why_no_filter() -> str:
    """Why the kernel takes no packet filter from this process, '' if it does."""
    try:
        with socket.socket() as sock:
            _attach(sock, compile_filter([]))
    except OSError as exc:
        return str(exc.strerror)
    return ""


def _look_at(sock: socket.socket, inode: int) -> OwnSocket | None:
    if sock.family not in _TCP or sock.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE) != socket.SOCK_STREAM:
        return None
    is_listening = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    there, port = ("", 0) if is_listening else sock.getpeername()[:2]
    return OwnSocket(sock.fileno(), inode, sock.getsockname()[:2], there, port)


def _attach(sock: socket.socket, program: bytes) -> None:
    memory = ctypes.create_string_buffer(program, len(program))
    argument = struct.pack("@HP", count(program), ctypes.addressof(memory))
    sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, argument)
