"""Permission: lets processes of the same user reach this one's plain memory where the kernel's Yama module forbids it.

Many desktop systems set Yama's ptrace_scope to 1: process_vm then works on descendants only, and Ray's workers are
siblings. A process may lift that for itself (prctl(2), PR_SET_PTRACER); other users stay shut out as ever.
https://docs.kernel.org/admin-guide/LSM/Yama.html
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

SCOPE = Path("/proc/sys/kernel/yama/ptrace_scope")
_DESCENDANTS_ONLY = "1"
_PR_SET_PTRACER = 0x59616D61
_ANY = ctypes.c_ulong(-1)


def scope() -> str:
    """Return Yama's ptrace_scope: '0' free, '1' descendants only, '2' and '3' only the privileged; 'absent' without."""
    try:
        return SCOPE.read_text("ascii").strip()
    except OSError:
        return "absent"


def allow_same_user() -> str:
    """Let processes of this user reach our memory, if that is ours to say; return why it failed, or ''."""
    if scope() != _DESCENDANTS_ONLY:
        return ""
    libc = ctypes.CDLL(None, use_errno=True)
    zero = ctypes.c_ulong(0)
    if libc.prctl(_PR_SET_PTRACER, _ANY, zero, zero, zero) == 0:
        return ""
    return os.strerror(ctypes.get_errno())
