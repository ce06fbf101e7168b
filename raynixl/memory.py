"""Memory: the address, size, kind and owner behind an object that a user wants to register."""

from __future__ import annotations

import ctypes
import enum
import errno
import fcntl
import functools
import mmap
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from operator import index
from typing import Any

import numpy as np

from raynixl import cgroup, cuda
from raynixl.errors import ConfigError, RangeError

PAGE_NBYTES = mmap.PAGESIZE
POPULATE_NBYTES = 1 << 30
"""Mappings up to this size get their page tables filled at once: half the price of faulting them one by one."""

_MADV_POPULATE_WRITE = 23
_TOUCH_NBYTES = 64 << 20
_MAX_TOUCHERS = 16
_MOST_GPUS = 1 << 16
_SEALS = 0x0001 | 0x0002 | 0x0004  # F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW: a peer's mapping can never SIGBUS


class MemoryKind(enum.Enum):
    """Where bytes live."""

    DRAM = "dram"
    VRAM = "vram"
    FILE = "file"
    OBJECT = "object"


@dataclass(frozen=True, slots=True)
class MemorySpan:
    """Bare memory by address, for C libraries. The caller keeps it mapped while it is registered."""

    address: int
    nbytes: int
    writable: bool = True


@dataclass(frozen=True, slots=True)
class Memory:
    """A span of memory; holds on to `owner` so that it stays valid. `fd` is its memfd, or -1."""

    kind: MemoryKind
    device: int
    address: int
    nbytes: int
    writable: bool
    owner: Any = field(repr=False)  # may be large, or a GPU's: showing it would wait for the device
    fd: int = -1


def resolve(source: Any) -> Memory:
    """Return the memory behind a tensor, array, buffer or `MemorySpan`; no bytes are copied.

    Raises:
        ConfigError: the object has no memory of its own that can be registered, or is not contiguous.
        RangeError: it is empty.
    """
    if isinstance(source, MemorySpan):
        memory = _from_span(source)
    elif type(source).__module__.split(".")[0] == "torch" or hasattr(source, "data_ptr"):
        memory = _from_torch(source)
    elif hasattr(source, "__cuda_array_interface__"):
        memory = _from_cuda(source)
    elif isinstance(source, np.ndarray):
        memory = _from_numpy(source)
    else:
        memory = _from_buffer(source)
    if memory.nbytes <= 0:
        raise RangeError("memory of no bytes cannot be registered", hint="leave empty tensors out")
    return memory


def _refuse_strided() -> ConfigError:
    return ConfigError("memory to register is not contiguous", hint="register tensor.contiguous() or its base")


def _no_memory(source: Any) -> ConfigError:
    return ConfigError(
        f"{type(source).__name__} has no memory to register",
        hint="give a torch, numpy or cupy array, a buffer, or rx.MemorySpan",
    )


def _from_span(span: MemorySpan) -> Memory:
    address, nbytes = span.address, span.nbytes
    if not (hasattr(address, "__index__") and hasattr(nbytes, "__index__")):
        raise RangeError(f"{span} is not given in whole numbers", hint="give an address and a length in bytes")
    if not (0 < address < 1 << 64 and 0 < nbytes < 1 << 63 and address + nbytes <= 1 << 64):
        raise RangeError(
            f"no memory of {nbytes} bytes lies at {address:#x}",
            hint="give the address and length of memory that exists",
        )
    return Memory(MemoryKind.DRAM, 0, index(address), index(nbytes), bool(span.writable), span)


def _from_torch(tensor: Any) -> Memory:
    try:
        device, is_contiguous = tensor.device, tensor.is_contiguous()
        nbytes = tensor.numel() * tensor.element_size()
        address = tensor.data_ptr() if device.type in ("cpu", "cuda") else 0
    except (AttributeError, TypeError, RuntimeError) as exc:  # a module, a dtype; a sparse or fake tensor
        raise _no_memory(tensor) from exc
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"tensors on {device} cannot be registered", hint="move it to cpu or cuda")
    if not is_contiguous:
        raise _refuse_strided()
    kind = MemoryKind.DRAM if device.type == "cpu" else MemoryKind.VRAM
    # The storage, not the tensor: `parameter.data = other` lets go of what is registered.
    owner = tensor.untyped_storage() if hasattr(tensor, "untyped_storage") else tensor
    return Memory(kind, 0 if device.index is None else device.index, address, nbytes, True, owner)


