"""Blocks: (N, 3) uint64 arrays of (offset, length, device) inside regions, and the pure arithmetic on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import index
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from raynixl.errors import ConfigError, RangeError

Table = NDArray[np.uint64]
"""An (N, 3) uint64 array of (region offset, length, device)."""

_HINT = "give offsets and lengths that lie inside the region"


def as_unsigned(values: ArrayLike, what: str) -> NDArray[np.uint64]:
    """Return integers as a flat uint64 array.

    Raises:
        RangeError: a value is negative, not an integer, or does not fit 64 bits.
    """
    try:
        array = np.asarray(values)
        if array.dtype.kind in "Of":  # numpy makes floats of integers too large for int64: take each as it is
            array = np.array([index(value) for value in np.asarray(values, object).flat], np.uint64)
        elif array.size and (array.dtype.kind not in "iu" or (array.dtype.kind == "i" and array.min() < 0)):
            raise RangeError(f"{what} hold values that are not unsigned 64-bit integers", hint=_HINT)
        return array.astype(np.uint64, copy=False).reshape(-1)
    except (OverflowError, TypeError, ValueError) as exc:
        raise RangeError(f"{what} do not fit unsigned 64-bit integers", hint=_HINT) from exc


def make_table(offsets: ArrayLike, lengths: ArrayLike, *, device: int = 0) -> Table:
    """Return the read-only table of blocks at `offsets` with `lengths` (one length may serve all)."""
    starts, sizes = as_unsigned(offsets, "offsets"), as_unsigned(lengths, "lengths")
    if sizes.size not in (1, starts.size):
        raise RangeError(f"{starts.size} offsets but {sizes.size} lengths", hint="give one length for each offset")
    table = np.empty((starts.size, 3), np.uint64)
    table[:, 0], table[:, 1], table[:, 2] = starts, sizes, device
    table.flags.writeable = False
    return table


def page_table(ids: ArrayLike, page_nbytes: int, *, nbytes: int, what: str, device: int = 0) -> Table:
    """Return the table of whole pages `ids` of `what`, a region of `nbytes` cut into pages of `page_nbytes`."""
    if not hasattr(page_nbytes, "__index__") or not 0 < page_nbytes <= nbytes:
        raise RangeError(f"page size {page_nbytes!r:.40} does not fit {what} of {nbytes} bytes", hint=_HINT)
    numbers = as_unsigned(ids, "page ids")
    pages = nbytes // page_nbytes
    if numbers.size and int(numbers.max()) >= pages:
        page = int(numbers.max())
        raise RangeError(f"page {page} is outside {what} of {nbytes} bytes, {pages} pages", hint=_HINT)
    return make_table(numbers * np.uint64(page_nbytes), page_nbytes, device=device)


def check_table(table: Table, nbytes: int, what: str) -> None:
    """Refuse a table with any block outside [0, nbytes).

    Raises:
        RangeError: names the first block that is outside, its range and the region's size.
    """
    if not isinstance(table, np.ndarray) or table.ndim != 2 or table.shape[1] != 3 or table.dtype != np.uint64:
        raise RangeError(f"blocks of {what} are not an (N, 3) uint64 array", hint="build them with region.blocks()")
    offsets, lengths, limit = table[:, 0], table[:, 1], np.uint64(nbytes)
    bad = (lengths > limit) | (offsets > limit - np.minimum(lengths, limit))
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        start, length = int(offsets[row]), int(lengths[row])
        raise RangeError(f"block {row} [{start}, {start + length}) is outside {what} of {nbytes} bytes", hint=_HINT)


@dataclass(frozen=True, slots=True)
class Blocks:
    """Blocks inside one region: what a transfer reads from or writes to.

    `region` is a `Region` (ours) or a `RemoteRegion` (a peer's). Checked when made: every block lies inside. The
    table is read-only; one that is not, or that others may write, is copied.

    Raises:
        ConfigError: that is no region.
        RangeError: some block is outside it, or that is no table.
    """

    region: Any
    table: Table

    def __post_init__(self) -> None:
        if not hasattr(self.region, "label"):
            raise ConfigError(f"{type(self.region).__name__} is not a region", hint="build blocks with region.blocks()")
        check_table(self.table, self.region.nbytes, self.region.label)
        if self.table.flags.writeable or self.table.base is not None:
            own = self.table.copy()
            own.flags.writeable = False
            object.__setattr__(self, "table", own)

    @property
    def nbytes(self) -> int:
        """Total length of the blocks."""
        return _total(self.table[:, 1])

    def __len__(self) -> int:
        return len(self.table)


@dataclass(frozen=True, slots=True)
class Segments:
    """Matched pieces of one transfer: row i copies nbytes[i] from (source region, offset) to (target region, offset).

    Region columns index the lists of distinct regions that `match` was given. Adjacent pieces are merged.
    """

    source_region: NDArray[np.int64]
    source_offset: NDArray[np.uint64]
    target_region: NDArray[np.int64]
    target_offset: NDArray[np.uint64]
    nbytes: NDArray[np.uint64]

    def __len__(self) -> int:
        return len(self.nbytes)

    @property
    def total(self) -> int:
        """Bytes that move."""
        return int(self.nbytes.sum())


@dataclass(frozen=True, slots=True)
class _Side:
    region: NDArray[np.int64]
    offset: NDArray[np.uint64]
    nbytes: NDArray[np.uint64]


def _flatten(tables: Sequence[tuple[int, Table]]) -> _Side:
    """Concatenate tables, drop empty blocks."""
    if len(tables) == 1:
        index, table = tables[0]
        region = np.full(len(table), index, np.int64)
        offset, nbytes = table[:, 0], table[:, 1]
    else:
        region = np.concatenate([np.full(len(t), i, np.int64) for i, t in tables])
        offset = np.concatenate([t[:, 0] for _, t in tables])
        nbytes = np.concatenate([t[:, 1] for _, t in tables])
    full = nbytes > 0
    return _Side(region, offset, nbytes) if full.all() else _Side(region[full], offset[full], nbytes[full])


def _total(nbytes: NDArray[np.uint64]) -> int:
    """Add lengths up, exactly: a sum of unsigned integers would wrap without a word."""
    if len(nbytes) and int(nbytes.max()) * len(nbytes) >= 1 << 63:
        return sum(nbytes.tolist())
    return int(nbytes.sum())


def _union(one: NDArray[np.uint64], other: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the values of both, sorted, each once; np.union1d imports numpy.ma for that, which takes 10 ms."""
    values: NDArray[np.uint64] = np.sort(np.concatenate([one, other]))
    is_first = np.ones(len(values), np.bool_)
    is_first[1:] = values[1:] != values[:-1]
    return values[is_first]


def _split(side: _Side, cuts: NDArray[np.uint64], starts: NDArray[np.uint64]) -> _Side:
    """Cut the blocks of one side at stream positions `cuts` (ends of pieces); `starts` are the pieces' beginnings."""
    ends = np.cumsum(side.nbytes)
    block = np.searchsorted(ends, starts, side="right")
    into = starts - (ends[block] - side.nbytes[block])
    return _Side(side.region[block], side.offset[block] + into, cuts - starts)


def match(source: Sequence[tuple[int, Table]], target: Sequence[tuple[int, Table]]) -> Segments:
    """Pair the bytes of source blocks with those of target blocks, in order.

    Each argument lists (region index, table). The two sides may be cut differently; their totals must be equal.

    Raises:
        RangeError: nothing to move, unequal totals, target blocks that overlap, or more than 2^63 bytes.
    """
    src, dst = _flatten(source), _flatten(target)
    moved, room = _total(src.nbytes), _total(dst.nbytes)
    if moved != room:
        raise RangeError(f"source has {moved} bytes but destination {room}", hint="select equal lengths")
    if moved == 0:
        raise RangeError("the transfer has no bytes", hint="select at least one byte")
    if moved >= 1 << 63:
        raise RangeError(f"the transfer has {moved} bytes, which 64-bit integers do not hold", hint="split it")
    check_disjoint(dst.region, dst.offset, dst.nbytes)
    if not np.array_equal(src.nbytes, dst.nbytes):
        cuts = _union(np.cumsum(src.nbytes), np.cumsum(dst.nbytes))
        starts = np.concatenate([np.zeros(1, np.uint64), cuts[:-1]])
        src, dst = _split(src, cuts, starts), _split(dst, cuts, starts)
    return _merge(src, dst)


def _merge(src: _Side, dst: _Side) -> Segments:
    """Merge neighbours that continue each other on both sides."""
    if len(src.nbytes) > 1:
        joined = (
            (src.region[1:] == src.region[:-1])
            & (dst.region[1:] == dst.region[:-1])
            & (src.offset[1:] == src.offset[:-1] + src.nbytes[:-1])
            & (dst.offset[1:] == dst.offset[:-1] + dst.nbytes[:-1])
        )
        if joined.any():
            first = np.concatenate([[0], np.flatnonzero(~joined) + 1])
            nbytes = np.add.reduceat(src.nbytes, first)
            return Segments(src.region[first], src.offset[first], dst.region[first], dst.offset[first], nbytes)
    return Segments(src.region, src.offset, dst.region, dst.offset, src.nbytes)


def check_disjoint(region: NDArray[np.int64], offset: NDArray[np.uint64], nbytes: NDArray[np.uint64]) -> None:
    """Refuse blocks that overlap each other: the order of their writes would be undefined.

    Raises:
        RangeError: names the first overlap.
    """
    if len(nbytes) < 2:
        return
    one = bool((region == region[0]).all())
    if not one or (offset[1:] < offset[:-1]).any():
        order = np.argsort(offset) if one else np.lexsort((offset, region))
        region, offset, nbytes = region[order], offset[order], nbytes[order]
    clash = (region[1:] == region[:-1]) & (offset[1:] < offset[:-1] + nbytes[:-1])
    if clash.any():
        at = int(offset[1:][clash][0])
        raise RangeError(f"destination blocks overlap at offset {at}", hint="write each byte once in a transfer")


def refuse_overlap(table: NDArray[np.uint64]) -> None:
    """Refuse an (N, 3) table of (source address, destination address, length) that copies memory onto itself.

    Raises:
        RangeError: some destination overlaps some source.
    """
    source, target, nbytes = table[:, 0], table[:, 1], table[:, 2]
    order = np.argsort(source)
    starts = source[order]
    reach = np.maximum.accumulate(starts + nbytes[order])  # the furthest end of any source that starts so early
    before = np.searchsorted(starts, target + nbytes, side="left")
    if ((before > 0) & (reach[np.maximum(before, 1) - 1] > target)).any():
        raise RangeError("source and destination overlap in memory", hint="copy through another region")
