"""Virtual memory of the fake CUDA driver: chunks that are mapped into reserved ranges, and fabric handles of them."""

from __future__ import annotations

import ctypes
import mmap
import os
from ctypes import c_uint64, c_void_p
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cuda_fake_core import INVALID_VALUE, Misuse, Refused, put
from cuda_fake_memory import Block, open_bytes, pack, unpack

from raynixl.cuda import FABRIC, Origin
from raynixl.cuda.prototypes import Access, Properties

if TYPE_CHECKING:
    from cuda_fake import FakeCuda

NOT_SUPPORTED = 801
_READ_WRITE = 3
_GRAIN = 2 << 20
_SHARED_FIXED, _ANONYMOUS = 0x11, 0x20


@dataclass(eq=False)
class Chunk:
    """Memory without an address, counted."""

    fd: int
    nbytes: int
    device: int
    handle_types: int
    serial: int
    uuid: bytes
    is_users: bool = False
    references: int = 1


@dataclass(eq=False)
class Reserved:
    """Addresses that chunks are mapped to."""

    address: int
    nbytes: int
    mapping: mmap.mmap
    is_users: bool = False


class Chunks:
    """Chunks by their handle, and the ranges where they are mapped."""

    def __init__(self, fake: FakeCuda) -> None:
        self._fake = fake
        self._chunks: dict[int, Chunk] = {}
        self._reserved: dict[int, Reserved] = {}
        self._mapped: dict[int, int] = {}
        """Handles of the chunks by the address where they are mapped."""
        self._next = 0x4A
        self.exports_fabric = True

    def make(self, sizes: tuple[int, ...], device: int, context: int, handle_types: int) -> int:
        """Make virtual memory as torch's expandable segments do: chunks side by side."""
        address = self._reserve(sum(sizes)).address
        self._reserved[address].is_users = True
        at = address
        for size in sizes:
            block = Block(device=device, context=context, nbytes=size, handle_types=handle_types)
            fd = os.memfd_create(f"fakecuda-{block.serial}", os.MFD_CLOEXEC)
            os.ftruncate(fd, size)
            uuid = self._fake.devices.uuid(device)
            handle = self._add(Chunk(fd, size, device, handle_types, block.serial, uuid, is_users=True))
            self._map(handle, at, context, is_users=True)
            at += size
        return address

    def leaks(self) -> list[str]:
        """What was neither released nor unmapped."""
        found = [
            f"a chunk of {one.nbytes} bytes was never released" for one in self._chunks.values()
            if one.references > (1 if one.is_users else 0)
        ]  # fmt: skip
        return found + [
            f"{one.nbytes} addresses at {one.address:#x} stay reserved"
            for one in self._reserved.values()
            if not one.is_users
        ]

    def _add(self, chunk: Chunk) -> int:
        handle, self._next = self._next, self._next + 1
        self._chunks[handle] = chunk
        return handle

    def _reserve(self, nbytes: int) -> Reserved:
        made = Reserved(self._fake.memory.reserve(nbytes), nbytes, mmap.mmap(-1, nbytes))
        self._reserved[made.address] = made
        return made

    def _range(self, address: int, nbytes: int) -> Reserved:
        for one in self._reserved.values():
            if one.address <= address and address + nbytes <= one.address + one.nbytes:
                return one
        raise Misuse(f"{address:#x} was not reserved")

    def _map(self, handle: int, address: int, context: int, *, is_users: bool = False) -> None:
        chunk, reserved = self._chunks[handle], self._range(address, self._chunks[handle].nbytes)
        start = ctypes.addressof(ctypes.c_char.from_buffer(reserved.mapping)) + address - reserved.address
        _mmap_fixed(start, chunk.nbytes, _SHARED_FIXED, chunk.fd)
        block = Block(
            device=chunk.device, context=context, nbytes=chunk.nbytes, origin=Origin.VIRTUAL,
            handle_types=chunk.handle_types, address=address, mapping=reserved.mapping, base=reserved.address,
            is_users=is_users, serial=chunk.serial,
        )  # fmt: skip
        self._fake.memory.add(block, os.dup(chunk.fd))
        self._mapped[address] = handle

    def _release(self, handle: int) -> None:
        if handle not in self._chunks:
            raise Misuse("a chunk is released more often than it was retained")
        chunk = self._chunks[handle]
        chunk.references -= 1
        if chunk.references == 0 and handle not in self._mapped.values():
            os.close(chunk.fd)
            del self._chunks[handle]

    def close(self) -> None:
        """Give all bytes back."""
        for chunk in self._chunks.values():
            os.close(chunk.fd)
        self._chunks.clear()

    def _cuMemRetainAllocationHandle(self, out: int, address: int | None) -> None:  # noqa: N802
        block = self._fake.memory.find(address or 0)
        if block is None or block.address not in self._mapped:
            raise Refused(INVALID_VALUE)
        handle = self._mapped[block.address]
        self._chunks[handle].references += 1
        put(out, c_uint64, handle)

    def _cuMemRelease(self, handle: int) -> None:  # noqa: N802
        self._release(handle)

    def _cuMemCreate(self, out: int, nbytes: int, wanted: int | None, flags: int) -> None:  # noqa: N802
        properties = Properties.from_address(wanted or 0)
        if properties.type != 1 or properties.location.type != 1 or nbytes % _GRAIN:
            raise Refused(INVALID_VALUE)
        if properties.handle_types & FABRIC and not self.exports_fabric:
            raise Refused(NOT_SUPPORTED)
        device, serial = properties.location.id, Block(0, 0, nbytes).serial
        fd = os.memfd_create(f"fakecuda-{serial}", os.MFD_CLOEXEC)
        os.ftruncate(fd, nbytes)
        made = Chunk(fd, nbytes, device, properties.handle_types, serial, self._fake.devices.uuid(device))
        put(out, c_uint64, self._add(made))

    def _cuMemExportToShareableHandle(self, out: int, handle: int, kind: int, flags: int) -> None:  # noqa: N802
        chunk = self._chunks.get(handle)
        if chunk is None or kind != FABRIC or not chunk.handle_types & FABRIC:
            raise Refused(INVALID_VALUE)
        if not self.exports_fabric:
            raise Refused(NOT_SUPPORTED)
        block = Block(chunk.device, 0, chunk.nbytes, fd=chunk.fd)
        ctypes.memmove(out, pack(block, chunk.uuid, serial=chunk.serial), 64)

    def _cuMemImportFromShareableHandle(self, out: int, handle: int | None, kind: int) -> None:  # noqa: N802
        if kind != FABRIC or not handle:
            raise Refused(INVALID_VALUE)
        pid, fd, serial, nbytes, uuid = unpack(ctypes.string_at(handle, 64))
        if pid == os.getpid():
            raise Misuse("a fabric handle is opened in the process that made it")
        device = self._fake.devices.find(uuid)
        put(out, c_uint64, self._add(Chunk(open_bytes(pid, fd, serial), nbytes, device, FABRIC, serial, uuid)))

    def _cuMemAddressReserve(self, out: int, nbytes: int, alignment: int, address: int, flags: int) -> None:  # noqa: N802
        put(out, c_uint64, self._reserve(nbytes).address)

    def _cuMemAddressFree(self, address: int, nbytes: int) -> None:  # noqa: N802
        reserved = self._reserved.get(address)
        if reserved is None or reserved.nbytes != nbytes:
            raise Misuse(f"no {nbytes} addresses were reserved at {address:#x}")
        if any(address <= one < address + nbytes for one in self._mapped):
            raise Misuse("addresses are given back while memory is mapped there")
        del self._reserved[address]
        self._fake.memory.give_back(address, nbytes)

    def _cuMemMap(self, address: int, nbytes: int, offset: int, handle: int, flags: int) -> None:  # noqa: N802
        chunk = self._chunks.get(handle)
        if chunk is None or offset or nbytes != chunk.nbytes:
            raise Refused(INVALID_VALUE)
        self._map(handle, address, -1)

    def _cuMemSetAccess(self, address: int, nbytes: int, wanted: int | None, count: int) -> None:  # noqa: N802
        access = Access.from_address(wanted or 0)
        if access.flags != _READ_WRITE or access.location.type != 1 or count != 1:
            raise Refused(INVALID_VALUE)
        for block in self._fake.memory.spanned(address, nbytes):
            block.context = self._fake.devices.retain(access.location.id)

    def _cuMemUnmap(self, address: int, nbytes: int) -> None:  # noqa: N802
        for block in self._fake.memory.spanned(address, nbytes):
            handle = self._mapped.pop(block.address, None)
            if handle is None:
                raise Misuse(f"nothing is mapped at {address:#x}")
            reserved = self._range(block.address, block.nbytes)
            start = ctypes.addressof(ctypes.c_char.from_buffer(reserved.mapping)) + block.address - reserved.address
            self._fake.memory.remove(block, word="unmapped")
            _mmap_fixed(start, block.nbytes, 0x10 | _ANONYMOUS | 2, -1)
            chunk = self._chunks[handle]
            if chunk.references == 0:
                os.close(chunk.fd)
                del self._chunks[handle]


def _mmap_fixed(address: int, nbytes: int, flags: int, fd: int) -> None:
    call = ctypes.CDLL(None, use_errno=True).mmap
    call.restype = c_void_p
    call.argtypes = (c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
    if call(address, nbytes, 3, flags, fd, 0) != address:
        raise OSError(ctypes.get_errno(), "mmap")
