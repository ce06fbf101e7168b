"""Routing: which tokens go to which ranks, worked out once for a dispatch and used again by its combine."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from raynixl.errors import RangeError

if TYPE_CHECKING:
    from raynixl.native import Native

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
F32 = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Routing:
    """The rows that a source sends: one for each (token, rank that holds one of its experts), by rank, then token."""

    tokens: int
    order: I32
    """By row: its token."""
    counts: I64
    """By rank: its rows."""
    begins: I64
    """By rank: its first row; one more at the end."""
    starts: I64
    positions: I32
    """A token's rows are positions[starts[t] : starts[t + 1]], by ascending rank."""
    row_ids: I32
    """By row and k: the expert's local id at the row's rank, or -1."""
    row_weights: F32 | None

    def rows_of(self, rank: int) -> slice:
        """Return the rows that go to a rank."""
        return slice(int(self.begins[rank]), int(self.begins[rank + 1]))

    @cached_property
    def pair_begins(self) -> I64:
        """By rank: its first (row, k) pair; one more at the end."""
        pairs = np.zeros(len(self.order) + 1, np.int64)
        np.cumsum((self.row_ids >= 0).sum(axis=1), out=pairs[1:])
        return pairs[self.begins]

    def weights_by_row(self, weights: F32) -> F32:
        """Return each row's weights, 0 where the expert is elsewhere."""
        return np.where(self.row_ids >= 0, weights[self.order], np.float32(0))


def route(native: Native, ids: I64, weights: F32 | None, *, holders: I32, local: I32, ranks: int) -> Routing:
    """Route tokens by their experts. Holder -1 is nobody: such pairs are dropped.

    Raises:
        RangeError: an id is no expert.
    """
    tokens, topk = ids.shape
    most = tokens * min(topk, ranks)
    order, positions = np.empty(most, np.int32), np.empty(most, np.int32)
    counts, starts = np.empty(ranks, np.int64), np.empty(tokens + 1, np.int64)
    row_ids = np.empty((most, topk), np.int32)
    row_weights = None if weights is None else np.empty((most, topk), np.float32)
    try:
        total = native.route(ids, weights, holders, local, order, counts, starts, positions, row_ids, row_weights)
    except ValueError as exc:
        raise RangeError(
            f"topk_idx names an expert that does not exist: {exc}", hint=f"ids are -1 (none) or 0 to {len(holders) - 1}"
        ) from exc
    begins = np.zeros(ranks + 1, np.int64)
    counts.cumsum(out=begins[1:])
    return Routing(
        tokens, order[:total], counts, begins, starts, positions[:total], row_ids[:total],
        None if row_weights is None else row_weights[:total],
    )  # fmt: skip
