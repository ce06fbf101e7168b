"""Memory of the driver's: on GPUs, lent to other processes, and pinned in the host.

Thin: each function is one of the driver's, its errors typed. All of it needs a current context (`cuda.on(device)`).
"""

from __future__ import annotations

import ctypes
from ctypes import byref, c_size_t, c_uint64, c_void_p

from raynixl.cuda.library import call, check, failure
from raynixl.cuda.prototypes import Handle
from raynixl.errors import BackendUnavailable

_LAZY_PEER_ACCESS = 1  # CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS, the one value that is allowed
_PORTABLE_AND_MAPPED = 1 | 2  # CU_MEMHOSTREGISTER_PORTABLE | _DEVICEMAP: every context reaches it
_FOREIGN = (
    "its owner has ended or freed it, or the two do not share a host: "
    "containers need a common IPC and PID namespace (--ipc=host --pid=host)"
)


def alloc(nbytes: int) -> int:
    """Return the address of fresh memory of a GPU, its bytes undefined. To be freed.

    Raises:
        RangeError: the GPU has not that much left.
    """
    address = c_uint64()
    check("cuMemAlloc_v2", byref(address), nbytes, what=f"{nbytes} bytes")
    return address.value


def free(address: int) -> None:
    """Free memory of a GPU. The driver waits for whatever works with it."""
    check("cuMemFree_v2", address, what=f"{address:#x}")


def memory_info() -> tuple[int, int]:
    """Return how many bytes of the GPU are free, and how many it has."""
    left, total = c_size_t(), c_size_t()
    check("cuMemGetInfo_v2", byref(left), byref(total))
    return left.value, total.value


def memset_async(address: int, value: int, nbytes: int, stream: int) -> None:
    """Set bytes of a GPU, after what is on the stream."""
    check("cuMemsetD8Async", address, value, nbytes, stream, what=f"{nbytes} bytes at {address:#x}")


def ipc_export(address: int) -> bytes:
    """Return the handle by which other processes of the host open the whole allocation that memory lies in."""
    handle = Handle()
    check("cuIpcGetMemHandle", byref(handle), address, what=f"{address:#x}")
    return bytes(handle)


def ipc_open(handle: bytes) -> int:
    """Return where another process's allocation begins here. To be closed, in the same context.

    The memory stays until then, even if its owner ends. CUDA opens no handle in the process that made it.

    Raises:
        BackendUnavailable: CUDA does not open it.
    """
    address = c_uint64()
    code = call("cuIpcOpenMemHandle_v2", byref(address), Handle.from_buffer_copy(handle), _LAZY_PEER_ACCESS)
    if code:
        raise _foreign(code, "cuIpcOpenMemHandle", "a peer's memory")
    return address.value


def ipc_close(address: int) -> None:
    """Let go of another process's allocation; nothing may use it any more."""
    check("cuIpcCloseMemHandle", address, what=f"{address:#x}")


def ipc_export_event(event: int) -> bytes:
    """Return the handle by which other processes of the host open an event that was created as shared."""
    handle = Handle()
    check("cuIpcGetEventHandle", byref(handle), event)
    return bytes(handle)


def ipc_open_event(handle: bytes) -> int:
    """Return another process's event. To be destroyed like one of ours.

    Raises:
        BackendUnavailable: CUDA does not open it.
    """
    event = c_void_p()
    code = call("cuIpcOpenEventHandle", byref(event), Handle.from_buffer_copy(handle))
    if code:
        raise _foreign(code, "cuIpcOpenEventHandle", "a peer's event")
    return event.value or 0


def host_alloc(nbytes: int) -> int:
    """Return the address of fresh pinned host memory, which all GPUs reach. To be freed."""
    address = c_void_p()
    check("cuMemHostAlloc", byref(address), nbytes, _PORTABLE_AND_MAPPED, what=f"{nbytes} bytes")
    return address.value or 0


def host_free(address: int) -> None:
    """Free what `host_alloc` gave; no GPU uses it any more."""
    check("cuMemFreeHost", address, what=f"{address:#x}")


def host_register(address: int, nbytes: int) -> None:
    """Pin host memory, so that all GPUs reach it. To be unregistered before it is unmapped."""
    hint = "these pages are pinned already, or not to be locked: see ulimit -l and the container's memory limit"
    check(
        "cuMemHostRegister_v2", address, nbytes, _PORTABLE_AND_MAPPED, what=f"{nbytes} bytes at {address:#x}", hint=hint
    )


def host_unregister(address: int) -> None:
    """Unpin what was registered at that address; no GPU uses it any more."""
    check("cuMemHostUnregister", address, what=f"{address:#x}")


def host_device_address(address: int) -> int:
    """Return where GPUs reach pinned host memory."""
    found = c_uint64()
    check("cuMemHostGetDevicePointer_v2", byref(found), address, 0, what=f"{address:#x}")
    return found.value


def host_bytes(address: int, nbytes: int) -> memoryview:
    """Return the bytes of host memory that somebody else keeps alive."""
    return memoryview((ctypes.c_ubyte * nbytes).from_address(address)).cast("B")


def _foreign(code: int, name: str, what: str) -> BackendUnavailable:
    return BackendUnavailable(failure(code, name, what=what).message, hint=_FOREIGN)
