"""Lines: the fixed records that ranks write onto each other's boards, and the cells that they go to."""

from __future__ import annotations

import enum
from functools import lru_cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt

TEXT_NBYTES: Final = 200
NOWHERE: Final = 0xFFFFFFFF
"""The number of no slot."""


class Cell(enum.IntEnum):
    """The cells that each source has on a board. A phase's lines go to the cell of its parity."""

    EVEN = 0
    ODD = 1
    WANT = 2
    """A source asks for a place: it cannot tell by itself where its rows go."""
    PLACE = 3
    """The answer, which also comes unasked where the receiver's slot is too small."""
    NOTICE = 4
    """A rank tells that it is waiting for somebody else, or that the reader is masked."""
    WELCOME = 5
    """What a rank that joins must know to take part in the next operation."""


CELLS: Final = len(Cell)


class Status(enum.IntEnum):
    """What a line says of its sender's call; anything but FINE ends the operation on all ranks alike."""

    FINE = 0
    RANGE = 1
    CONFIG = 2


@lru_cache(16)
def line_dtype(ranks: int) -> np.dtype[Any]:
    """Return the form of a line for so many ranks at most. The number comes first, and is written last."""
    words = mask_words(ranks)
    form = np.dtype([
        ("number", "<u8"), ("posted", "<f8"), ("signature", "<u4"), ("status", "<u4"), ("slot", "<u4"),
        ("place", "<u4"), ("count", "<u4"), ("offset", "<u4"), ("back", "<u4"), ("total", "<u4"),
        ("remaining", "<f8"), ("phase", "<u8"), ("mask", "<u8", (words,)), ("ready", "<u8", (words,)),
        ("text", f"S{TEXT_NBYTES}"), ("counts", "<u4", (ranks,)),
    ])  # fmt: skip
    itemsize = -(-form.itemsize // 64) * 64
    names = form.names or ()
    fields = form.fields or {}
    return np.dtype({
        "names": list(names), "formats": [fields[name][0] for name in names],
        "offsets": [fields[name][1] for name in names], "itemsize": itemsize,
    })  # fmt: skip


def mask_words(ranks: int) -> int:
    """Return how many words of 64 bits hold a bit for each rank."""
    return -(-ranks // 64)


def to_words(mask: int, words: int) -> npt.NDArray[np.uint64]:
    """Return a set of ranks, bits of an integer, as words."""
    return np.frombuffer(mask.to_bytes(8 * words, "little"), np.uint64)


def from_words(words: npt.NDArray[np.uint64]) -> int:
    """Return words as a set of ranks."""
    return int.from_bytes(words.tobytes(), "little")


def ranks_of(mask: int) -> tuple[int, ...]:
    """Return the ranks of a set, ascending."""
    return tuple(rank for rank in range(mask.bit_length()) if mask >> rank & 1)