def _from_cuda(array: Any) -> Memory:
    face = array.__cuda_array_interface__
    if face.get("strides") is not None:
        raise _refuse_strided()
    nbytes = int(np.prod(face["shape"], dtype=np.int64)) * np.dtype(face["typestr"]).itemsize
    address, device = int(face["data"][0]), getattr(getattr(array, "device", None), "id", None)
    number = cuda.device_of(address) if device is None else int(device)
    return Memory(MemoryKind.VRAM, number, address, nbytes, not face["data"][1], array)


def _from_numpy(array: np.ndarray[Any, Any]) -> Memory:
    if not (array.flags.c_contiguous or array.flags.f_contiguous):
        raise _refuse_strided()
    if array.dtype.hasobject:
        raise ConfigError("arrays of Python objects cannot be registered", hint="use a numeric dtype")
    return Memory(MemoryKind.DRAM, 0, array.ctypes.data, array.nbytes, array.flags.writeable, array)


def _from_buffer(source: Any) -> Memory:
    try:
        view = memoryview(source)
    except TypeError:
        try:
            return _from_numpy(np.from_dlpack(source))
        except (TypeError, AttributeError, BufferError, RuntimeError, ValueError) as exc:
            raise _no_memory(source) from exc
    except (BufferError, ValueError) as exc:  # a buffer that is closed
        raise _no_memory(source) from exc
    if not view.contiguous:
        raise _refuse_strided()
    if view.nbytes == 0:
        raise RangeError("memory of no bytes cannot be registered", hint="leave empty tensors out")
    flat = np.frombuffer(view, np.uint8)
    return Memory(MemoryKind.DRAM, 0, flat.ctypes.data, view.nbytes, not view.readonly, flat)


@functools.cache
def _madvise() -> Callable[[int, int, int], int]:
    call = ctypes.CDLL(None, use_errno=True).madvise
    call.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    call.restype = ctypes.c_int
    return call


def is_writable(address: int, nbytes: int) -> bool:
    """Whether the first and the last page of mapped memory may be written; True where the kernel cannot tell.

    Asked by having the kernel bring those two pages in for writing (Linux 5.14). Whoever claims that protected memory
    is writable must be found out here: one kind of write to it, /proc/pid/mem, passes the protection of pages.
    """
    first, last = address - address % PAGE_NBYTES, address + nbytes - 1
    pages = {first, last - last % PAGE_NBYTES}
    return all(_madvise()(page, PAGE_NBYTES, _MADV_POPULATE_WRITE) == 0 for page in pages) or not _can_tell()


@functools.cache
def _can_tell() -> bool:
    with mmap.mmap(-1, PAGE_NBYTES) as page:
        return _madvise()(address_of(page), PAGE_NBYTES, _MADV_POPULATE_WRITE) == 0


def address_of(mapping: mmap.mmap) -> int:
    """Return where a writable mapping lies; the mapping can still be closed afterwards."""
    return ctypes.addressof(ctypes.c_char.from_buffer(mapping))


def map_shared(fd: int, nbytes: int) -> mmap.mmap:
    """Map a memfd for reading and writing, page tables filled for all but the largest."""
    populate = mmap.MAP_POPULATE if nbytes <= POPULATE_NBYTES else 0
    mapping = mmap.mmap(fd, nbytes, flags=mmap.MAP_SHARED | populate)
    if nbytes >= 1 << 21:
        _advise_huge(mapping)
    return mapping


def _advise_huge(mapping: mmap.mmap) -> None:
    try:
        mapping.madvise(mmap.MADV_HUGEPAGE)
    except OSError:
        return  # kernels without THP for shared memory say EINVAL; the mapping works all the same


def available_nbytes() -> int:
    """Return how much memory this host, or container, can still give without swapping."""
    left = cgroup.left_nbytes()
    with open("/proc/meminfo", encoding="ascii") as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                return min(left, int(line.split()[1]) * 1024)
    return left


