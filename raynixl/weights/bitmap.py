"""Bitmaps of chunks as integers: bit i is chunk i; for a thousand chunks that is faster than numpy."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray


def to_bytes(bits: int, count: int) -> bytes:
    """Return `count` bits as bytes, the first chunk in the lowest bit of the first byte."""
    return bits.to_bytes((count + 7) // 8, "little")


def from_bytes(packed: bytes, count: int) -> int:
    """Return the first `count` bits; whatever is set behind them is dropped."""
    return int.from_bytes(packed, "little") & ((1 << count) - 1)


def of(chunks: Iterable[int]) -> int:
    """Return the bitmap of some chunks."""
    numbers = np.fromiter(chunks, np.int64)
    if not numbers.size:
        return 0
    marks = np.zeros(int(numbers.max()) + 1, bool)
    marks[numbers] = True
    return int.from_bytes(np.packbits(marks, bitorder="little").tobytes(), "little")


def indices(bits: int) -> NDArray[np.int64]:
    """Return the numbers of the set bits, in ascending order."""
    packed = np.frombuffer(bits.to_bytes((bits.bit_length() + 7) // 8, "little"), np.uint8)
    return np.flatnonzero(np.unpackbits(packed, bitorder="little"))


def pick(bits: int, random: Callable[[], float]) -> int:
    """Return the number of a set bit: the first one at or above a random place. There must be one."""
    start = int(random() * bits.bit_length())
    upper = bits >> start
    return start + (upper & -upper).bit_length() - 1
