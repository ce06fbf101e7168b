"""Memory from cuMemCreate: the chunks that a range is pieced together of, and their handles on an NVLink fabric."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import byref, c_uint64
from dataclasses import dataclass

from raynixl.cuda.library import call, check, failure, give_back
from raynixl.cuda.pointers import FABRIC, piece_at
from raynixl.cuda.prototypes import HANDLE_NBYTES, Access, Handle, Location
from raynixl.errors import BackendUnavailable, RaynixlError

_ON_DEVICE, _READ_WRITE = 1, 3  # CU_MEM_LOCATION_TYPE_DEVICE, CU_MEM_ACCESS_FLAGS_PROT_READWRITE


@dataclass(frozen=True, slots=True)
class Chunk:
    """One piece of virtual memory: where it begins here, its size, and its handle for others."""

    address: int
    nbytes: int
    handle: bytes


def export_chunks(address: int, nbytes: int, *, most: int) -> list[Chunk]:
    """Return fabric handles of the chunks that a range lies in, in order.

    Raises:
        BackendUnavailable: there are more than `most`, or the driver exports none of them.
    """
    chunks: list[Chunk] = []
    at = address
    while at < address + nbytes:
        if len(chunks) == most:
            raise BackendUnavailable(f"the memory is pieced together of more than {most} chunks")
        start, size = piece_at(at)
        chunks.append(Chunk(start, size, _export(at)))
        at = start + size
    return chunks


class MappedChunks:
    """A peer's chunks, mapped side by side; `address` is where the first begins.

    Raises:
        BackendUnavailable: the driver does not take them.
    """

    def __init__(self, chunks: Sequence[tuple[bytes, int]], device: int) -> None:
        self.nbytes = sum(nbytes for _, nbytes in chunks)
        self._mapped = 0
        address = c_uint64()
        check("cuMemAddressReserve", byref(address), self.nbytes, 0, 0, 0, what=f"{self.nbytes} bytes")
        self.address = address.value
        try:
            for handle, nbytes in chunks:
                self._map(handle, nbytes)
            access = Access(Location(_ON_DEVICE, device), _READ_WRITE)
            check("cuMemSetAccess", self.address, self.nbytes, byref(access), 1, what=f"GPU {device}")
        except RaynixlError:
            self.close()
            raise

    def close(self) -> None:
        """Unmap all; nothing uses it any more."""
        if self._mapped:
            give_back("cuMemUnmap", self.address, self._mapped)
            self._mapped = 0
        if self.nbytes:
            give_back("cuMemAddressFree", self.address, self.nbytes)
            self.nbytes = 0

    def _map(self, handle: bytes, nbytes: int) -> None:
        chunk, data = c_uint64(), Handle.from_buffer_copy(handle)
        if code := call("cuMemImportFromShareableHandle", byref(chunk), byref(data), FABRIC):
            raise _foreign(code, "cuMemImportFromShareableHandle")
        try:
            if code := call("cuMemMap", self.address + self._mapped, nbytes, 0, chunk, 0):
                raise _foreign(code, "cuMemMap")
            self._mapped += nbytes
        finally:
            check("cuMemRelease", chunk)  # a mapping keeps it


def _foreign(code: int, name: str) -> BackendUnavailable:
    return BackendUnavailable(
        failure(code, name, what="a peer's memory").message,
        hint="its owner has ended or freed it, or nvidia-imex does not join the two hosts",
    )


def _export(address: int) -> bytes:
    chunk, handle = c_uint64(), Handle()
    check("cuMemRetainAllocationHandle", byref(chunk), address, what=f"{address:#x}")
    try:
        code = call("cuMemExportToShareableHandle", byref(handle), chunk, FABRIC, 0)
        if code:
            raise BackendUnavailable(
                failure(code, "cuMemExportToShareableHandle").message, hint="nvidia-imex must run for fabric handles"
            )
    finally:
        check("cuMemRelease", chunk)
    raw = bytes(handle)
    assert len(raw) == HANDLE_NBYTES
    return raw