def allocate(nbytes: int) -> Memory:
    """Return fresh zeroed memory in a sealed memfd, mapped and touched. `fd` is the caller's to close.

    Views keep the memory alive after that; nothing appears in any file system.

    Raises:
        RangeError: the size is not positive or more than the host can give.
    """
    if not hasattr(nbytes, "__index__") or not 0 < nbytes < 1 << 62:
        raise RangeError(
            f"cannot allocate {nbytes!r:.40} bytes", hint="give a positive size that fits this host's memory"
        )
    fd = _memfd(nbytes)
    try:
        os.ftruncate(fd, nbytes)
        fcntl.fcntl(fd, 1024 + 9, _SEALS)  # F_ADD_SEALS
        mapping = mmap.mmap(fd, nbytes, flags=mmap.MAP_SHARED)
        if nbytes >= 1 << 21:
            _advise_huge(mapping)
        if not _touch(address_of(mapping), nbytes):
            os.posix_fallocate(fd, 0, nbytes)
    except (OSError, ValueError, OverflowError) as exc:
        os.close(fd)
        raise RangeError(f"cannot allocate {nbytes} bytes: {exc}", hint="ask for less, or free memory") from exc
    return Memory(MemoryKind.DRAM, 0, address_of(mapping), nbytes, True, mapping, fd)


def _memfd(nbytes: int) -> int:
    try:
        free = available_nbytes()
        if nbytes > free:
            raise RangeError(f"cannot allocate {nbytes} bytes: {free} are free", hint="ask for less")
        return os.memfd_create("raynixl", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as exc:
        hint = "raise `ulimit -n`, or deregister what is not needed: each arena takes a descriptor"
        raise RangeError(f"cannot allocate {nbytes} bytes: {exc.strerror}", hint=hint) from exc


def allocate_on(device: int, nbytes: int) -> Memory:
    """Return fresh zeroed memory of a GPU, which lives for as long as something holds on to its `owner`.

    Raises:
        ConfigError: there is no such GPU, or `device` is no number.
        RangeError: the size is not positive or more than the GPU can give.
    """
    if not hasattr(nbytes, "__index__") or not 0 < nbytes < 1 << 62:
        raise RangeError(f"cannot allocate {nbytes!r:.40} bytes", hint="give a positive size that fits the GPU")
    if isinstance(device, bool) or not hasattr(device, "__index__") or not 0 <= device < _MOST_GPUS:
        raise ConfigError(
            f"device={device!r:.40} is no number of a GPU", hint="give 0, 1, ... of those in CUDA_VISIBLE_DEVICES"
        )
    if not cuda.has_driver():
        raise ConfigError("memory of a GPU needs the NVIDIA driver, which is not here", hint="see `raynixl doctor`")
    arena = cuda.arena(index(nbytes), index(device))
    return Memory(MemoryKind.VRAM, index(device), arena.address, index(nbytes), True, arena)


def _touch(address: int, nbytes: int) -> bool:
    """Have the kernel clear and map fresh memory, on several cores; False if it cannot at all (before Linux 5.14).

    Memory that is not to be had fails here, not by SIGBUS at some later touch.

    Raises:
        OSError: there is not enough.
    """

    def touch(start: int) -> int:
        failed = _madvise()(address + start, min(_TOUCH_NBYTES, nbytes - start), _MADV_POPULATE_WRITE)
        return ctypes.get_errno() if failed else 0

    code = touch(0)
    if code == errno.EINVAL:
        return False
    rest = range(_TOUCH_NBYTES, nbytes, _TOUCH_NBYTES)
    if rest and not code:
        with ThreadPoolExecutor(min(len(os.sched_getaffinity(0)), _MAX_TOUCHERS, len(rest))) as pool:
            try:
                codes = list(pool.map(touch, rest))
            except RuntimeError:  # the process may have no more threads
                codes = [touch(start) for start in rest]
        code = next(filter(None, codes), 0)
    if code:
        raise OSError(code, os.strerror(code))
    return True


def check_sealed(fd: int, nbytes: int) -> None:
    """Refuse a memfd from a peer that could shrink under our mapping or is smaller than promised.

    Raises:
        RangeError: it is unsealed or too small.
    """
    seals = fcntl.fcntl(fd, 1024 + 10)  # F_GET_SEALS
    size = os.fstat(fd).st_size
    if seals & 0x0002 == 0 or size < nbytes:
        raise RangeError(f"a peer's arena of {size} bytes is not sealed, or smaller than its {nbytes}")
