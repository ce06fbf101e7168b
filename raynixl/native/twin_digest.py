"""The digest of weights in numpy; native/digest.h says what it is, and the compiled core gives the same values."""

from __future__ import annotations

import ctypes
import os

import numpy as np
import numpy.typing as npt

from raynixl.native import syscalls
from raynixl.native.rows import group_rows

__all__ = ["BLOCK_NBYTES", "CONSTANTS", "block_factors", "check_rows", "digest_copy", "digest_rows", "lane_keys"]

U64 = npt.NDArray[np.uint64]

PLACES = 1024
BLOCK_NBYTES = 4 * PLACES
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_LANE_SEEDS = np.array([0x6A09E667F3BCC908, 0xBB67AE8584CAA73B], np.uint64)
_PIECE_BLOCKS = 64  # what is widened to 64 bits at a time stays in the cache
_EDGES_NBYTES = 4 << 20


def _mix(x: U64) -> U64:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _make_constants() -> U64:
    scattered = _mix(np.arange(1, PLACES + 1, dtype=np.uint64) * _GOLDEN)
    return np.stack([scattered & np.uint64(0xFFFFFFFF), scattered >> np.uint64(32)])


CONSTANTS = _make_constants()
"""(2, 1024): what the word at each place of a block is multiplied by, for both lanes."""


def block_factors(blocks: U64, seed: int) -> U64:
    """Return (N, 2): what the sum over each of these blocks is multiplied by, for both lanes."""
    return _mix(((blocks + np.uint64(1)) * _GOLDEN)[:, None] + lane_keys(seed)) | np.uint64(1)


def lane_keys(seed: int) -> U64:
    """Return what the factors of both lanes are made from."""
    return _mix(np.uint64(seed) ^ _LANE_SEEDS)


def digest_rows(rows: U64, out: U64, seed: int) -> None:
    """Add the digest of each row of (address, nbytes, position, index) to `out[index]`."""
    check_rows(rows, out, seed)
    heads, middles, tails = _split(rows)
    for address, nbytes, position, index in middles.tolist():
        out[index] += _digest_blocks(_words(address, nbytes), position // BLOCK_NBYTES, seed)
    for edges in group_rows(np.concatenate([heads, tails]), _EDGES_NBYTES, size=1):
        blocks = edges[:, 2] // np.uint64(BLOCK_NBYTES)
        np.add.at(out, edges[:, 3].astype(np.intp), _digest_edges(edges) * block_factors(blocks, seed))


def digest_copy(rows: U64, out: U64, seed: int) -> None:
    """Copy each row of (source, destination, nbytes, position, index), and add its digest to `out[index]`."""
    if not (isinstance(rows, np.ndarray) and rows.ndim == 2 and rows.shape[1] == 5 and rows.dtype == np.uint64):
        raise TypeError("not an (N, 5) array of uint64")
    landed = np.ascontiguousarray(rows[:, 1:])
    check_rows(landed, out, seed)
    if (rows[:, 0] + rows[:, 2] < rows[:, 0]).any():
        raise ValueError("a row reaches past the end of memory")
    code = syscalls.copy_rows(np.ascontiguousarray(rows[:, :3]))
    if code != 0:
        raise OSError(-code, os.strerror(-code))
    digest_rows(landed, out, seed)


def check_rows(rows: U64, out: U64, seed: int) -> None:
    """Refuse arguments that do not fit, before anything is read."""
    for array, columns in ((rows, 4), (out, 2)):
        shaped = isinstance(array, np.ndarray) and array.ndim == 2 and array.shape[1] == columns
        if not (shaped and array.dtype == np.uint64 and array.flags.c_contiguous):
            raise TypeError(f"not a C-contiguous (N, {columns}) array of uint64")
    if not out.flags.writeable or not isinstance(seed, int | np.integer) or not 0 <= seed < 1 << 64:
        raise TypeError("`out` must be writable, and the seed an unsigned number of 64 bits")
    if (rows[:, 3] >= np.uint64(len(out))).any():
        raise ValueError("a row has the index of no sum")
    if (rows[:, 0] + rows[:, 1] < rows[:, 0]).any() or (rows[:, 2] + rows[:, 1] < rows[:, 2]).any():
        raise ValueError("a row reaches past the end of memory, or of all positions")


def _split(rows: U64) -> tuple[U64, U64, U64]:
    """Cut rows into what lies in a block's end, in whole blocks and in a block's beginning."""
    size = np.uint64(BLOCK_NBYTES)
    start, end = rows[:, 2], rows[:, 2] + rows[:, 1]
    to_bound = np.minimum((size - start % size) % size, rows[:, 1])
    first = start + to_bound
    last = np.maximum(end - end % size, first)
    return _cut(rows, start, first), _cut(rows, first, last), _cut(rows, last, end)


def _cut(rows: U64, start: U64, end: U64) -> U64:
    cut = np.stack([rows[:, 0] + (start - rows[:, 2]), end - start, start, rows[:, 3]], axis=1)
    return cut[cut[:, 1] > 0]


def _words(address: int, nbytes: int) -> npt.NDArray[np.uint32]:
    data = (ctypes.c_uint8 * nbytes).from_address(address)
    return np.frombuffer(memoryview(data), np.uint32)


def _digest_blocks(words: npt.NDArray[np.uint32], first: int, seed: int) -> U64:
    """Return the digest of whole blocks that lie one after the other."""
    table = words.reshape(-1, PLACES)
    total = np.zeros(2, np.uint64)
    for at in range(0, len(table), _PIECE_BLOCKS):
        wide = table[at : at + _PIECE_BLOCKS].astype(np.uint64)
        blocks = np.arange(first + at, first + at + len(wide), dtype=np.uint64)
        sums = np.stack([(wide * constants).sum(axis=1) for constants in CONSTANTS], axis=1)
        total += (sums * block_factors(blocks, seed)).sum(axis=0)
    return total


def _digest_edges(edges: U64) -> U64:
    """Return (N, 2), what ranges that lie inside one block each add up to."""
    skew = edges[:, 2] % np.uint64(4)
    counts = (skew + edges[:, 1] + np.uint64(3)) // np.uint64(4)
    starts = np.cumsum(counts) - counts
    words = np.zeros(int(counts.sum()), "<u4")
    targets = np.uint64(words.ctypes.data) + starts * np.uint64(4) + skew
    code = syscalls.copy_rows(np.ascontiguousarray(np.stack([edges[:, 0], targets, edges[:, 1]], axis=1)))
    if code != 0:
        raise OSError(-code, os.strerror(-code))
    first = edges[:, 2] % np.uint64(BLOCK_NBYTES) // np.uint64(4)
    skipped = np.repeat((first - starts).astype(np.int64), counts.astype(np.int64))
    places = np.arange(len(words)) + skipped
    wide = words.astype(np.uint64)
    lanes = [np.add.reduceat(wide * constants[places], starts.astype(np.intp)) for constants in CONSTANTS]
    return np.stack(lanes, axis=1)
