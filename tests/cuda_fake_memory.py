"""Allocations of the fake CUDA driver, their attributes, and CUDA IPC.

The bytes are in a memfd, so that another process can map them through /proc; addresses are made up, differ in each
process, and are given again as soon as they are free.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import mmap
import os
import struct
from bisect import bisect_right
from ctypes import c_int, c_size_t, c_uint, c_uint64, c_void_p
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from cuda_fake_core import INVALID_VALUE, POISONED, Misuse, Refused, put

from raynixl.cuda import Origin
from raynixl.memory import address_of

if TYPE_CHECKING:
    from cuda_fake import FakeCuda

OUT_OF_MEMORY, INVALID_HANDLE = 2, 400
_DEVICE_POINTER = 3
TOTAL_NBYTES = 8 << 30
_GRAIN = 2 << 20
_BASE = 0x2000_0000_0000
_HANDLE = struct.Struct("<8sIIQQ16s16x")
_MAGIC = b"FAKECUDA"
_serials = itertools.count(1)
Bytes = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(eq=False)
class Block:
    """One allocation, or one of another process that was opened here."""

    device: int
    context: int
    nbytes: int
    origin: Origin = Origin.MALLOC
    handle_types: int = 0
    address: int = 0
    fd: int = -1
    opened: bytes = b""
    """The handle it was opened by, if it is another process's."""
    is_hidden: bool = False
    """Whether its GPU is none of this process: it is reached from the context that has opened it."""
    is_users: bool = False
    serial: int = field(default_factory=lambda: next(_serials))
    mapping: mmap.mmap | None = None
    base: int = 0
    """The address of the mapping's first byte: pieces of virtual memory share one mapping."""

    @property
    def end(self) -> int:
        """The address behind it."""
        return self.address + self.nbytes

    @property
    def name(self) -> str:
        """What messages call it."""
        kind = "memory of a peer" if self.opened else "memory"
        return f"{kind} of {self.nbytes} bytes at {self.address:#x}"


def pack(block: Block, uuid: bytes, *, serial: int) -> bytes:
    """Return a handle by which other processes find the bytes."""
    return _HANDLE.pack(_MAGIC, os.getpid(), block.fd, serial, block.nbytes, uuid)


def unpack(handle: bytes) -> tuple[int, int, int, int, bytes]:
    """Return process, descriptor, serial, size and GPU of a handle."""
    magic, pid, fd, serial, nbytes, uuid = _HANDLE.unpack(handle)
    if magic != _MAGIC:
        raise Refused(INVALID_VALUE)
    return pid, fd, serial, nbytes, uuid


def open_bytes(pid: int, fd: int, serial: int) -> int:
    """Open another process's memfd; it must be the one that the handle meant."""
    path = f"/proc/{pid}/fd/{fd}"
    try:
        target = os.readlink(path)
        if not target.startswith("/memfd:fakecuda-") or (serial and f"fakecuda-{serial} " not in target):
            raise Refused(INVALID_VALUE)
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        raise Refused(INVALID_VALUE) from None


def unmap(block: Block) -> None:
    """Unmap a block's bytes, unless a test still looks at them."""
    mapping, block.mapping = block.mapping, None
    if mapping is not None:
        with contextlib.suppress(BufferError):
            mapping.close()


