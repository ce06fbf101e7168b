"""Which user of this host owns one end of a TCP connection: asked of the kernel, since TCP keeps no credentials.

sock_diag(7) looks one connection up in microseconds. Where the kernel lacks it, the table in /proc/net is read: that
takes as long as the host has connections.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from typing import Final

_NETLINK_SOCK_DIAG: Final = 4
_BY_FAMILY: Final = 20
_REQUEST: Final = 1
_NO_COOKIE: Final = 0xFFFFFFFF
_TCP_ESTABLISHED: Final = 1
_HEADER = struct.Struct("=IHHII")  # nlmsghdr: length, type, flags, number, port
_QUERY = struct.Struct("=BBBxI")  # inet_diag_req_v2 up to the addresses: family, protocol, extensions, states
_PORTS = struct.Struct(">HH")
_TAIL = struct.Struct("=III")  # interface, cookie
_ADDRESS_NBYTES: Final = 16
_UID_AT: Final = _HEADER.size + 4 + 48 + 12  # nlmsghdr, four bytes, inet_diag_sockid, expires and both queues
_ESTABLISHED = b"01"
_LOOKS: Final = 3
"""The table in /proc/net is no snapshot: a line may be missed while others come and go."""

End = tuple[str, int]


def owner(family: int, end: End, other: End) -> int | None:
    """Return the user of the local end of a connection, None if it is not there or not established any more."""
    try:
        return _ask(family, end, other)
    except OSError:
        return _read(family, end, other)


def _ask(family: int, end: End, other: End) -> int | None:
    """Ask by sock_diag. OSError: this kernel does not answer."""
    ports = _PORTS.pack(end[1], other[1])
    ends = b"".join(_packed(family, one).ljust(_ADDRESS_NBYTES, b"\0") for one in (end, other))
    query = _QUERY.pack(family, socket.IPPROTO_TCP, 0, 1 << _TCP_ESTABLISHED)
    body = query + ports + ends + _TAIL.pack(0, _NO_COOKIE, _NO_COOKIE)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, _NETLINK_SOCK_DIAG) as sock:
        sock.settimeout(1.0)
        sock.send(_HEADER.pack(_HEADER.size + len(body), _BY_FAMILY, _REQUEST, 1, 0) + body)
        answer = sock.recv(4096)
    _, kind, *_ = _HEADER.unpack_from(answer)
    if kind != _BY_FAMILY:
        (code,) = struct.unpack_from("=i", answer, _HEADER.size)
        if code == -2:  # ENOENT: there is no such connection
            return None
        raise OSError(-code, "sock_diag")
    if answer[_HEADER.size + 1] != _TCP_ESTABLISHED:
        return None
    return int(struct.unpack_from("=I", answer, _UID_AT)[0])


def _read(family: int, end: End, other: End) -> int | None:
    """Read the kernel's table of connections."""
    table = "/proc/net/tcp6" if family == socket.AF_INET6 else "/proc/net/tcp"
    line = b" ".join((_entry(family, end), _entry(family, other), _ESTABLISHED, b""))
    for _ in range(_LOOKS):
        with contextlib.suppress(OSError), open(table, "rb") as file:
            _, found, rest = file.read().partition(line)
            if found:
                return int(rest.split(None, 4)[3])
    return None


def _packed(family: int, end: End) -> bytes:
    return socket.inet_pton(family, end[0].partition("%")[0])


def _entry(family: int, end: End) -> bytes:
    """Return an address and a port as the kernel's table writes them: words of the host's byte order."""
    packed = _packed(family, end)
    words = struct.unpack(f"={len(packed) // 4}I", packed)
    return ("".join(f"{word:08X}" for word in words) + f":{end[1]:04X}").encode()
