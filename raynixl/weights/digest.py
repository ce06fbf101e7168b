"""Digests of weights: linear sums that depend on every byte's position, so that partial ones add up to a chunk's."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from raynixl.native import Native, load
from raynixl.native.rows import cut_rows, group_rows
from raynixl.native.twin_digest import check_rows
from raynixl.weights.workers import run_workers

ARENA_BIT = 48
"""A position is `arena << ARENA_BIT | offset`: it names a byte of an image."""

_GROUP_NBYTES = 4 << 20  # work for one thread at a time; less is digested before another has woken

U64 = NDArray[np.uint64]


def digest_rows(rows: U64, out: U64, *, seed: int, threads: int = 1, native: Native | None = None) -> None:
    """Add the digest of each row of (address, nbytes, position, index) to `out[index]`, modulo 2^64.

    `out` is (M, 2). The digests of disjoint ranges add up to that of what they cover. Runs without the interpreter's
    lock; the memory must stay, and no other thread may use `out`, until it returns.

    Raises:
        ValueError: an index of no sum, or a row past the end of memory; nothing was read.
        TypeError: not C-contiguous arrays of uint64.
    """
    core = load(native=True) if native is None else native
    if threads <= 1:
        core.digest_rows(rows, out, seed)
        return
    check_rows(rows, out, seed)
    groups = group_rows(cut_rows(rows, _GROUP_NBYTES, size=1, moving=(0, 2)), _GROUP_NBYTES, size=1)
    adding = threading.Lock()  # protects out

    def one(number: int) -> None:
        mine = groups[number].copy()
        first = mine[:, 3].min()
        mine[:, 3] -= first
        sums = np.zeros((int(mine[:, 3].max()) + 1, 2), np.uint64)
        core.digest_rows(mine, sums, seed)
        with adding:
            out[int(first) : int(first) + len(sums)] += sums

    run_workers(one, len(groups), threads=threads)


def chunk_rows(arrays: Sequence[NDArray[np.uint8]], chunks: NDArray[np.int64]) -> U64:
    """Return the rows of an image's chunks of (arena, offset, nbytes), numbered in order, as they lie in its arrays."""
    addresses = np.array([array.ctypes.data for array in arrays], np.uint64)
    sizes = np.array([array.nbytes for array in arrays], np.int64)
    arena, offset, nbytes = chunks[:, 0], chunks[:, 1], chunks[:, 2]
    assert not len(chunks) or ((offset >= 0).all() and (offset + nbytes <= sizes[arena]).all()), "a chunk is outside"
    at, start = arena.astype(np.uint64), offset.astype(np.uint64)
    numbers = np.arange(len(chunks), dtype=np.uint64)
    position = at << np.uint64(ARENA_BIT) | start
    return np.stack([addresses[arena] + start, nbytes.astype(np.uint64), position, numbers], axis=1)


def digest_chunks(
    arrays: Sequence[NDArray[np.uint8]],
    chunks: NDArray[np.int64],
    *,
    threads: int,
    seed: int,
    native: Native | None = None,
) -> U64:
    """Return the (M, 2) digests of all chunks of an image, made by several threads."""
    out = np.zeros((len(chunks), 2), np.uint64)
    digest_rows(chunk_rows(arrays, chunks), out, seed=seed, threads=threads, native=native)
    return out


def version_digest(digests: U64) -> str:
    """Return the digest of a whole image from those of its chunks, or of any other disjoint ranges of it."""
    first, second = digests.sum(axis=0, dtype=np.uint64).tolist()
    return f"{first:016x}{second:016x}"
