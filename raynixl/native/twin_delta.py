"""Deltas of weights in numpy; native/delta.h says what they are, and the compiled core makes the same bytes."""

from __future__ import annotations

import ctypes
import os

import numpy as np
import numpy.typing as npt

from raynixl.native import syscalls
from raynixl.native.rows import cut_rows, group_rows

__all__ = ["delta_apply", "delta_encode"]

U8 = npt.NDArray[np.uint8]
U64 = npt.NDArray[np.uint64]

_ARENA_BIT = np.uint64(48)
_BATCH_NBYTES = 1 << 20  # scanned at a time
_WIDTHS = {253: 2, 254: 4, 255: 8}  # a gap that is not one byte: its code, and the bytes that follow
_LIMITS = np.array([253, 1 << 16, 1 << 32], np.uint64)  # gaps from these on take the next code
_ITEMSIZES = (1, 2, 4, 8, 16)
_ONE = np.uint64(1)


def delta_encode(rows: U64, itemsize: int, limit: int) -> tuple[bytes, bytes] | None:
    """Return gaps and values of the elements that differ in rows of (before, after, nbytes, position)."""
    _check_table(rows, 4)
    _check_rows(rows, itemsize)
    gaps, values, nbytes = [], [], 0
    last = np.full(1, 2**64 - 1, np.uint64)  # one before the first
    pieces = cut_rows(rows[rows[:, 2] > 0], _BATCH_NBYTES, size=2, moving=(0, 1, 3))
    for batch in group_rows(pieces, _BATCH_NBYTES, size=2):
        numbers, changed = _scan(batch, itemsize)
        if len(numbers):
            gaps.append(_pack_gaps(np.diff(numbers, prepend=last) - _ONE))
            values.append(changed)
            last = numbers[-1:]
            nbytes += len(gaps[-1]) + len(changed)
        if nbytes > limit:
            return None
    return b"".join(gaps), b"".join(values)


