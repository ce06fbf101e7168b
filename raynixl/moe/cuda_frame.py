"""The frame: how the window of a rank on a GPU is laid out, the same for all ranks of a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from raynixl.moe.cuda_structs import LINE_NBYTES, Layer

SIDES: Final = 2
_ALIGNMENT: Final = 256
_LINE_NBYTES: Final = 128


@dataclass(frozen=True, slots=True)
class Frame:
    """Where lines, loads, rows that come and rows that come back lie in a window. All ranks reckon alike.

    ranks: how many ranks have a place. capacity: rows of one source. row_nbytes, item_nbytes: of a row, and of what
    comes back, at most. items: what comes back from one holder at most: capacity, or times topk where it is pairs.
    experts: the most that one rank holds.
    """

    ranks: int
    capacity: int
    row_nbytes: int
    item_nbytes: int
    items: int
    experts: int

    @property
    def loads_width(self) -> int:
        """How many words of one source say how many pairs each expert gets."""
        return -(-max(1, self.experts) // 16) * 16

    @property
    def in_nbytes(self) -> int:
        """Bytes of one source and side."""
        return aligned(self.capacity * self.row_nbytes)

    @property
    def back_nbytes(self) -> int:
        """Bytes of one holder and side."""
        return aligned(self.items * self.item_nbytes)

    @property
    def lines_at(self) -> tuple[int, int]:
        """Where the lines of dispatches and of combines begin: by source, then side."""
        return 0, self.ranks * SIDES * LINE_NBYTES

    @property
    def notices_at(self) -> int:
        """Where ranks say that we are masked: a word each."""
        return 2 * self.ranks * SIDES * LINE_NBYTES

    @property
    def waits_at(self) -> int:
        """Where ranks say that they wait for somebody else: two words each."""
        return self.notices_at + aligned(8 * self.ranks)

    @property
    def loads_at(self) -> int:
        """Where ranks say how many pairs each of our experts gets: by source, then side."""
        return self.waits_at + aligned(16 * self.ranks)

    @property
    def in_at(self) -> int:
        """Where rows begin that come: by source, then side."""
        return self.loads_at + aligned(4 * self.ranks * SIDES * self.loads_width)

    @property
    def head_nbytes(self) -> int:
        """How many bytes must be zeros before anybody writes to the window."""
        return self.in_at

    @property
    def back_at(self) -> int:
        """Where rows begin that come back: by holder, then side."""
        return self.in_at + self.ranks * SIDES * self.in_nbytes

    @property
    def nbytes(self) -> int:
        """How large a window is."""
        return self.back_at + self.ranks * SIDES * self.back_nbytes

    def layer(self, me: int, windows: dict[int, int], *, page: int, operation: int, mask: int) -> Layer:
        """Return what a rank's GPU is to know: where it reaches each window, and a number above all former ones."""
        made = Layer(
            notices_at=self.notices_at, waits_at=self.waits_at, loads_at=self.loads_at, in_at=self.in_at,
            back_at=self.back_at, in_nbytes=self.in_nbytes, back_nbytes=self.back_nbytes, page=page, me=me,
            capacity=self.capacity, loads_width=self.loads_width, ranks=self.ranks, operation=operation,
            base=operation, mask=mask,
        )  # fmt: skip
        made.lines_at[:] = self.lines_at
        for rank, address in windows.items():
            made.windows[rank] = address
        return made


def aligned(nbytes: int, to: int = _ALIGNMENT) -> int:
    """Round up, to where parts of a window begin unless told otherwise."""
    return -(-nbytes // to) * to


def fields_at(fields: list[int]) -> tuple[list[int], int]:
    """Return where each field of a row begins, at multiples of 16 bytes, and how long the row is, a multiple of 128.

    So rows are moved in words of 16 bytes, and a warp's words lie in whole lines of memory.
    """
    starts, end = [], 0
    for nbytes in fields:
        starts.append(end)
        end += aligned(nbytes, 16)
    return starts, max(_LINE_NBYTES, aligned(end, _LINE_NBYTES))
