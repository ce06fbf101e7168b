"""The system calls of the ctypes twin, memcpy, process_vm_readv/writev and msync; and its look at a word."""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import time

import numpy as np
import numpy.typing as npt

__all__ = ["copy", "copy_rows", "copy_small", "look_for", "mapped", "move_rows"]

_MAX_IOVECS = 1024  # IOV_MAX of Linux; more is refused with EINVAL
_MEMCPY_NBYTES = 32 << 10  # rows from here on are copied one by one: 1 us for each call is little against it
_MS_ASYNC = 1
_PAGE = os.sysconf("SC_PAGESIZE")

copy_small = ctypes.memmove
"""memmove with the GIL kept: for what is copied faster than the lock is handed over."""


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.memcpy.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    libc.memcpy.restype = ctypes.c_void_p
    for call in (libc.process_vm_readv, libc.process_vm_writev):
        iovecs = (ctypes.c_void_p, ctypes.c_ulong)
        call.argtypes = (ctypes.c_int, *iovecs, *iovecs, ctypes.c_ulong)
        call.restype = ctypes.c_ssize_t
    libc.msync.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return libc


def copy(dst_addr: int, src_addr: int, nbytes: int) -> None:
    """Copy between two ranges of this process, GIL released."""
    _libc().memcpy(dst_addr, src_addr, nbytes)


def look_for(address: int, value: int, timeout: float) -> bool:
    """Look at an aligned word of 8 bytes until it is `value` or more; False at the timeout."""
    word = ctypes.c_uint64.from_address(address)
    if word.value >= value:
        return True
    deadline = time.monotonic() + (timeout if timeout > 0 else 0.0)
    while time.monotonic() < deadline:
        if word.value >= value:
            return True
    return word.value >= value


def mapped(address: int, nbytes: int) -> bool:
    """Whether every page of the range is mapped in this process."""
    if nbytes == 0:
        return True
    if address + nbytes >= 1 << 64:
        return False
    start = address - address % _PAGE
    # MS_ASYNC writes nothing back (since Linux 2.6.19): it only looks for holes, mapping by mapping.
    return bool(_libc().msync(start, address + nbytes - start, _MS_ASYNC) == 0)


def copy_rows(rows: npt.NDArray[np.uint64]) -> int:
    """Copy rows of (source, destination, nbytes) inside this process; return 0 or -errno."""
    if len(rows) > 1 and int(rows[:, 2].max()) < _MEMCPY_NBYTES:
        code = move_rows(rows, os.getpid(), write=False)
        if code not in (-errno.EPERM, -errno.ENOSYS):
            return code
    for source, destination, nbytes in rows.tolist():
        copy(destination, source, nbytes)
    return 0


def move_rows(rows: npt.NDArray[np.uint64], pid: int, *, write: bool) -> int:
    """Move rows of (source, destination, nbytes) between this process and another; return 0 or -errno."""
    source, destination = rows[:, 0::2].copy(), rows[:, 1:].copy()
    local, remote = (source, destination) if write else (destination, source)
    call = _libc().process_vm_writev if write else _libc().process_vm_readv
    start = 0
    while start < len(rows):
        count = min(_MAX_IOVECS, len(rows) - start)
        at = start * local.strides[0]
        moved = call(pid, local.ctypes.data + at, count, remote.ctypes.data + at, count, 0)
        if moved < 0 and ctypes.get_errno() == errno.EINTR:
            continue
        if moved <= 0:
            return -(ctypes.get_errno() if moved < 0 else errno.EFAULT)
        start = _advance(local, remote, start, moved)
    return 0


def _advance(local: npt.NDArray[np.uint64], remote: npt.NDArray[np.uint64], start: int, moved: int) -> int:
    """Return the first row that is not complete after `moved` bytes; what it has got is cut off it."""
    ends = np.cumsum(local[start : start + _MAX_IOVECS, 1])
    complete = int(np.searchsorted(ends, np.uint64(moved), side="right"))
    if complete == len(ends):
        return start + complete
    rest = np.uint64(moved) - (ends[complete - 1] if complete else np.uint64(0))
    for iovecs in (local, remote):
        iovecs[start + complete, 0] += rest
        iovecs[start + complete, 1] -= rest
    return start + complete
