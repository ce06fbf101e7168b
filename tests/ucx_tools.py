"""UCX's own TCP ports seen from outside: which they are, and what comes of connecting to them."""

from __future__ import annotations

import contextlib
import os
import select
import socket
from ipaddress import ip_address
from pathlib import Path

from raynixl.backends.ucx import UcxBackend
from raynixl.record import AgentRecord

MAGIC = (0xCAFEBABE12345678).to_bytes(8, "little")
"""What a connection to UCX's port begins with, and all that UCX asks for."""
SILENCE = 0.4


def ucx_ports(pid: int, record: bytes) -> set[tuple[str, int]]:
    """The sockets on which a process with one agent listens, but for those of the agent itself."""
    mine = set()
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            mine.add(os.readlink(f"/proc/{pid}/fd/{fd}").removeprefix("socket:[").removesuffix("]"))
    said = AgentRecord.from_bytes(record).backends[UcxBackend.name]
    own = {int(text) for text in str(said["ports"]).split()}
    found = {_endpoint(row[1]) for row in _rows(pid) if row[3] == "0A" and row[9] in mine}
    return {(ip, port) for ip, port in found if port not in own}


def is_heard(target: tuple[str, int], *, source: str = "") -> bool:
    """Whether a connection to a socket comes about; a packet that is dropped is waited for, for SILENCE."""
    with socket.socket(socket.AF_INET6 if ":" in target[0] else socket.AF_INET) as sock:
        sock.setblocking(False)
        if source:
            sock.bind((source, 0))
        sock.connect_ex(target)
        poll = select.poll()
        poll.register(sock, select.POLLOUT)
        return bool(poll.poll(SILENCE * 1000)) and not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)


def _rows(pid: int) -> list[list[str]]:
    tables = [Path(f"/proc/{pid}/net/{name}") for name in ("tcp", "tcp6")]
    texts = [one.read_text(encoding="ascii") for one in tables if one.exists()]
    return [line.split() for text in texts for line in text.splitlines()[1:]]


def _endpoint(text: str) -> tuple[str, int]:
    """Read an address of /proc/net/tcp: words, whose bytes are in the order of the machine."""
    words, _, port = text.partition(":")
    packed = b"".join(bytes.fromhex(words[at : at + 8])[::-1] for at in range(0, len(words), 8))
    return str(ip_address(packed)), int(port, 16)
