"""Deltas: the elements that changed between two versions of the same ranges, as a blob that is written over the old."""

from __future__ import annotations

import struct
import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from raynixl.errors import IntegrityError
from raynixl.native import Native, load
from raynixl.native.rows import cut_rows, group_rows
from raynixl.weights.workers import run_workers

_HEADER = struct.Struct("<4sB3xQQ")  # magic, bytes of an element, elements, bytes of their gaps
_MAGIC = b"RXD1"
_ITEMSIZES = (1, 2, 4, 8, 16)
SEGMENT_NBYTES = 16 << 20  # scanned into one segment: fixed, as replicas must make equal blobs
_MAX_ARENAS = 1 << 16

MAX_SHARE = 0.25
"""Of the bytes that a full version moves: what is larger saves too little for the work at receivers."""

Bytes = NDArray[np.uint8]


class Segment(NamedTuple):
    """Part of a blob: gaps between changed elements, and their values."""

    itemsize: int
    gaps: Bytes
    values: Bytes


class _TooLarge(Exception):
    """The blob would have more bytes than wanted."""


def encode_rows(
    rows: NDArray[np.uint64], *, itemsize: int, limit: int, threads: int = 1, native: Native | None = None
) -> bytes | None:
    """Return what changed in rows of (old address, new address, nbytes, position), or None beyond `limit` bytes.

    Rows ascend in position (see digest.ARENA_BIT) and are disjoint; all consist of whole elements of `itemsize` bytes,
    which are compared bitwise. Equal rows and bytes give equal blobs, whatever the threads and the core. A
    concatenation of blobs is a blob.

    Raises:
        ValueError: the rows are not so.
    """
    core = load(native=True) if native is None else native
    _check_rows(rows, itemsize)
    groups = group_rows(cut_rows(rows, SEGMENT_NBYTES, size=2, moving=(0, 1, 3)), SEGMENT_NBYTES, size=2) or [rows]
    segments: list[tuple[bytes, bytes, bytes]] = [(b"", b"", b"")] * len(groups)
    room = limit
    counting = threading.Lock()  # protects room

    def one(number: int) -> None:
        nonlocal room
        made = core.delta_encode(np.ascontiguousarray(groups[number]), itemsize, max(0, room - _HEADER.size))
        if made is None:
            raise _TooLarge
        gaps, values = made
        segments[number] = _header(itemsize, gaps, values), gaps, values
        with counting:
            room -= _HEADER.size + len(gaps) + len(values)
            is_full = room < 0
        if is_full:
            raise _TooLarge

    try:
        run_workers(one, len(groups), threads=threads)
    except _TooLarge:
        return None
    return b"".join(part for segment in segments for part in segment)


def apply(blob: bytes | Bytes, arrays: Sequence[Bytes], *, threads: int = 1, native: Native | None = None) -> None:
    """Write what changed over an old version, which lies in an image's arrays, one for each arena.

    The whole blob is checked before the first byte is written, and nothing is ever written outside the arrays. A blob
    that was cut where one ends that was appended to another is still a blob: digests notice that.

    Raises:
        IntegrityError: it is malformed, or does not fit the arrays.
    """
    core = load(native=True) if native is None else native
    assert len(arrays) <= _MAX_ARENAS
    assert all(one.flags.c_contiguous and one.flags.writeable for one in arrays)
    arenas = np.array([(one.ctypes.data, one.nbytes) for one in arrays], np.uint64).reshape(-1, 2)
    segments = parse(np.frombuffer(blob, np.uint8))

    def walk(number: int, *, write: bool) -> None:
        segment = segments[number]
        if not core.delta_apply(segment.gaps, segment.values, segment.itemsize, arenas, write=write):
            raise malformed("an element lies outside the image, or its gaps are not whole")

    run_workers(lambda number: walk(number, write=False), len(segments), threads=threads)
    run_workers(lambda number: walk(number, write=True), len(segments), threads=threads)


def _check_rows(rows: NDArray[np.uint64], itemsize: int) -> None:
    """Refuse what the cores would see only part of, as each gets some of the rows."""
    if rows.ndim != 2 or rows.shape[1] != 4 or rows.dtype != np.uint64:
        raise ValueError("rows must be an (N, 4) array of uint64")
    ends = rows + rows[:, 2:3]
    if (ends[:, [0, 1, 3]] < rows[:, [0, 1, 3]]).any() or (rows[1:, 3] < ends[:-1, 3]).any():
        raise ValueError("rows must ascend in position, be disjoint and lie in memory")


def pack_segment(itemsize: int, gaps: bytes, values: bytes) -> bytes:
    """Return a segment of a blob."""
    return _header(itemsize, gaps, values) + gaps + values


def _header(itemsize: int, gaps: bytes, values: bytes) -> bytes:
    return _HEADER.pack(_MAGIC, itemsize, len(values) // itemsize, len(gaps))


def parse(blob: Bytes) -> list[Segment]:
    """Return the segments of a blob.

    Raises:
        IntegrityError: it is malformed.
    """
    segments: list[Segment] = []
    at = 0
    while at < len(blob) or not segments:
        if len(blob) - at < _HEADER.size:
            raise malformed("it is cut short")
        magic, itemsize, count, nbytes = _HEADER.unpack(blob[at : at + _HEADER.size].tobytes())
        if magic != _MAGIC or itemsize not in _ITEMSIZES:
            raise malformed("it does not begin as one")
        values = at + _HEADER.size + nbytes
        end = values + count * itemsize
        if end > len(blob):
            raise malformed("it is cut short")
        segments.append(Segment(itemsize, blob[at + _HEADER.size : values], blob[values:end]))
        at = end
    return segments


def malformed(why: str) -> IntegrityError:
    """Return the error for a blob that nobody can have made."""
    return IntegrityError(f"a delta is malformed: {why}", hint="take the whole version instead")
