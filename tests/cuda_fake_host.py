"""Pinned host memory of the fake CUDA driver. GPUs see it at addresses of their own, so that mixing them up shows."""

from __future__ import annotations

import ctypes
import mmap
from ctypes import c_uint64, c_void_p
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from cuda_fake_core import INVALID_VALUE, POISONED, Misuse, Refused, put

if TYPE_CHECKING:
    from cuda_fake import FakeCuda

ALREADY_REGISTERED, NOT_REGISTERED = 712, 713
_BASE = 0x4100_0000_0000
_PORTABLE_AND_MAPPED = 3


@dataclass(eq=False)
class Range:
    """Pinned host memory; `mapping` where the driver has allocated it."""

    address: int
    nbytes: int
    device_address: int
    serial: int
    mapping: mmap.mmap | None = None
    is_users: bool = False

    def offset(self, address: int) -> int | None:
        """Where an address of the host or of a GPU lies in it, or None."""
        for start in (self.address, self.device_address):
            if start <= address < start + self.nbytes:
                return address - start
        return None


def is_mapped(address: int) -> bool:
    """Whether a page of this process is mapped."""
    state = ctypes.create_string_buffer(1)
    page = address - address % mmap.PAGESIZE
    return ctypes.CDLL(None).mincore(c_void_p(page), ctypes.c_size_t(1), state) == 0


class Host:
    """What is pinned."""

    def __init__(self, fake: FakeCuda) -> None:
        self._fake = fake
        self.ranges: list[Range] = []
        self._next = _BASE
        self._serial = 1 << 32

    def pin(self, address: int, nbytes: int, mapping: mmap.mmap | None = None) -> Range:
        """Pin memory as the driver does, or as the user's program."""
        self._serial += 1
        seen = address if self._fake.is_host else self._next + address % mmap.PAGESIZE
        made = Range(address, nbytes, seen, self._serial, mapping)
        self._next += (nbytes // mmap.PAGESIZE + 4) * mmap.PAGESIZE
        self.ranges.append(made)
        return made

    def find(self, address: int) -> Range | None:
        """Return the range that an address, of the host or of a GPU, lies in."""
        return next((one for one in self.ranges if one.offset(address) is not None), None)

    def refuse_address_of_host(self, address: int) -> None:
        """Refuse an address by which the host knows pinned memory: kernels reach it at another one."""
        found = self.find(address)
        if found is not None and not found.device_address <= address < found.device_address + found.nbytes:
            raise Misuse(f"a kernel uses the host's address {address:#x} of pinned memory")

    def view(self, address: int, nbytes: int) -> Any:
        """Return pinned bytes, or None if these are none."""
        found = self.find(address)
        if found is None:
            return None
        offset = found.offset(address)
        assert offset is not None
        if offset + nbytes > found.nbytes:
            raise Misuse(f"{nbytes} bytes at {address:#x} go beyond what is pinned")
        if not is_mapped(found.address + offset):
            raise Misuse("pinned memory was unmapped before it was unpinned")
        return np.frombuffer((ctypes.c_ubyte * nbytes).from_address(found.address + offset), np.uint8)

    def attributes(self, address: int) -> dict[int, int] | None:
        """What cuPointerGetAttribute tells of pinned memory."""
        found = self.find(address)
        if found is None:
            return None
        offset = found.offset(address)
        assert offset is not None
        return {1: 0, 2: 1, 3: found.device_address + offset, 4: found.address + offset, 7: found.serial, 8: 0, 9: 0}

    def leaks(self) -> list[str]:
        """What is still pinned."""
        return [f"{one.nbytes} bytes at {one.address:#x} stay pinned" for one in self.ranges if not one.is_users]

    def _take(self, address: int | None, is_ours: bool) -> Range:
        found = next((one for one in self.ranges if one.address == address), None)
        if found is None or (found.mapping is not None) is not is_ours:
            raise Misuse(f"no pinned memory begins at {address or 0:#x}, or it was pinned in another way")
        if pending := self._fake.work.pending_on(found):
            raise Misuse(f"pinned memory at {address:#x} is let go while {pending} is in flight")
        if not is_mapped(found.address):
            raise Misuse("pinned memory was unmapped before it was unpinned")
        self.ranges.remove(found)
        return found

    def _cuMemHostAlloc(self, out: int, nbytes: int, flags: int) -> None:  # noqa: N802
        _ = self._fake.devices.current
        if flags != _PORTABLE_AND_MAPPED:
            raise Misuse("pinned memory that other contexts do not reach")
        mapping, edge = mmap.mmap(-1, nbytes), min(nbytes, POISONED)
        mapping[:edge] = b"\xcd" * edge  # what CUDA gives is not zero
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        put(out, c_void_p, self.pin(address, nbytes, mapping).address)

    def _cuMemFreeHost(self, address: int | None) -> None:  # noqa: N802
        mapping = self._take(address, is_ours=True).mapping
        assert mapping is not None
        mapping.close()

    def _cuMemHostRegister_v2(self, address: int | None, nbytes: int, flags: int) -> None:  # noqa: N802
        _ = self._fake.devices.current
        if not address or not nbytes:
            raise Refused(INVALID_VALUE)
        if flags != _PORTABLE_AND_MAPPED:
            raise Misuse("pinned memory that other contexts do not reach")
        page = mmap.PAGESIZE
        first, last = address // page, (address + nbytes - 1) // page
        for one in self.ranges:
            if one.address // page <= last and first <= (one.address + one.nbytes - 1) // page:
                raise Refused(ALREADY_REGISTERED)
        if not is_mapped(address) or not is_mapped(address + nbytes - 1):
            raise Misuse("memory is pinned that is not mapped")
        self.pin(address, nbytes)

    def _cuMemHostUnregister(self, address: int | None) -> None:  # noqa: N802
        self._take(address, is_ours=False)

    def _cuMemHostGetDevicePointer_v2(self, out: int, address: int | None, flags: int) -> None:  # noqa: N802
        found = self.find(address or 0)
        if found is None or flags:
            raise Refused(INVALID_VALUE)
        offset = found.offset(address or 0)
        assert offset is not None
        put(out, c_uint64, found.device_address + offset)
