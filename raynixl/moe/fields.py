"""Fields: what travels with each row, and where each field's rows lie in a slot."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class RowFormat:
    """The bytes of each field of a row. Within a slot a field's rows are contiguous, so that they are tensors."""

    fields: tuple[int, ...]

    def slot_nbytes(self, rows: int) -> int:
        """Return how large a slot must be for so many rows."""
        return sum(_aligned(rows * nbytes) for nbytes in self.fields) + ALIGNMENT * len(self.fields)

    def layout(self, nbytes: int) -> SlotLayout:
        """Return how a slot of so many bytes is laid out: both ends of a write work it out for themselves."""
        return _layout(self.fields, nbytes)


@dataclass(frozen=True, slots=True, eq=False)
class SlotLayout:
    """How many rows fit into a slot, and at which byte each field begins."""

    capacity: int
    starts: tuple[int, ...]
    table: npt.NDArray[np.uint64]
    """The starts, as the core wants them."""


@lru_cache(1024)
def _layout(fields: tuple[int, ...], nbytes: int) -> SlotLayout:
    capacity = max(0, nbytes - ALIGNMENT * len(fields)) // max(1, sum(fields))
    starts, start = [], 0
    for field in fields:
        starts.append(start)
        start += _aligned(capacity * field)
    return SlotLayout(capacity, tuple(starts), np.array(starts, np.uint64))


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
