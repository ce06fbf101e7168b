"""The board: the arena that peers write their lines onto, and the bell that wakes who waits for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from raynixl.moe.lines import CELLS, Heard, LineForm, read_counts, read_line, read_number, read_text

if TYPE_CHECKING:
    import numpy.typing as npt

    from raynixl.agents import Agent

HEAD_NBYTES: Final = 64
"""The bell, in a cache line of its own."""

SPARE: Final = 8
"""Lanes, and a quarter more than ranks, for sessions of before whose processes were replaced and may still write."""


def cell_offset(form: LineForm, lane: int, cell: int) -> int:
    """Return where a lane's cell begins on a board."""
    return HEAD_NBYTES + (lane * CELLS + cell) * form.nbytes


def lanes_of(ranks: int) -> int:
    """Return how many lanes a board has for so many ranks; behind them lies one that nobody is given."""
    return ranks + ranks // 4 + SPARE


class Board:
    """One rank's board. Only its owner's thread reads it. A session of a peer has a lane, of which it alone writes."""

    def __init__(self, agent: Agent, ranks: int) -> None:
        self._agent = agent
        self._native = agent.native
        self.ranks = ranks
        self.lanes = lanes_of(ranks)
        self.form = LineForm.of(ranks)
        self.region = agent.empty(cell_offset(self.form, self.lanes + 1, 0))
        self.bell = self.region.memory.address
        self._bytes: npt.NDArray[np.uint8] = self.region.array(np.uint8)
        self._memory = memoryview(self._bytes)
        self._at = [[cell_offset(self.form, self.lanes, cell) for cell in range(CELLS)]] * ranks
        self._waits: dict[tuple[int, bytes], tuple[Any, Any]] = {}

    def wait(self, cell: int, ranks: npt.NDArray[np.int64], number: int, *, timeout: float, spin: float) -> bool:
        """Wait until the cells of these ranks have lines of this number or later. False at the timeout."""
        key = (cell, ranks.tobytes())
        found = self._waits.get(key)
        if found is None:
            if len(self._waits) > 64:
                self._waits.clear()
            offsets = [self._at[rank][cell] for rank in ranks.tolist()]
            found = self._waits[key] = (self.bell + np.array(offsets, np.uint64), np.empty(len(ranks), np.uint64))
        addresses, numbers = found
        numbers.fill(number)
        return bool(self._native.wait_lines(addresses, numbers, self.bell, timeout, spin) == len(ranks))

    def number(self, rank: int, cell: int) -> int:
        """Return the number of the line in a cell."""
        return read_number(self._memory, self._at[rank][cell])

    def read(self, rank: int, cell: int) -> Heard:
        """Read the line in a cell."""
        return read_line(self.form, self._memory, self._at[rank][cell])

    def heard(self, ranks: Sequence[int], cell: int, number: int) -> dict[int, Heard]:
        """Return by rank the lines in a cell that have this number or a later one."""
        form, memory, at = self.form, self._memory, self._at
        lines = {rank: read_line(form, memory, at[rank][cell]) for rank in ranks}
        return {rank: line for rank, line in lines.items() if line.number >= number}

    def text(self, rank: int, cell: int) -> str:
        """Read what a line says is wrong."""
        return read_text(self.form, self._memory, self._at[rank][cell])

    def counts(self, rank: int, cell: int) -> npt.NDArray[np.uint32]:
        """Read the counts of a line: a view."""
        return read_counts(self.form, self._memory, self._at[rank][cell])

    def bind(self, rank: int, lane: int) -> None:
        """Read a rank's lines from a lane, from now on."""
        self._at[rank] = [cell_offset(self.form, lane, cell) for cell in range(CELLS)]
        self._waits.clear()

    def put(self, lane: int, cell: int, line: bytes) -> bool:
        """Write a line that came as a message, number last; False if it is no line, or not a later one."""
        if not (0 <= lane < self.lanes and 0 <= cell < CELLS and len(line) == self.form.nbytes):
            return False
        number, at = int.from_bytes(line[:8], "little"), cell_offset(self.form, lane, cell)
        if number <= read_number(self._memory, at):
            return False
        self._native.post_line(self.bell + at, np.frombuffer(line, np.uint8)[8:], number, self.bell)
        return True

    def clear(self, lane: int) -> None:
        """Forget the lines in a lane, before another session is given it."""
        self._bytes[cell_offset(self.form, lane, 0) : cell_offset(self.form, lane + 1, 0)] = 0

    def close(self) -> None:
        """Withdraw the arena."""
        if self.region.is_registered and not self._agent.is_closed:
            self._agent.deregister(self.region)
