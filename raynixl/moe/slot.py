"""Slots: registered memory into which others write rows, and their leases, the use of that memory by tensors."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from raynixl.errors import RangeError
from raynixl.moe.lines import ranks_of

if TYPE_CHECKING:
    import torch

    from raynixl.region import Region


class Slot:
    """One arena of a pool.

    It is in use for as long as its taker keeps it, a rank may still write into it, or a tensor of its lease lives.
    """

    __slots__ = ("address", "bytes", "is_kept", "lease", "nbytes", "number", "region", "turn", "turned_at", "writers")

    def __init__(self, number: int, region: Region) -> None:
        self.number = number
        self.region = region
        self.nbytes = region.nbytes
        self.address = region.memory.address
        self.bytes: NDArray[np.uint8] = region.array()
        self.writers = 0
        """The ranks that may still write into it, 1 bit a rank."""
        self.is_kept = False
        self.lease: Ended | None = None
        self.turn = 0
        """When it was last given out or became free, by the count of the pool, and by its clock."""
        self.turned_at = 0.0

    def __repr__(self) -> str:
        return (
            f"Slot({self.number}, {self.nbytes} bytes, kept={self.is_kept}, leased={self.is_leased}, "
            f"writers={ranks_of(self.writers)})"
        )

    @property
    def is_leased(self) -> bool:
        """Whether tensors of it live, as far as the pool has heard."""
        return self.lease is not None

    @property
    def is_free(self) -> bool:
        """Whether it may be given out."""
        return not (self.is_kept or self.writers or self.lease)


class Ended(weakref.ref["NDArray[np.uint8]"]):
    """Watches the array that owns what a lease's tensors view; the number of its slot is for who hears of its end."""

    __slots__ = ("number",)  # not the slot, which would hold on to itself
    number: int


class Lease:
    """The use of a slot by tensors: over when this object and all that it made, and all views of that, are gone."""

    __slots__ = ("_owner", "slot")

    def __init__(self, slot: Slot, owner: NDArray[np.uint8]) -> None:
        self.slot = slot
        self._owner = owner

    def __repr__(self) -> str:
        return f"Lease({self.slot!r})"

    def tensor(self, dtype: torch.dtype, shape: Sequence[int], offset: int = 0) -> torch.Tensor:
        """Return a torch view of the slot's bytes from `offset`, which keeps the lease and the memory.

        Raises:
            RangeError: it would not lie within the slot, or its items would lie askew.
        """
        import torch

        count = 1
        for size in shape:
            count *= size
        itemsize = dtype.itemsize
        if count < 0 or offset < 0 or offset + count * itemsize > self.slot.nbytes or offset % itemsize:
            raise RangeError(f"{list(shape)} of {dtype} at {offset} do not lie in a slot of {self.slot.nbytes} bytes")
        if count == 0:
            return torch.empty(tuple(shape), dtype=dtype)
        # the tensor, and what shares its memory, holds on to the array that it is given
        return torch.frombuffer(self._owner, dtype=dtype, count=count, offset=offset).view(tuple(shape))
