"""How a list of blocks is moved on a GPU: by which kernel or by copy engine, and cut into which tiles. Pure."""

from __future__ import annotations

import enum
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.uint64]

_LINE_NBYTES = 128
"""Tiles of one block meet at multiples of this: no two warps write to one line of the cache."""
_NARROW_LANES, _WARP_LANES, _THREADS = 8, 32, 256


class Way(enum.Enum):
    """What carries a list of blocks."""

    SMALL = "one CTA"
    RANGE = "one block in tiles"
    TILES = "a warp for each tile"
    NARROW = "8 threads for each block"
    ENGINE = "copy engine"


@dataclass(frozen=True, slots=True)
class Tuning:
    """Where one way gives way to another; found by tools/gpu_tune.py."""

    small_nbytes: int = 64 << 10
    """A single block of at most this is one CTA's."""
    engine_nbytes: int = 32 << 20
    """Blocks of this length on average go by copy engine, one call for each."""
    engine_host_nbytes: int = 64 << 10
    """Likewise where one side is host memory."""
    engine_rows: int = 64
    narrow_nbytes: int = 1536
    """Blocks shorter than this on average leave most lanes of a warp idle."""
    least_tile_nbytes: int = 4 << 10
    most_tile_nbytes: int = 16 << 10
    tiles_per_warp: int = 4
    """At least this many where there are enough bytes: then all warps end at about the same time."""
    ctas: int = 3
    """On each multiprocessor; what the kernels' registers allow."""


@dataclass(frozen=True, slots=True)
class Cut:
    """Rows of (source, destination, nbytes), and how a GPU takes them."""

    way: Way
    rows: Rows
    grid: int = 1
    threads: int = _THREADS
    tile_nbytes: int = 0


def merge(table: Rows) -> Rows:
    """Return the rows without empty ones; those that go on where the one before ends, on both sides, become one."""
    table = table[table[:, 2] > 0]
    if len(table) < 2:
        return table
    ends = table[:-1, :2] + table[:-1, 2:]
    starts = np.flatnonzero(np.append(True, (table[1:, :2] != ends).any(axis=1)))
    if len(starts) == len(table):
        return table
    return np.column_stack([table[starts, :2], np.add.reduceat(table[:, 2], starts)])


def plan(table: Rows, multiprocessors: int, *, touches_host: bool = False, tuning: Tuning | None = None) -> Cut:
    """Decide how rows of (source, destination, nbytes) are carried by a GPU of so many multiprocessors."""
    tuning = Tuning() if tuning is None else tuning
    rows = merge(table)
    total = int(rows[:, 2].sum())
    if len(rows) <= 1 and total <= tuning.small_nbytes:
        return Cut(Way.SMALL, rows, threads=small_threads(total))
    engine_nbytes = tuning.engine_host_nbytes if touches_host else tuning.engine_nbytes
    if len(rows) <= tuning.engine_rows and total >= engine_nbytes * len(rows):
        return Cut(Way.ENGINE, rows)
    most = multiprocessors * tuning.ctas
    warps = _THREADS // _WARP_LANES
    tile = tile_nbytes(total, most * warps, tuning)
    if len(rows) == 1:
        grid = min(most, -(-total // (tile * warps)))
        return Cut(Way.RANGE, rows, grid=grid, tile_nbytes=tile)
    tiles = cut_rows(rows, tile)
    is_narrow = total < tuning.narrow_nbytes * len(tiles)
    at_once = _THREADS // (_NARROW_LANES if is_narrow else _WARP_LANES)
    grid = min(most, -(-len(tiles) // at_once))
    return Cut(Way.NARROW if is_narrow else Way.TILES, tiles, grid=grid, tile_nbytes=tile)


def small_threads(nbytes: int) -> int:
    """Return how many threads copy a small block: about 64 bytes each, in whole warps."""
    return min(1024, max(_WARP_LANES, 1 << (max(1, -(-nbytes // 64)) - 1).bit_length()))


def tile_nbytes(total: int, warps: int, tuning: Tuning) -> int:
    """Return the length of a tile, a power of two, for so many bytes and warps."""
    wanted = max(1, total // (warps * tuning.tiles_per_warp))
    return min(tuning.most_tile_nbytes, max(tuning.least_tile_nbytes, 1 << (wanted.bit_length() - 1)))


def cut_rows(rows: Rows, tile: int) -> Rows:
    """Cut rows that are longer than a tile at multiples of 128 bytes of the destination."""
    step = np.uint64(tile)
    lead = (np.uint64(0) - rows[:, 1]) % np.uint64(_LINE_NBYTES)
    parts = np.where(rows[:, 2] > lead + step, (rows[:, 2] - lead + step - np.uint64(1)) // step, 1).astype(np.int64)
    if not len(rows) or parts.max() == 1:
        return rows
    row = np.repeat(np.arange(len(rows)), parts)
    number = (np.arange(len(row)) - np.repeat(np.cumsum(parts) - parts, parts)).astype(np.uint64)
    start = np.where(number > 0, lead[row] + number * step, np.uint64(0))
    end = np.minimum(rows[row, 2], lead[row] + (number + np.uint64(1)) * step)
    end = np.where(number + np.uint64(1) == parts[row].astype(np.uint64), rows[row, 2], end)
    return np.column_stack([rows[row, 0] + start, rows[row, 1] + start, end - start])
