"""The board: the arena that peers write their lines onto, and the bell that wakes who waits for them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from raynixl.moe.lines import CELLS, Cell, line_dtype

if TYPE_CHECKING:
    from raynixl.agents import Agent

HEAD_NBYTES: Final = 64
"""The bell (a counter) and the number of who sleeps on it, each 4 bytes, in a cache line of their own."""


def cell_offset(ranks: int, source: int, cell: Cell) -> int:
    """Return where a source's cell begins on a board for so many ranks."""
    return HEAD_NBYTES + (source * CELLS + cell) * line_dtype(ranks).itemsize


def board_nbytes(ranks: int) -> int:
    """Return how large a board for so many ranks is."""
    return cell_offset(ranks, ranks, Cell.EVEN)


class Board:
    """One rank's board. Only its owner's thread reads it; each cell has one writer."""

    def __init__(self, agent: Agent, ranks: int) -> None:
        self._agent = agent
        self._native = agent.native
        self.ranks = ranks
        self.region = agent.empty(board_nbytes(ranks))
        self.bell = self.region.memory.address
        self._dtype = line_dtype(ranks)
        self.cells: np.ndarray[Any, Any] = np.ndarray(
            (ranks, CELLS), self._dtype, self.region.array(np.uint8), offset=HEAD_NBYTES
        )
        self._addresses = {
            cell: self.bell + np.array([cell_offset(ranks, rank, cell) for rank in range(ranks)], np.uint64)
            for cell in Cell
        }

    def wait(self, cell: Cell, ranks: np.ndarray[Any, Any], number: int, *, timeout: float, spin: float) -> bool:
        """Wait until the cells of these ranks have lines of this number or later. False at the timeout."""
        addresses = self._addresses[cell][ranks]
        numbers = np.full(len(ranks), number, np.uint64)
        return bool(self._native.wait_lines(addresses, numbers, self.bell, timeout, spin) == len(ranks))

    def has(self, rank: int, cell: Cell, number: int) -> bool:
        """Whether a cell has a line of this number or later."""
        return bool(self.cells["number"][rank, cell] >= number)

    def take(self, source: int, cell: int, line: bytes) -> bool:
        """Write a line that came as a message, number first; False if it is no line."""
        if not (0 <= source < self.ranks and 0 <= cell < CELLS and len(line) == self._dtype.itemsize):
            return False
        number = int.from_bytes(line[:8], "little")
        if number <= int(self.cells["number"][source, cell]):
            return False
        self._native.post_line(int(self._addresses[Cell(cell)][source]), line[8:], number, self.bell)
        return True

    def ring(self) -> None:
        """Make whoever waits look again."""
        self._native.ring(self.bell)

    def close(self) -> None:
        """Withdraw the arena."""
        if self.region.is_registered and not self._agent.is_closed:
            self._agent.deregister(self.region)
