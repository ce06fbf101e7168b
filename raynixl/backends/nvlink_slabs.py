"""Small pieces of memory that a GPU works with, cut from slabs: allocating each would make CUDA wait for the device."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable

from raynixl.native.twin_job import fork_generation

SLAB_NBYTES = 8 << 20
_LEAST_NBYTES = 4 << 10


class Piece:
    """A piece of a slab; given back by `close`, or when it is forgotten."""

    __slots__ = ("__weakref__", "_back", "address", "nbytes")

    def __init__(self, slabs: Slabs, address: int, nbytes: int) -> None:
        self.address = address
        self.nbytes = nbytes
        self._back = weakref.finalize(self, slabs.give, address, nbytes)
        self._back.atexit = False

    def close(self) -> None:
        """Give it back; nothing uses it any more. Idempotent."""
        self._back()


class Slabs:
    """Pieces whose lengths are powers of two. What was once allocated stays until `close`."""

    def __init__(self, allocate: Callable[[int], int], free: Callable[[int], None]) -> None:
        self._allocate = allocate
        self._free = free
        self._forks = fork_generation()
        self._lock = threading.RLock()  # protects all below; a piece may be forgotten, and come back, while it is held
        self._idle: dict[int, list[int]] = {}
        self._slabs: list[int] = []
        self._at, self._left = 0, 0

    def take(self, nbytes: int) -> Piece:
        """Return a piece of at least so many bytes, whose address is a multiple of 4096.

        Raises:
            RangeError: there is no more memory.
        """
        size = max(_LEAST_NBYTES, 1 << (nbytes - 1).bit_length())
        with self._lock:
            idle = self._idle.setdefault(size, [])
            return Piece(self, idle.pop() if idle else self._carve(size), size)

    def give(self, address: int, nbytes: int) -> None:
        """Take a piece back; a child that was forked has none, and the lock may have been held at the fork."""
        if self._forks != fork_generation():
            return
        with self._lock:
            self._idle.setdefault(nbytes, []).append(address)

    def close(self) -> None:
        """Free all slabs; no piece is in use."""
        with self._lock:
            slabs, self._slabs = self._slabs, []
            self._idle.clear()
            self._left = 0
        for slab in slabs:
            self._free(slab)

    def _carve(self, size: int) -> int:
        if size >= SLAB_NBYTES:
            slab = self._allocate(size)
            self._slabs.append(slab)
            return slab
        if self._left < size:
            self._at, self._left = self._allocate(SLAB_NBYTES), SLAB_NBYTES
            self._slabs.append(self._at)
        address = self._at
        self._at, self._left = self._at + size, self._left - size
        return address
