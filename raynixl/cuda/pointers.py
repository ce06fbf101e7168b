"""Memory of GPUs, asked about: whose it is, how it was made, who can map it, and in which context.

CUDA is not initialised by asking: whoever has memory on a GPU has done that.
"""

from __future__ import annotations

import enum
from ctypes import byref, c_int, c_size_t, c_uint, c_uint64, c_void_p
from dataclasses import dataclass
from typing import Any

from raynixl.cuda.contexts import a_context, current, primary
from raynixl.cuda.library import call, has_driver
from raynixl.errors import ConfigError, RangeError

POSIX_FD, FABRIC = 1, 8  # CU_MEM_HANDLE_TYPE_*
_HOST_MEMORY, _DEVICE_MEMORY = 1, 2  # CU_MEMORYTYPE_*


class _Attribute(enum.IntEnum):
    """CU_POINTER_ATTRIBUTE_*"""

    CONTEXT = 1
    MEMORY_TYPE = 2
    DEVICE_POINTER = 3
    BUFFER_ID = 7
    IS_MANAGED = 8
    ORDINAL = 9
    IS_IPC_CAPABLE = 10
    START = 11
    SIZE = 12
    HANDLE_TYPES = 14
    POOL = 17
    PIECE_SIZE = 18  # CUDA 12.3
    PIECE_START = 19


class Origin(enum.Enum):
    """How memory of a GPU was allocated."""

    MALLOC = "cudaMalloc"
    POOL = "cudaMallocAsync"
    VIRTUAL = "cuMemCreate"
    MANAGED = "cudaMallocManaged"

    @property
    def remedy(self) -> str:
        """What to set, so that the memory is made by cudaMalloc, which every process of the host can map."""
        return _REMEDIES[self.value]


_REMEDIES = {
    "cudaMalloc": "use agent.empty(nbytes, kind='vram')",
    "cudaMallocAsync": "with torch set PYTORCH_CUDA_ALLOC_CONF=backend:native",
    "cuMemCreate": "with torch set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False",
    "cudaMallocManaged": "allocate it with cudaMalloc, as torch, cupy and agent.empty(nbytes, kind='vram') do",
}


@dataclass(frozen=True, slots=True)
class Allocation:
    """What the driver says of the allocation that a piece of memory lies in; `context` is 0 where it has none.

    `buffer_id` is never given twice in a process, though addresses are.
    """

    device: int
    context: int
    start: int
    nbytes: int
    origin: Origin
    handle_types: int = 0
    buffer_id: int = 0
    is_ipc_capable: bool = True


def examine(address: int, nbytes: int) -> Allocation:
    """Return what the driver knows of memory of a GPU.

    Raises:
        ConfigError: there is no driver, or this is no memory of a GPU that this process has.
        RangeError: it goes beyond its allocation.
    """
    if not has_driver():
        raise ConfigError("memory of a GPU needs the NVIDIA driver, which is not here", hint="see `raynixl doctor`")
    if _ask(_Attribute.MEMORY_TYPE, address, c_uint()) != _DEVICE_MEMORY:
        raise ConfigError(
            f"memory at {address:#x} is on no GPU of this process", hint="register a tensor or array that is alive"
        )
    start, size = _ask(_Attribute.START, address, c_uint64()) or address, _ask(_Attribute.SIZE, address, c_size_t())
    allocation = Allocation(
        device=_ask(_Attribute.ORDINAL, address, c_int()) or 0,
        context=_ask(_Attribute.CONTEXT, address, c_void_p()) or 0,
        start=start, nbytes=size or nbytes, origin=_origin(address),
        handle_types=_ask(_Attribute.HANDLE_TYPES, address, c_uint64()) or 0,
        buffer_id=_ask(_Attribute.BUFFER_ID, address, c_uint64()) or 0,
        is_ipc_capable=_ask(_Attribute.IS_IPC_CAPABLE, address, c_int()) != 0,
    )  # fmt: skip
    if allocation.origin is not Origin.VIRTUAL and address + nbytes > allocation.start + allocation.nbytes:
        raise RangeError(f"memory of {nbytes} bytes at {address:#x} goes beyond its allocation on the GPU")
    return allocation  # virtual memory is pieced together of allocations, and the driver tells of the first


def piece_at(address: int) -> tuple[int, int]:
    """Return where the chunk of virtual memory begins that is mapped at an address, and its size.

    Raises:
        ConfigError: none is.
    """
    start = _ask(_Attribute.PIECE_START, address, c_uint64()) or _ask(_Attribute.START, address, c_uint64())
    size = _ask(_Attribute.PIECE_SIZE, address, c_size_t()) or _ask(_Attribute.SIZE, address, c_size_t())
    if not start or not size:
        raise ConfigError(f"memory at {address:#x} is on no GPU of this process")
    return start, size


def left_from(address: int) -> int | None:
    """Return how many bytes an allocation has from an address on; None if the driver cannot tell."""
    start, size = _ask(_Attribute.START, address, c_uint64()), _ask(_Attribute.SIZE, address, c_size_t())
    return None if start is None or not size else int(start + size - address)


def device_of(address: int) -> int:
    """Return the number of the GPU that memory is on; 0 where the driver cannot tell."""
    return _ask(_Attribute.ORDINAL, address, c_int()) or 0 if has_driver() else 0


def context_for(allocation: Allocation) -> int:
    """Return the context to work with memory in: its own, or the primary one of its GPU.

    A primary context that is asked for stays for as long as the process lives.

    Raises:
        ConfigError: the driver gives none.
    """
    return allocation.context or primary(allocation.device)


def pinned_address(address: int, nbytes: int) -> int | None:
    """Return where GPUs reach host memory that its owner has pinned; None if he has not, or not all of it."""
    if not has_driver():
        return None
    ends = (address, address + nbytes - 1)
    if any(_ask(_Attribute.MEMORY_TYPE, one, c_uint()) != _HOST_MEMORY for one in ends):
        return None
    if _ask(_Attribute.IS_MANAGED, address, c_uint()):
        return None  # its pages move
    with current(a_context()):  # where a GPU reaches memory is told for the current context, and not without one
        first, last = (_ask(_Attribute.DEVICE_POINTER, one, c_uint64()) for one in ends)
    buffers = {_ask(_Attribute.BUFFER_ID, one, c_uint64()) for one in ends}
    if not first or not last or last - first != nbytes - 1 or len(buffers) != 1:
        return None  # pinned in several pieces: there may be gaps between them
    return int(first)


def _ask(attribute: _Attribute, address: int, into: Any) -> Any:
    """Return an attribute of a pointer; None if the driver does not know it, or does not know the pointer."""
    code = call("cuPointerGetAttribute", byref(into), int(attribute), address)
    return None if code else into.value


def _origin(address: int) -> Origin:
    handle = c_uint64()
    if call("cuMemRetainAllocationHandle", byref(handle), address) == 0:
        call("cuMemRelease", handle)
        return Origin.VIRTUAL
    if _ask(_Attribute.IS_MANAGED, address, c_uint()):
        return Origin.MANAGED
    return Origin.POOL if _ask(_Attribute.POOL, address, c_void_p()) else Origin.MALLOC
