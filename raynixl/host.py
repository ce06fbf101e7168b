"""What this host is: its identity among the hosts of a cluster, and the state of its processes."""

from __future__ import annotations

import os


def host_identity() -> str:
    """Return a string that two processes share when abstract sockets and process ids mean the same to both."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        boot = file.read().strip()
    spaces = (os.stat(f"/proc/self/ns/{kind}").st_ino for kind in ("net", "pid"))
    return ":".join((boot, *(str(inode) for inode in spaces)))


def process_state(pid: int) -> str:
    """Return the state letter of a process (R, S, D, T stopped, t traced, Z dead), or '' if it is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            text = file.read()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return ""
    return chr(text[text.rindex(b")") + 2])


def is_frozen(pid: int) -> bool:
    """Whether a process is stopped by a signal, a debugger or the freezer."""
    return process_state(pid) in ("T", "t")
