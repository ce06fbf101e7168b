"""Rows that name ranges of memory: cut where they are long, and grouped for those who work on them piece by piece."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["cut_rows", "group_rows"]

U64 = npt.NDArray[np.uint64]


def cut_rows(rows: U64, limit: int, *, size: int, moving: Sequence[int]) -> U64:
    """Cut rows at every `limit` bytes. Column `size` holds their bytes; the `moving` ones go along with each cut."""
    nbytes, step = rows[:, size], np.uint64(limit)
    parts = (nbytes // step + (nbytes % step > 0)).astype(np.int64)
    if not len(rows) or parts.max() <= 1:
        return rows
    parts = np.maximum(parts, 1)
    row = np.repeat(np.arange(len(rows)), parts)
    skipped = (np.arange(len(row)) - np.repeat(np.cumsum(parts) - parts, parts)).astype(np.uint64) * step
    cut = rows[row]
    cut[:, list(moving)] += skipped[:, None]
    cut[:, size] = np.minimum(cut[:, size] - skipped, step)
    return cut


def group_rows(rows: U64, limit: int, *, size: int) -> list[U64]:
    """Return runs of rows of about `limit` bytes each, in order."""
    if not len(rows):
        return []
    group = np.cumsum(rows[:, size]) // np.uint64(limit)
    return np.split(rows, np.flatnonzero(np.diff(group)) + 1)
