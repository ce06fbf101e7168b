"""Fusing: what is copied and then digested becomes one pass over the bytes, where both are known beforehand."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

U64 = NDArray[np.uint64]
SOURCE, DESTINATION, NBYTES, POSITION, INDEX = range(5)  # of a fused row, as native.digest_copy takes it
_ADDRESS, _LENGTH, _AT, _SUM = range(4)  # of a row to digest
_FROM, _TO, _SIZE = range(3)  # of a row to copy


@dataclass(frozen=True, slots=True, eq=False)
class Fused:
    """Rows of both at once, and what is left over: rows only to copy (first), and rows only to digest (last)."""

    both: U64
    copies: U64
    digests: U64


def fuse(copies: U64, digests: U64) -> Fused:
    """Join rows of (source, destination, nbytes) with rows of (address, nbytes, position, index) at the destinations.

    What is copied must be disjoint. What is digested may overlap, since images differ: of rows that overlap one is
    fused, and the others are digested afterwards.
    """
    copies = copies[copies[:, _SIZE] > 0]
    digests = digests[digests[:, _LENGTH] > 0]
    copies = copies[np.argsort(copies[:, _TO], kind="stable")]
    is_first = _disjoint(digests)
    first = digests[is_first]
    first = first[np.argsort(first[:, _ADDRESS], kind="stable")]
    starts, ends = copies[:, _TO], copies[:, _TO] + copies[:, _SIZE]
    begins, stops = first[:, _ADDRESS], first[:, _ADDRESS] + first[:, _LENGTH]
    cuts = np.unique(np.concatenate([starts, ends, begins, stops]))
    low, high = cuts[:-1], cuts[1:]
    copy, has_copy = _owner(starts, ends, low)
    digest, has_digest = _owner(begins, stops, low)

    def rows(chosen: NDArray[np.bool_], columns: list[U64]) -> U64:
        return np.ascontiguousarray(np.stack([column[chosen] for column in columns], axis=1)) if chosen.any() else (
            np.zeros((0, len(columns)), np.uint64)
        )  # fmt: skip

    nbytes = high - low
    source = copies[copy, _FROM] + (low - starts[copy]) if len(copies) else low
    position = first[digest, _AT] + (low - begins[digest]) if len(first) else low
    index = first[digest, _SUM] if len(first) else low
    return Fused(
        both=rows(has_copy & has_digest, [source, low, nbytes, position, index]),
        copies=rows(has_copy & ~has_digest, [source, low, nbytes]),
        digests=np.concatenate([rows(~has_copy & has_digest, [low, nbytes, position, index]), digests[~is_first]]),
    )


def _disjoint(rows: U64) -> NDArray[np.bool_]:
    """Choose rows that do not overlap: those that begin, in the order of addresses, where none chosen still lasts."""
    chosen = np.zeros(len(rows), bool)
    if not len(rows):
        return chosen
    order = np.lexsort((np.arange(len(rows)), rows[:, _ADDRESS]))
    starts, ends = rows[order, _ADDRESS], rows[order, _ADDRESS] + rows[order, _LENGTH]
    before = np.maximum.accumulate(np.concatenate([[np.uint64(0)], ends[:-1]]))
    if (starts >= before).all():
        chosen[:] = True
        return chosen
    last = 0
    for place, start, end in zip(order.tolist(), starts.tolist(), ends.tolist(), strict=True):
        if start >= last:
            chosen[place], last = True, end
    return chosen


def _owner(starts: U64, ends: U64, low: U64) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    """Return which of some sorted disjoint intervals each point lies in, and whether it lies in one at all."""
    if not len(starts):
        return np.zeros(len(low), np.intp), np.zeros(len(low), bool)
    place = np.searchsorted(starts, low, side="right") - 1
    inside = place >= 0
    place = np.maximum(place, 0)
    return place, inside & (low < ends[place])
