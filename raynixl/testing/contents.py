"""Contents: fills memory of any kind and looks at it, as its owner's process can. Nothing here is fast."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt

from raynixl import cuda
from raynixl.memory import Memory, MemoryKind

Bytes = npt.NDArray[np.uint8]


def put(memory: Memory, data: Any, offset: int = 0) -> None:
    """Copy bytes into memory; they are there on return."""
    source = np.ascontiguousarray(data).view(np.uint8).reshape(-1)
    address = memory.address + offset
    if memory.kind is MemoryKind.VRAM:
        _copy(memory.device, address, source.ctypes.data, source.nbytes)
    else:
        ctypes.memmove(address, source.ctypes.data, source.nbytes)


def get(memory: Memory, offset: int = 0, nbytes: int | None = None) -> Bytes:
    """Return a copy of the bytes."""
    seen = np.empty(memory.nbytes - offset if nbytes is None else nbytes, np.uint8)
    address = memory.address + offset
    if memory.kind is MemoryKind.VRAM:
        _copy(memory.device, seen.ctypes.data, address, seen.nbytes)
    else:
        ctypes.memmove(seen.ctypes.data, address, seen.nbytes)
    return seen


def _copy(device: int, destination: int, source: int, nbytes: int) -> None:
    with cuda.on(device):
        stream = cuda.stream_create()
        try:
            cuda.memcpy_async(destination, source, nbytes, stream)
            cuda.stream_synchronize(stream)
        finally:
            cuda.stream_destroy(stream)
