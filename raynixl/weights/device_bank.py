"""A bank in a GPU's memory: what is done with its bytes is done there, and only digests and deltas come to the host."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from raynixl.errors import RangeError
from raynixl.weights.bank import I64, U64, Bank, Encoder, HostBank
from raynixl.weights.device_delta import DeviceChanges, apply_blobs
from raynixl.weights.device_digest import digest_device
from raynixl.weights.streams import on_ours, ours

if TYPE_CHECKING:
    import torch

    from raynixl.native import Native
    from raynixl.region import Region
    from raynixl.weights.layout import Entry
    from raynixl.weights.space import Space


class DeviceBank:
    """A bank of regions in a GPU's memory. Each call waits until its work is through there, and for nothing else."""

    def __init__(self, space: Space, regions: Sequence[Region]) -> None:
        import torch

        self.space = space
        self._regions = list(regions)
        self._flats = [region.tensor(torch.uint8, (region.nbytes,)) for region in regions]

    @cached_property
    def addresses(self) -> U64:
        """See `Bank`."""
        return np.array([flat.data_ptr() for flat in self._flats], np.uint64)

    @cached_property
    def sizes(self) -> I64:
        """See `Bank`."""
        return np.array([flat.numel() for flat in self._flats], np.int64)

    def threads(self, most: int) -> int:
        """See `Bank`."""
        return 1

    def flat(self, arena: int) -> torch.Tensor:
        """See `Bank`."""
        flat: torch.Tensor = self._flats[arena]
        return flat

    def tensor(self, entry: Entry) -> torch.Tensor:
        """See `Bank`. Tensors have storages of their own, as those that torch makes."""
        import torch

        dtype: torch.dtype = getattr(torch, entry.dtype)
        if entry.nbytes == 0:
            device = self._flats[0].device if self._flats else self.space.name
            return torch.empty(entry.shape, dtype=dtype, device=device)
        raw = self._regions[entry.arena].tensor(torch.uint8, (entry.nbytes,), offset=entry.offset)
        flat: torch.Tensor = raw.view(dtype).view(entry.shape)
        return flat

    def digest(self, rows: U64, out: U64, *, seed: int, threads: int = 1) -> None:
        """See `Bank`."""
        with _translated(self.space), ours(self.space):  # waited for by who digests
            digest_device(self._flats, rows, out, seed=seed)

    def read(self, rows: I64) -> bytes:
        """See `Bank`."""
        import torch

        parts = [self._flats[arena][offset : offset + nbytes] for offset, arena, nbytes in rows.tolist()]
        if not parts:
            return b""
        with _at_work(self.space):
            return bytes(torch.cat(parts).cpu().numpy())

    def encoder(self, base: Bank, *, threads: int) -> Encoder:
        """See `Bank`."""
        old = [base.flat(arena) for arena in range(len(self._flats))]
        changes = DeviceChanges(old, self._flats)

        def encode(rows: I64, itemsize: int, limit: int) -> bytes | None:
            with _at_work(self.space):
                return changes.encode(rows, itemsize, limit)

        return encode

    def apply(self, blobs: Sequence[NDArray[np.uint8]], *, threads: int) -> None:
        """See `Bank`."""
        with _at_work(self.space):
            for blob in blobs:
                apply_blobs(blob, self._flats)

    def take(self, other: Bank) -> None:
        """See `Bank`."""
        with _at_work(self.space, other.space):
            for number, flat in enumerate(self._flats):
                flat.copy_(other.flat(number))


@contextmanager
def _at_work(*spaces: Space) -> Iterator[None]:
    """Work on our own streams of GPUs.

    Raises:
        RangeError: a GPU has too little memory left for what that needs.
        TransferTimeout: a GPU hangs.
    """
    with _translated(spaces[0]), on_ours(set(spaces)):
        yield


@contextmanager
def _translated(space: Space) -> Iterator[None]:
    import torch

    try:
        yield
    except torch.OutOfMemoryError as exc:
        raise RangeError(f"{space.name} has too little memory left: {exc}", hint="leave some for pushes") from exc


def bank_of(space: Space, regions: Sequence[Region], native: Native) -> Bank:
    """Return the bank that regions in a space make up."""
    if space.is_host:
        return HostBank([region.array() for region in regions], native)
    return DeviceBank(space, regions)