def delta_apply(gaps: U8, values: U8, itemsize: int, arenas: U64, *, write: bool) -> bool:
    """Write the elements into arenas of (address, nbytes), if wanted; False if one lies in none."""
    _check_table(arenas, 2)
    for data in (gaps, values):
        if not (isinstance(data, np.ndarray) and data.dtype == np.uint8 and data.ndim == 1 and data.flags.c_contiguous):
            raise TypeError("gaps and values must be contiguous arrays of uint8")
    _check_itemsize(itemsize)
    if len(values) % itemsize:
        raise ValueError("the values are not whole items")
    steps = _unpack_gaps(gaps)
    if steps is None or len(steps) != len(values) // itemsize:
        return False
    numbers = np.cumsum(steps + _ONE, dtype=np.uint64) - _ONE
    if (numbers > np.uint64((2**64 - 1) // itemsize)).any() or (numbers[1:] <= numbers[:-1]).any():
        return False
    arena, offset = _places(numbers, itemsize)
    if (arena >= np.uint64(len(arenas))).any():
        return False
    ends = arenas[:, 1][arena.astype(np.intp)]
    if (ends < np.uint64(itemsize)).any() or (offset > ends - np.uint64(itemsize)).any():
        return False
    if write:
        _write(arena, offset, values.view(f"V{itemsize}"), arenas)
    return True


def _check_table(table: U64, columns: int) -> None:
    shaped = isinstance(table, np.ndarray) and table.ndim == 2 and table.shape[1] == columns
    if not (shaped and table.dtype == np.uint64 and table.flags.c_contiguous):
        raise TypeError(f"not a C-contiguous (N, {columns}) array of uint64")


def _check_itemsize(itemsize: int) -> None:
    if itemsize not in _ITEMSIZES:
        raise ValueError("an item has 1, 2, 4, 8 or 16 bytes")


def _check_rows(rows: U64, itemsize: int) -> None:
    _check_itemsize(itemsize)
    nbytes, position = rows[:, 2], rows[:, 3]
    ends = rows + nbytes[:, None]
    if (ends[:, [0, 1, 3]] < rows[:, [0, 1, 3]]).any():
        raise ValueError("a row reaches past the end of memory, or of all positions")
    if (nbytes % np.uint64(itemsize)).any() or (position % np.uint64(itemsize)).any():
        raise ValueError("a row does not consist of whole items")
    if (position[1:] < ends[:-1, 3]).any():
        raise ValueError("rows must ascend in position, and be disjoint")


def _scan(rows: U64, itemsize: int) -> tuple[U64, bytes]:
    """Return the numbers of the elements that differ, and their new values."""
    before, after = _gather(rows[:, 0], rows[:, 2]), _gather(rows[:, 1], rows[:, 2])
    unequal = before.view(f"u{min(itemsize, 8)}") != after.view(f"u{min(itemsize, 8)}")
    changed = np.flatnonzero(unequal if itemsize <= 8 else unequal.reshape(-1, 2).any(axis=1))
    ends = np.cumsum(rows[:, 2]) // np.uint64(itemsize)
    row = np.searchsorted(ends, changed.astype(np.uint64), side="right")
    first = rows[:, 3] // np.uint64(itemsize) - (ends - rows[:, 2] // np.uint64(itemsize))
    return first[row] + changed.astype(np.uint64), after.view(f"V{itemsize}")[changed].tobytes()


def _gather(addresses: U64, sizes: U64) -> U8:
    """Copy ranges of memory, one after the other, into one array."""
    gathered = np.empty(int(sizes.sum()), np.uint8)
    targets = np.uint64(gathered.ctypes.data) + np.cumsum(sizes) - sizes
    code = syscalls.copy_rows(np.ascontiguousarray(np.stack([addresses, targets, sizes], axis=1)))
    if code != 0:
        raise OSError(-code, os.strerror(-code))
    return gathered


def _pack_gaps(gaps: U64) -> bytes:
    kind = np.searchsorted(_LIMITS, gaps, side="right").astype(np.uint64)
    codes = np.where(kind == 0, gaps, kind + np.uint64(252)).astype(np.uint8)
    sizes = np.ones(len(gaps), np.intp)
    for code, width in _WIDTHS.items():
        sizes[codes == code] += width
    starts = np.cumsum(sizes) - sizes
    packed = np.empty(int(sizes.sum()), np.uint8)
    packed[starts] = codes
    for code, width in _WIDTHS.items():
        which = codes == code
        raw = gaps[which].astype("<u8").view(np.uint8).reshape(-1, 8)[:, :width]
        packed[starts[which][:, None] + np.arange(1, width + 1)] = raw
    return packed.tobytes()


def _unpack_gaps(packed: U8) -> U64 | None:
    """Return the gaps, or None if the last one is cut short."""
    wide: dict[int, list[int]] = {code: [] for code in _WIDTHS}
    is_code = np.ones(len(packed), np.bool_)
    free = 0  # where the next code can be at the earliest
    for at in np.flatnonzero(packed >= 253).tolist():
        if at >= free:
            code = int(packed[at])
            wide[code].append(at)
            free = at + 1 + _WIDTHS[code]
    if free > len(packed):
        return None
    gaps = packed.astype(np.uint64)
    for code, starts in wide.items():
        width = _WIDTHS[code]
        tail = np.array(starts, np.intp)[:, None] + np.arange(1, width + 1)
        is_code[tail] = False
        gaps[np.array(starts, np.intp)] = packed[tail].view(f"<u{width}")[:, 0]
    return gaps[is_code]


def _places(numbers: U64, itemsize: int) -> tuple[U64, U64]:
    position = numbers * np.uint64(itemsize)
    return position >> _ARENA_BIT, position & ((_ONE << _ARENA_BIT) - _ONE)


def _write(arena: U64, offset: U64, values: npt.NDArray[np.void], arenas: U64) -> None:
    for number in np.unique(arena).tolist():
        address, nbytes = arenas[number].tolist()
        whole = nbytes - nbytes % values.itemsize
        data = memoryview((ctypes.c_uint8 * whole).from_address(address))
        target = np.frombuffer(data, values.dtype)
        which = arena == np.uint64(number)
        target[offset[which] // np.uint64(values.itemsize)] = values[which]
