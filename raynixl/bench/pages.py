"""Plain memory in small or in huge pages: a factor of two for whoever walks them, as process_vm and CMA do."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np

from raynixl.bench.layout import Bytes

HUGE_NBYTES = 1 << 21
_NUMPY_ADVISES = 1 << 22
"""From this size on numpy itself asks for huge pages."""
_ARENA_MODE = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")


def user_memory(nbytes: int) -> Bytes:
    """Return plain touched memory, such as an application has."""
    memory = np.empty(nbytes, np.uint8)
    memory[:] = 0
    return memory


def huge_memory(nbytes: int) -> Bytes:
    """Return plain touched memory in huge pages, even for a small size, where the kernel has them."""
    size = -(-nbytes // HUGE_NBYTES) * HUGE_NBYTES + HUGE_NBYTES
    mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # a shared one would be shared memory
    mapping.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(mapping, np.uint8)
    start = -whole.ctypes.data % HUGE_NBYTES
    whole[start : start + nbytes] = 0
    return whole[start : start + nbytes]


def is_huge(memory: str, nbytes: int) -> bool:
    """Whether memory of a kind and size lies in huge pages, as far as that is known beforehand."""
    if memory == "arena":
        mode = _ARENA_MODE.read_text("ascii") if _ARENA_MODE.exists() else ""
        return nbytes >= HUGE_NBYTES and any(f"[{word}]" in mode for word in ("advise", "always", "within_size"))
    return memory == "huge" or nbytes >= _NUMPY_ADVISES
