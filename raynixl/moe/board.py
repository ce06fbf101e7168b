"""The board: the arena that peers write their lines onto, and the bell that wakes who waits for them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from raynixl.moe.lines import CELLS, Heard, LineForm, read_counts, read_line, read_number, read_text

if TYPE_CHECKING:
    import numpy.typing as npt

    from raynixl.agents import Agent

HEAD_NBYTES: Final = 64
"""The bell, in a cache line of its own."""


def cell_offset(form: LineForm, source: int, cell: int) -> int:
    """Return where a source's cell begins on a board."""
    return HEAD_NBYTES + (source * CELLS + cell) * form.nbytes


def board_nbytes(form: LineForm) -> int:
    """Return how large a board is."""
    return cell_offset(form, form.ranks, 0)


class Board:
    """One rank's board. Only its owner's thread reads it; each cell has one writer."""

    def __init__(self, agent: Agent, ranks: int) -> None:
        self._agent = agent
        self._native = agent.native
        self.ranks = ranks
        self.form = LineForm.of(ranks)
        self.region = agent.empty(board_nbytes(self.form))
        self.bell = self.region.memory.address
        self._bytes: npt.NDArray[np.uint8] = self.region.array(np.uint8)
        self._memory = memoryview(self._bytes)
        self._waits: dict[tuple[int, bytes], tuple[Any, Any]] = {}

    def wait(self, cell: int, ranks: npt.NDArray[np.int64], number: int, *, timeout: float, spin: float) -> bool:
        """Wait until the cells of these ranks have lines of this number or later. False at the timeout."""
        key = (cell, ranks.tobytes())
        found = self._waits.get(key)
        if found is None:
            if len(self._waits) > 64:
                self._waits.clear()
            offsets = [cell_offset(self.form, rank, cell) for rank in ranks.tolist()]
            found = self._waits[key] = (self.bell + np.array(offsets, np.uint64), np.empty(len(ranks), np.uint64))
        addresses, numbers = found
        numbers.fill(number)
        return bool(self._native.wait_lines(addresses, numbers, self.bell, timeout, spin) == len(ranks))

    def number(self, rank: int, cell: int) -> int:
        """Return the number of the line in a cell."""
        return read_number(self._memory, cell_offset(self.form, rank, cell))

    def read(self, rank: int, cell: int) -> Heard:
        """Read the line in a cell."""
        return read_line(self.form, self._memory, cell_offset(self.form, rank, cell))

    def text(self, rank: int, cell: int) -> str:
        """Read what a line says is wrong."""
        return read_text(self.form, self._memory, cell_offset(self.form, rank, cell))

    def counts(self, rank: int, cell: int) -> npt.NDArray[np.uint32]:
        """Read the counts of a line: a view."""
        return read_counts(self.form, self._memory, cell_offset(self.form, rank, cell))

    def take(self, source: int, cell: int, line: bytes) -> bool:
        """Write a line that came as a message, number last; False if it is no line, or not a later one."""
        if not (0 <= source < self.ranks and 0 <= cell < CELLS and len(line) == self.form.nbytes):
            return False
        number = int.from_bytes(line[:8], "little")
        if number <= self.number(source, cell):
            return False
        self._native.post_line(
            self.bell + cell_offset(self.form, source, cell), np.frombuffer(line, np.uint8)[8:], number, self.bell
        )
        return True

    def clear(self, source: int) -> None:
        """Forget the lines of a rank that begins anew."""
        self._bytes[cell_offset(self.form, source, 0) : cell_offset(self.form, source + 1, 0)] = 0

    def close(self) -> None:
        """Withdraw the arena."""
        if self.region.is_registered and not self._agent.is_closed:
            self._agent.deregister(self.region)