class Memory:
    """Everything that is allocated, by address."""

    def __init__(self, fake: FakeCuda, repeats_handles: bool) -> None:
        self._fake = fake
        self._repeats_handles = repeats_handles
        self.blocks: dict[int, Block] = {}
        self._starts: list[int] = []
        self._gone: dict[int, tuple[int, str]] = {}
        self._slots: dict[int, list[int]] = {}
        self._next = _BASE + (os.getpid() % 4096) * (1 << 33)

    def add(self, block: Block, fd: int = -1) -> Block:
        """Give a block an address and bytes: fresh ones, or those of a descriptor."""
        if (
            sum(one.nbytes for one in list(self.blocks.values()) if one.device == block.device) + block.nbytes
            > TOTAL_NBYTES
        ):
            raise Refused(OUT_OF_MEMORY)
        block.fd = fd
        if fd < 0:
            block.fd = os.memfd_create(f"fakecuda-{block.serial}", os.MFD_CLOEXEC)
            os.ftruncate(block.fd, block.nbytes)
        if block.mapping is None:
            block.mapping = mmap.mmap(block.fd, block.nbytes)
            if not block.address:
                block.address = address_of(block.mapping) if self._fake.is_host else self.reserve(block.nbytes)
            block.base = block.address
            if fd < 0:  # what CUDA gives is not zero
                edge = min(block.nbytes, POISONED)
                block.mapping[:edge] = block.mapping[-edge:] = b"\xcd" * edge
        self.blocks[block.address] = block
        self._starts = sorted(self.blocks)
        self._gone.pop(block.address, None)
        return block

    def reserve(self, nbytes: int) -> int:
        """Return a free address, rather one that was in use before."""
        span = -(-nbytes // _GRAIN) * _GRAIN
        if self._slots.get(span):
            return self._slots[span].pop()
        address, self._next = self._next, self._next + span + _GRAIN  # nothing lies between two blocks
        return address

    def remove(self, block: Block, *, word: str = "freed") -> None:
        """Take a block's bytes away; nothing that is queued may need them."""
        if pending := self._fake.work.pending_on(block):
            raise Misuse(f"{block.name} is {word} while {pending} is in flight")
        del self.blocks[block.address]
        self._starts = sorted(self.blocks)
        os.close(block.fd)
        self._gone[block.address] = (block.nbytes, word)
        if block.origin is not Origin.VIRTUAL:
            unmap(block)
            if not self._fake.is_host:
                self.give_back(block.address, block.nbytes)

    def give_back(self, address: int, nbytes: int) -> None:
        """Have an address be given again."""
        self._slots.setdefault(-(-nbytes // _GRAIN) * _GRAIN, []).append(address)

    def close(self) -> None:
        """Give all bytes back, whoever had them."""
        for block in list(self.blocks.values()):
            unmap(block)
            os.close(block.fd)
        self.blocks.clear()

    def find(self, address: int) -> Block | None:
        """Return the block that an address lies in."""
        number = bisect_right(self._starts, address) - 1
        if number < 0:
            return None
        block = self.blocks[self._starts[number]]
        return block if address < block.address + block.nbytes else None

    def at(self, address: int) -> Block:
        """Return the block that an address lies in, which must be alive."""
        block = self.find(address)
        if block is None:
            for start, (size, word) in self._gone.items():
                if start <= address < start + size:
                    raise Misuse(f"memory at {address:#x} is used after it was {word}")
            raise Misuse(f"no memory of a GPU is at {address:#x}")
        return block

    def spanned(self, address: int, nbytes: int) -> list[Block]:
        """Return the blocks that a range lies in: one, or adjoining pieces of virtual memory."""
        found = [self.at(address)]
        while found[-1].end < address + nbytes:
            following = self.blocks.get(found[-1].end)
            if following is None or following.mapping is not found[0].mapping:
                raise Misuse(f"{nbytes} bytes at {address:#x} go beyond {found[-1].name}")
            found.append(following)
        return found

    def view(self, address: int, nbytes: int, context: int | None = None) -> Bytes:
        """Return bytes of GPUs or pinned ones, which a context must reach."""
        pinned = self._fake.host.view(address, nbytes)
        if pinned is not None:
            return pinned
        found = self.spanned(address, nbytes)
        for block in found:
            if context is not None and not self._is_reached(context, block):
                raise Misuse(f"{block.name} is on GPU {block.device}, which that context does not reach")
        assert found[0].mapping is not None
        start = address - found[0].base
        return np.frombuffer(found[0].mapping, np.uint8)[start : start + nbytes]

    def _is_reached(self, context: int, block: Block) -> bool:
        """Peer access extends to what cudaMalloc made on GPUs that are seen, and to nothing else."""
        devices = self._fake.devices
        has_peers = block.origin is Origin.MALLOC and not block.is_hidden
        same = devices.contexts.get(context) == devices.contexts.get(block.context)
        return devices.reaches(context, block.context) if has_peers else same

    def leaks(self) -> list[str]:
        """What was neither freed nor closed."""
        return [
            f"{one.name} was never {'closed' if one.opened else 'freed'}"
            for one in list(self.blocks.values())
            if not one.is_users
        ]

    def _cuMemAlloc_v2(self, out: int, nbytes: int) -> None:  # noqa: N802
        context = self._fake.devices.current
        if nbytes == 0:
            raise Refused(INVALID_VALUE)
        block = self.add(Block(device=self._fake.devices.contexts[context], context=context, nbytes=nbytes))
        put(out, c_uint64, block.address)

    def _cuMemFree_v2(self, address: int) -> None:  # noqa: N802
        block = self.at(address)
        _ = self._fake.devices.current
        if block.address != address or block.opened or block.origin is not Origin.MALLOC:
            raise Misuse(f"{block.name} is not freed by cuMemFree at {address:#x}")
        self.remove(block)

    def _cuMemGetInfo_v2(self, left: int, total: int) -> None:  # noqa: N802
        device = self._fake.devices.contexts[self._fake.devices.current]
        used = sum(one.nbytes for one in list(self.blocks.values()) if one.device == device)
        put(left, c_size_t, TOTAL_NBYTES - used)
        put(total, c_size_t, TOTAL_NBYTES)

    def _cuIpcGetMemHandle(self, out: int, address: int) -> None:  # noqa: N802
        block = self.at(address)
        _ = self._fake.devices.current
        if block.opened or block.origin is not Origin.MALLOC:
            raise Refused(INVALID_VALUE)
        serial = 0 if self._repeats_handles else block.serial
        ctypes.memmove(out, pack(block, self._fake.devices.uuid(block.device), serial=serial), 64)

    def _cuIpcOpenMemHandle_v2(self, out: int, handle: Any, flags: int) -> None:  # noqa: N802
        raw = bytes(handle)
        if flags != 1:
            raise Refused(INVALID_VALUE)
        pid, fd, serial, nbytes, uuid = unpack(raw)
        if pid == os.getpid():
            raise Misuse("a handle is opened in the process that made it")
        context = self._fake.devices.current
        device = self._fake.devices.find(uuid)
        contexts = self._fake.devices.contexts
        opened = [one for one in list(self.blocks.values()) if one.opened == raw]
        if any(contexts[one.context] == contexts[context] for one in opened):
            raise Misuse("a handle is opened twice for one GPU")
        theirs = open_bytes(pid, fd, serial)
        where = device if device >= 0 else self._fake.devices.contexts[context]
        block = Block(where, context, nbytes, opened=raw, is_hidden=device < 0)
        put(out, c_uint64, self.add(block, theirs).address)

    def _cuIpcCloseMemHandle(self, address: int) -> None:  # noqa: N802
        block = self.at(address)
        if not block.opened or block.origin is not Origin.MALLOC or block.address != address:
            raise Misuse(f"{block.name} is closed, but is none that was opened")
        if self._fake.devices.current != block.context:
            raise Misuse(f"{block.name} is closed in another context than it was opened in")
        self.remove(block, word="closed")

    def _cuPointerGetAttribute(self, out: int, attribute: int, address: int) -> None:  # noqa: N802
        values = self._fake.host.attributes(address) or self._attributes(address)
        if attribute not in values or (attribute == _DEVICE_POINTER and not self._fake.devices.stack):
            raise Refused(INVALID_VALUE)
        kinds = {1: c_void_p, 2: c_uint, 8: c_uint, 9: c_int, 10: c_int, 12: c_size_t, 17: c_void_p, 18: c_size_t}
        put(out, kinds.get(attribute, c_uint64), values[attribute])

    def _attributes(self, address: int) -> dict[int, int]:
        block = self.find(address)
        if block is None:
            raise Refused(INVALID_VALUE)
        is_malloc = block.origin is Origin.MALLOC and not block.opened
        return {
            1: 0 if block.origin is Origin.VIRTUAL else block.context, 2: 2, 3: address, 7: block.serial,
            8: int(block.origin is Origin.MANAGED), 9: block.device, 10: int(is_malloc), 11: block.address,
            12: block.nbytes, 14: block.handle_types, 16: 3, 17: 0xF001 if block.origin is Origin.POOL else 0,
            18: block.nbytes, 19: block.address,
        }  # fmt: skip
