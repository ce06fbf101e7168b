"""Lines: the fixed records that ranks write onto each other's boards, and the cells that they go to."""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from raynixl.errors import ConfigError, RangeError, RaynixlError

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
    """The answer."""
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

    @staticmethod
    def of(error: RaynixlError) -> Status:
        """Return how a line names an error."""
        return Status.RANGE if isinstance(error, RangeError) else Status.CONFIG

    @staticmethod
    def kind(status: int) -> type[RaynixlError]:
        """Return what is raised where a line says so; a status that nobody knows is an error, too."""
        kinds: dict[int, type[RaynixlError]] = {Status.RANGE: RangeError, Status.CONFIG: ConfigError}
        return kinds.get(status, RaynixlError)


PHASES: Final = (Cell.EVEN, Cell.ODD)
"""The cells of a phase's lines, by its parity."""

_HEAD = struct.Struct("<QdQdII")  # number, posted, phase, remaining, signature, status
_ROWS = struct.Struct("<IIIIII")  # slot, place, offset, count, back, total
_ROWS_AT = _HEAD.size
TOLD_AT: Final = _ROWS_AT + 4
"""Where a line says what one rank is told of its rows: all that the core fills in for each (`send_rows`)."""
_MASK_AT = _HEAD.size + _ROWS.size
_NUMBER = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class LineForm:
    """Where a line's parts lie, for so many ranks at most. The number comes first, and is written last."""

    ranks: int
    mask_nbytes: int
    record: struct.Struct
    """Head, rows and the two masks; those of up to 64 ranks are numbers, others bytes."""
    text_at: int
    counts_at: int
    nbytes: int

    @staticmethod
    def of(ranks: int) -> LineForm:
        """Return the form for so many ranks."""
        mask_nbytes = -(-ranks // 64) * 8
        text_at = _MASK_AT + 2 * mask_nbytes
        counts_at = text_at + TEXT_NBYTES
        masks = "QQ" if mask_nbytes == 8 else f"{mask_nbytes}s{mask_nbytes}s"
        record = struct.Struct(_HEAD.format + _ROWS.format[1:] + masks)
        return LineForm(ranks, mask_nbytes, record, text_at, counts_at, -(-(counts_at + 4 * ranks) // 64) * 64)


class Line:
    """A line to be written, again and again: what all ranks are told alike, then what one is told of its rows."""

    __slots__ = ("_form", "array", "data", "number", "payload")

    def __init__(self, form: LineForm) -> None:
        self._form = form
        self.number = 0
        self.data = bytearray(form.nbytes)
        self.array = np.frombuffer(self.data, np.uint8)
        self.payload = self.array[8:]
        """All but the number, which is written behind it."""

    def fill(
        self,
        number: int,
        *,
        posted: float = 0.0,
        signature: int = 0,
        slot: int = NOWHERE,
        mask: int = 0,
        ready: int = 0,
        phase: int = 0,
        remaining: float = 0.0,
    ) -> None:
        """Begin anew, with what all ranks are told, and no rows."""
        data, size = self.data, self._form.mask_nbytes
        self.number = number
        _HEAD.pack_into(data, 0, number, posted, phase, remaining, signature, Status.FINE)
        _ROWS.pack_into(data, _ROWS_AT, slot, NOWHERE, 0, 0, 0, 0)
        data[_MASK_AT : _MASK_AT + size] = mask.to_bytes(size, "little")
        data[_MASK_AT + size : _MASK_AT + 2 * size] = ready.to_bytes(size, "little")

    def rows(
        self, slot: int, *, place: int = NOWHERE, offset: int = 0, count: int = 0, back: int = 0, total: int = 0
    ) -> None:
        """Say what one rank is told of its rows."""
        _ROWS.pack_into(self.data, _ROWS_AT, slot, place, offset, count, back, total)

    def counts(self, counts: npt.NDArray[np.int64]) -> None:
        """Say how many rows go to each rank."""
        at = self._form.counts_at
        self.data[at : at + 4 * len(counts)] = counts.astype("<u4").tobytes()

    def refuse(self, status: Status, text: str) -> None:
        """Say what is wrong with our call."""
        struct.pack_into("<I", self.data, _HEAD.size - 4, status)
        self.data[self._form.text_at : self._form.counts_at] = text.encode()[:TEXT_NBYTES].ljust(TEXT_NBYTES, b"\0")


class Heard(NamedTuple):
    """A line as it was read."""

    number: int
    posted: float
    phase: int
    remaining: float
    signature: int
    status: int
    slot: int
    place: int
    offset: int
    count: int  # type: ignore[assignment]  # nobody counts the items of a line
    back: int
    total: int
    mask: int
    ready: int


_as_heard: Final[Any] = tuple.__new__  # what `_make` does, but for a call of Python's: each phase has a line a peer


def read_line(form: LineForm, memory: memoryview, at: int) -> Heard:
    """Read the line that begins at a byte of a board."""
    parts = form.record.unpack_from(memory, at)
    if form.mask_nbytes != 8:
        *rest, mask, ready = parts
        parts = (*rest, int.from_bytes(mask, "little"), int.from_bytes(ready, "little"))
    heard: Heard = _as_heard(Heard, parts)
    return heard


def read_number(memory: memoryview, at: int) -> int:
    """Read a line's number alone."""
    return int(_NUMBER.unpack_from(memory, at)[0])


def read_text(form: LineForm, memory: memoryview, at: int) -> str:
    """Read what a line says is wrong."""
    return bytes(memory[at + form.text_at : at + form.counts_at]).rstrip(b"\0").decode(errors="replace")


def read_counts(form: LineForm, memory: memoryview, at: int) -> npt.NDArray[np.uint32]:
    """Read how many rows go to each rank: a view of the board."""
    return np.frombuffer(memory, "<u4", form.ranks, at + form.counts_at)


def ranks_of(mask: int) -> tuple[int, ...]:
    """Return the ranks of a set, bits of an integer, ascending."""
    return tuple(rank for rank in range(mask.bit_length()) if mask >> rank & 1)
