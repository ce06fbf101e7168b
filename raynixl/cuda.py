"""The CUDA driver, asked about memory of GPUs: whose it is, how it was made, who can map it, and in which context.

Nothing is loaded before it is needed, and CUDA is never initialised here: whoever has memory on a GPU has done that.
What is asked of the driver needs no current context, save where one is handed to `current`.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import functools
import threading
from collections.abc import Iterator
from ctypes import byref, c_int, c_uint, c_uint64, c_void_p
from dataclasses import dataclass
from typing import Any

from raynixl.errors import ConfigError, RangeError

_LIBRARY = "libcuda.so.1"
_CONTEXT, _MEMORY_TYPE, _ORDINAL, _START, _SIZE, _HANDLE_TYPES, _POOL = (
    1,
    2,
    9,
    11,
    12,
    16,
    17,
)  # CU_POINTER_ATTRIBUTE_*
_DEVICE_MEMORY = 2  # CU_MEMORYTYPE_DEVICE
POSIX_FD, FABRIC = 1, 8  # CU_MEM_HANDLE_TYPE_*


class Origin(enum.Enum):
    """How memory of a GPU was allocated."""

    MALLOC = "cudaMalloc"
    POOL = "cudaMallocAsync"
    VIRTUAL = "cuMemCreate"


@dataclass(frozen=True, slots=True)
class Allocation:
    """What the driver says of the allocation that a piece of memory lies in; `context` is 0 where it has none."""

    device: int
    context: int
    start: int
    nbytes: int
    origin: Origin
    handle_types: int = 0


@functools.cache
def _driver() -> Any:
    try:
        return ctypes.CDLL(_LIBRARY)
    except OSError:
        return None


def has_driver() -> bool:
    """Whether this host has a driver for NVIDIA GPUs; loads nothing else."""
    return _driver() is not None


def examine(address: int, nbytes: int) -> Allocation:
    """Return what the driver knows of memory of a GPU.

    Raises:
        ConfigError: there is no driver, or this is no memory of a GPU that this process has.
        RangeError: it goes beyond its allocation.
    """
    if not has_driver():
        raise ConfigError("memory of a GPU needs the NVIDIA driver, which is not here", hint="see `raynixl doctor`")
    if _ask(_MEMORY_TYPE, address, c_uint()) != _DEVICE_MEMORY:
        raise ConfigError(
            f"memory at {address:#x} is on no GPU of this process", hint="register a tensor or array that is alive"
        )
    start, size = _ask(_START, address, c_uint64()) or address, _ask(_SIZE, address, ctypes.c_size_t())
    allocation = Allocation(
        device=_ask(_ORDINAL, address, c_int()) or 0,
        context=_ask(_CONTEXT, address, c_void_p()) or 0,
        start=start, nbytes=size or nbytes, origin=_origin(address),
        handle_types=_ask(_HANDLE_TYPES, address, c_uint64()) or 0,
    )  # fmt: skip
    if allocation.origin is not Origin.VIRTUAL and address + nbytes > allocation.start + allocation.nbytes:
        raise RangeError(f"memory of {nbytes} bytes at {address:#x} goes beyond its allocation on the GPU")
    return allocation  # virtual memory is pieced together of allocations, and the driver tells of the first


def device_of(address: int) -> int:
    """Return the number of the GPU that memory is on; 0 where the driver cannot tell."""
    return _ask(_ORDINAL, address, c_int()) or 0 if has_driver() else 0


def context_for(allocation: Allocation) -> int:
    """Return the context to work with memory in: its own, or the primary one of its GPU.

    A primary context that is asked for stays for as long as the process lives.

    Raises:
        ConfigError: the driver gives none.
    """
    return allocation.context or _primary(allocation.device)


@contextlib.contextmanager
def current(context: int) -> Iterator[None]:
    """Make a context the current one of this thread meanwhile.

    Raises:
        ConfigError: the driver does not take it.
    """
    if code := _driver().cuCtxPushCurrent_v2(c_void_p(context)):
        raise ConfigError(f"the context of a GPU cannot be used: CUDA error {code}", hint="it was destroyed or reset")
    try:
        yield
    finally:
        _driver().cuCtxPopCurrent_v2(byref(c_void_p()))


def current_functions() -> tuple[int, int]:
    """Return the addresses of the functions that get and set a thread's current context, for native code."""
    get, put = (ctypes.cast(one, c_void_p).value for one in (_driver().cuCtxGetCurrent, _driver().cuCtxSetCurrent))
    return get or 0, put or 0


def bus_id(device: int) -> str:
    """Return the PCI address of a GPU as CUDA numbers it, '' where that cannot be asked."""
    if not has_driver():
        return ""
    text, handle = ctypes.create_string_buffer(32), c_int()
    if _driver().cuDeviceGet(byref(handle), device) or _driver().cuDeviceGetPCIBusId(text, len(text), handle):
        return ""
    return text.value.decode()


def _ask(attribute: int, address: int, into: Any) -> Any:
    """Return an attribute of a pointer; None if the driver does not know it, or does not know the pointer."""
    code = _driver().cuPointerGetAttribute(byref(into), c_int(attribute), c_uint64(address))
    return None if code else into.value


def _origin(address: int) -> Origin:
    handle = c_uint64()
    if _driver().cuMemRetainAllocationHandle(byref(handle), c_void_p(address)) == 0:
        _driver().cuMemRelease(handle)
        return Origin.VIRTUAL
    return Origin.POOL if _ask(_POOL, address, c_void_p()) else Origin.MALLOC


_primaries: dict[int, int] = {}
_lock = threading.Lock()  # protects _primaries: each is retained once


def _primary(device: int) -> int:
    with _lock:
        if device not in _primaries:
            handle, context = c_int(), c_void_p()
            code = _driver().cuDeviceGet(byref(handle), c_int(device))
            code = code or _driver().cuDevicePrimaryCtxRetain(byref(context), handle)
            if code:
                raise ConfigError(f"GPU {device} cannot be used: CUDA error {code}", hint="see nvidia-smi")
            _primaries[device] = context.value or 0
        return _primaries[device]
