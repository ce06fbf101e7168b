"""Banks: the bytes of arenas in one memory, the host's or a GPU's, and what is done with them where they lie."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from raynixl.weights.delta import apply, encode_rows
from raynixl.weights.digest import digest_rows
from raynixl.weights.space import HOST, Space, space_of
from raynixl.weights.streams import on_ours

if TYPE_CHECKING:
    import torch

    from raynixl.native import Native
    from raynixl.weights.layout import Entry

U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]

Encoder = Callable[[I64, int, int], "bytes | None"]
"""Returns the blob of rows of (offset, arena, nbytes, position), given the size of elements and the room for it."""


class Bank(Protocol):
    """Flat memory, one stretch for each arena. It stays for as long as a bank, or a view of it, is held."""

    @property
    def space(self) -> Space:
        """Which memory it is."""

    @property
    def addresses(self) -> U64:
        """Where each arena begins."""

    @property
    def sizes(self) -> I64:
        """The bytes of each."""

    def threads(self, most: int) -> int:
        """Return how many threads fill it best: on a GPU they would only be in each other's way."""

    def flat(self, arena: int) -> torch.Tensor:
        """Return one arena as bytes."""

    def tensor(self, entry: Entry) -> torch.Tensor:
        """Return a view of one tensor."""

    def digest(self, rows: U64, out: U64, *, seed: int, threads: int = 1) -> None:
        """Add the digest of rows of (address, nbytes, position, index) to `out`, as `digest_rows` does."""

    def read(self, rows: I64) -> bytes:
        """Return the bytes of rows of (offset, arena, nbytes), one after the other."""

    def encoder(self, base: Bank, *, threads: int) -> Encoder:
        """Return what encodes changes since a base, in a bank of the same space and layout, as `encode_rows` does."""

    def apply(self, blobs: Sequence[NDArray[np.uint8]], *, threads: int) -> None:
        """Write what changed, from blobs in host memory, over an old version.

        Raises:
            IntegrityError: one is malformed, or does not fit.
        """

    def take(self, other: Bank) -> None:
        """Copy everything from a bank of the same layout, which may be in another memory."""


def holds_any(bank: Bank, tensors: Iterable[torch.Tensor]) -> bool:
    """Whether one of these tensors lies in a bank."""
    tensors = list(tensors)
    addresses = np.array([one.data_ptr() for one in tensors], np.uint64)
    inside = np.zeros(len(tensors), bool)
    for first, last in zip(bank.addresses, bank.addresses + bank.sizes.astype(np.uint64), strict=True):
        inside |= (addresses >= first) & (addresses < last)
    return any(tensors[place].numel() and space_of(tensors[place]) == bank.space for place in np.flatnonzero(inside))


class HostBank:
    """A bank in host memory, of arrays of bytes."""

    space = HOST

    def __init__(self, arrays: Sequence[NDArray[np.uint8]], native: Native | None = None) -> None:
        self.arrays = list(arrays)
        self._native = native

    @cached_property
    def addresses(self) -> U64:
        """See `Bank`."""
        return np.array([array.ctypes.data for array in self.arrays], np.uint64)

    @cached_property
    def sizes(self) -> I64:
        """See `Bank`."""
        return np.array([array.nbytes for array in self.arrays], np.int64)

    def threads(self, most: int) -> int:
        """See `Bank`."""
        return most

    def flat(self, arena: int) -> torch.Tensor:
        """See `Bank`."""
        import torch

        return torch.frombuffer(self.arrays[arena], dtype=torch.uint8)

    def tensor(self, entry: Entry) -> torch.Tensor:
        """See `Bank`."""
        import torch

        dtype: torch.dtype = getattr(torch, entry.dtype)
        if entry.nbytes == 0:
            return torch.empty(entry.shape, dtype=dtype)
        raw = self.arrays[entry.arena][entry.offset : entry.offset + entry.nbytes]
        return torch.frombuffer(raw, dtype=torch.uint8).view(dtype).view(entry.shape)

    def digest(self, rows: U64, out: U64, *, seed: int, threads: int = 1) -> None:
        """See `Bank`."""
        digest_rows(rows, out, seed=seed, threads=threads, native=self._native)

    def read(self, rows: I64) -> bytes:
        """See `Bank`."""
        parts = (self.arrays[arena][offset : offset + nbytes] for offset, arena, nbytes in rows.tolist())
        return b"".join(part.tobytes() for part in parts)

    def encoder(self, base: Bank, *, threads: int) -> Encoder:
        """See `Bank`."""

        def encode(rows: I64, itemsize: int, limit: int) -> bytes | None:
            table = _addresses(rows, (base.addresses, self.addresses))
            return encode_rows(table, itemsize=itemsize, limit=limit, threads=threads, native=self._native)

        return encode

    def apply(self, blobs: Sequence[NDArray[np.uint8]], *, threads: int) -> None:
        """See `Bank`."""
        for blob in blobs:
            apply(blob, self.arrays, threads=threads, native=self._native)

    def take(self, other: Bank) -> None:
        """See `Bank`."""
        with on_ours((other.space,)):  # of a GPU, if it is one's
            for number, array in enumerate(self.arrays):
                if isinstance(other, HostBank):
                    np.copyto(array, other.arrays[number])
                else:
                    self.flat(number).copy_(other.flat(number))


def _addresses(rows: I64, bases: Sequence[U64]) -> U64:
    offset, arena = rows[:, 0].astype(np.uint64), rows[:, 1]
    columns = [*(base[arena] + offset for base in bases), rows[:, 2].astype(np.uint64), rows[:, 3].astype(np.uint64)]
    return np.ascontiguousarray(np.stack(columns, axis=1))
