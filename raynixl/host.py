"""What this host is: its identity among the hosts of a cluster, and the state of its processes."""

from __future__ import annotations

import os
import select

_PF_EXITING = 0x4


def host_identity() -> str:
    """Return a string that two processes share when abstract sockets and process ids mean the same to both."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        boot = file.read().strip()
    spaces = (os.stat(f"/proc/self/ns/{kind}").st_ino for kind in ("net", "pid"))
    return ":".join((boot, *(str(inode) for inode in spaces)))


def process_state(pid: int) -> str:
    """Return the state letter of a process (R, S, D, T stopped, t traced, Z dead), or '' if it is gone."""
    return _fields(pid)[0]


def is_frozen(pid: int) -> bool:
    """Whether a process is stopped by a signal or a debugger."""
    return process_state(pid) in ("T", "t")


def is_ending(pid: int) -> bool:
    """Whether a process is gone, a zombie, or on its way there: its sockets close before it is a zombie."""
    state, *fields = _fields(pid)
    return state in ("", "Z", "X") or int(fields[5]) & _PF_EXITING != 0


def has_ended(pid: int) -> bool:
    """Whether all threads of a process have ended, so that it writes nothing any more, wherever."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([fd], [], [], 0)[0])
    finally:
        os.close(fd)


def _fields(pid: int) -> list[str]:
    """Return the fields of /proc/pid/stat from the state on; [''] if the process is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            text = file.read()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return [""]
    return text[text.rindex(b")") + 2 :].decode().split()
