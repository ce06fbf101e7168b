"""TCP ports of the host on which this runs: one that is free, and whether somebody listens on one."""

from __future__ import annotations

import contextlib
import socket


def free_port() -> int:
    """Return a port that nobody has; somebody else may take it before it is used."""
    with socket.socket() as sock:
        sock.bind(("", 0))
        port: int = sock.getsockname()[1]
        return port


def is_listening(port: int) -> bool:
    """Whether a socket of this network namespace listens on a port; it is not disturbed."""
    ending, listening = f":{port:04X}", "0A"
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(FileNotFoundError), open(f"/proc/net/{name}", encoding="ascii") as lines:
            for line in lines:
                fields = line.split()
                if fields[1].endswith(ending) and fields[3] == listening:
                    return True
    return False
