"""Contents: fills memory of any kind and looks at it, as its owner's process can. Nothing here is fast."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
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
    if memory.kind is not MemoryKind.VRAM:
        ctypes.memmove(address, source.ctypes.data, source.nbytes)
        return
    with _pinned(memory.device, source.nbytes) as (pinned, seen):
        seen[:] = source
        _copy(address, pinned, source.nbytes)


def get(memory: Memory, offset: int = 0, nbytes: int | None = None) -> Bytes:
    """Return a copy of the bytes."""
    length = memory.nbytes - offset if nbytes is None else nbytes
    address, copied = memory.address + offset, np.empty(length, np.uint8)
    if memory.kind is not MemoryKind.VRAM:
        ctypes.memmove(copied.ctypes.data, address, length)
        return copied
    with _pinned(memory.device, length) as (pinned, seen):
        _copy(pinned, address, length)
        copied[:] = seen
    return copied


@contextmanager
def _pinned(device: int, nbytes: int) -> Iterator[tuple[int, Bytes]]:
    """Have pinned memory meanwhile, and the GPU's context current; its address, and its bytes."""
    with cuda.on(device):
        address = cuda.host_alloc(nbytes)
        try:
            yield address, np.frombuffer(cuda.host_bytes(address, nbytes), np.uint8)
        finally:
            cuda.host_free(address)


def _copy(destination: int, source: int, nbytes: int) -> None:
    stream = cuda.stream_create()
    try:
        cuda.memcpy_async(destination, source, nbytes, stream)
        cuda.stream_synchronize(stream)
    finally:
        cuda.stream_destroy(stream)
