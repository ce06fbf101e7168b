"""The first process of a test host: enters namespaces of its own, then lives until its standard input closes.

It is process 1 of its process namespace, so that with it the kernel ends every process of the host, and with them go
the namespaces, the links and what was mounted: nothing has to be removed by anybody, not even after kill -9 of pytest.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys

NEWNS, NEWUTS, NEWIPC, NEWNET = 0x20000, 0x4000000, 0x8000000, 0x40000000
MS_REC, MS_PRIVATE = 0x4000, 0x40000
LIBC = ctypes.CDLL(None, use_errno=True)


def checked(result: int) -> None:
    """Raise what a call of the C library failed with."""
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def mount(what: str, where: str, flags: int = 0) -> None:
    """Mount a file system of a kind that needs no device."""
    checked(LIBC.mount(what.encode(), where.encode(), what.encode(), ctypes.c_ulong(flags), None))


def main(name: str) -> None:
    """Become the host, say so, and wait for the end."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps orphans
    checked(LIBC.unshare(NEWNS | NEWUTS | NEWIPC | NEWNET))
    socket.sethostname(name)
    mount("none", "/", MS_REC | MS_PRIVATE)
    for kind, where in (("proc", "/proc"), ("sysfs", "/sys"), ("tmpfs", "/dev/shm")):
        mount(kind, where)
    os.write(1, b"ready\n")
    os.close(1)
    while os.read(0, 1):
        pass


if __name__ == "__main__":
    main(sys.argv[1])
