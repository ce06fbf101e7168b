"""Channels: how lines and rows reach one peer whose memory is mapped here."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np

from raynixl.errors import RaynixlError, TransferTimeout
from raynixl.host import has_ended
from raynixl.moe.board import cell_offset
from raynixl.moe.fields import RowFormat
from raynixl.moe.lines import Cell, Line, LineForm

if TYPE_CHECKING:
    from raynixl.agents import Agent
    from raynixl.agents.window import Window
    from raynixl.moe.hello import Hello
    from raynixl.region import RemoteRegion


MOMENT: Final = 0.05
"""Seconds in which a peer can say where a slot is; who takes longer is asked for a place, beside all others."""

LEAST: Final = 0.005


@dataclass(frozen=True, slots=True)
class Source:
    """Where the rows of one field come from: row i at address + index[i] * stride, or i * stride without an index."""

    address: int
    stride: int
    nbytes: int
    index: np.ndarray[Any, Any] | None = None


@dataclass(frozen=True, slots=True)
class Place:
    """Where rows go: a slot of a peer's, by number, and the first row in it."""

    slot: int
    offset: int


class Directions(Protocol):
    """What a channel needs to know of a peer's slots beside those that it knows already."""

    def __call__(self, slot: int, timeout: float) -> RemoteRegion:
        """Ask the peer for the descriptor of a slot; raises RaynixlError."""


def share_of(deadline: float) -> float:
    """Return for how long a peer may be waited for alone, while others wait for us: half of the time that is left."""
    return max(LEAST, (deadline - time.monotonic()) / 2)


class Channel(Protocol):
    """The way to one peer. A method that returns False has found the peer lost."""

    rank: int
    name: str
    incarnation: str
    lines: int
    """Those of phases; each takes along the rows that were put before it."""
    asides: int
    """Lines of other cells: who is late or overflows, and who joins."""
    puts: int

    @property
    def is_direct(self) -> bool:
        """Whether the peer's memory is mapped here, so that rows are there when `put` returns."""

    def post(self, cell: Cell, line: Line) -> bool:
        """Write a line onto the peer's board, behind all rows that were put before."""

    def put(self, form: RowFormat, place: Place, sources: list[Source], count: int, deadline: float) -> bool:
        """Write rows into a slot of the peer's; they are there once the next line is."""

    def finish(self, deadline: float) -> bool:
        """Wait until all rows that were put are at the peer."""

    def capacity(self, form: RowFormat, slot: int, deadline: float) -> int:
        """Return how many rows of this form a slot holds; 0 if the peer cannot be asked."""

    def has_ended(self) -> bool:
        """Whether the peer's process is known to have ended: then it writes into nothing any more."""


class Reach:
    """What both kinds of channels know of a peer: its slots by number, and what was sent to it."""

    is_direct: bool

    def __init__(self, agent: Agent, hello: Hello, board: Window, directions: Directions) -> None:
        self.rank, self.name = hello.rank, board.remote.owner
        self.incarnation = board.remote.incarnation
        self.lines = 0
        self.asides = 0
        self.puts = 0
        self._agent = agent
        self._directions = directions
        self._slots: dict[int, Window | None] = {}

    def window(self, slot: int, deadline: float) -> Window | None:
        """Return a slot of the peer's, bound; None if it cannot be had any more, or not yet."""
        if slot not in self._slots:
            try:
                remote = self._directions(slot, share_of(deadline))
                window = self._agent.window(remote, timeout=share_of(deadline))
            except TransferTimeout:
                return None
            except RaynixlError:
                self._slots[slot] = None
            else:
                self._slots[slot] = window if window.is_mapped or not self.is_direct else None
        return self._slots[slot]

    def capacity(self, form: RowFormat, slot: int, deadline: float) -> int:
        """Return how many rows of this form a slot holds."""
        window = self.window(slot, min(deadline, time.monotonic() + 2 * MOMENT))
        return 0 if window is None else form.layout(window.remote.nbytes).capacity

    def room(self, form: RowFormat, place: Place, count: int, deadline: float) -> tuple[Window, tuple[int, ...]] | None:
        """Return the slot of a place and where its fields begin; None if that many rows do not fit there."""
        window = self.window(place.slot, deadline)
        if window is None:
            return None
        layout = form.layout(window.remote.nbytes)
        return (window, layout.starts) if place.offset + count <= layout.capacity else None

    def count(self, cell: Cell) -> None:
        """Count a line that goes to a cell."""
        if cell < Cell.WANT:
            self.lines += 1
        else:
            self.asides += 1


class MappedChannel(Reach):
    """A peer whose board and slots are mapped here: lines and rows are stores."""

    is_direct = True

    def __init__(
        self, agent: Agent, ranks: int, *, hello: Hello, board: Window, directions: Directions, topic: str
    ) -> None:
        super().__init__(agent, hello, board, directions)
        self.pid = hello.pid
        self._native = agent.native
        self._bell = board.address
        self._gates = board.gates
        self._cells = {cell: board.address + cell_offset(LineForm.of(ranks), hello.lane, cell) for cell in Cell}

    def post(self, cell: Cell, line: Line) -> bool:
        """Write a line onto the peer's board."""
        if self._native.post_line(self._cells[cell], line.payload, line.number, self._bell, self._gates):
            return False
        self.count(cell)
        return True

    def put(self, form: RowFormat, place: Place, sources: list[Source], count: int, deadline: float) -> bool:
        """Copy rows straight into the peer's slot."""
        room = self.room(form, place, count, deadline)
        if room is None:
            return False
        window, starts = room
        self.puts += 1
        for start, source in zip(starts, sources, strict=True):
            at = window.address + start + place.offset * source.nbytes
            code = self._native.put_rows(
                source.address, source.stride, source.nbytes, source.index, at, window.gates, count
            )
            if code:
                return False
        return True

    def finish(self, deadline: float) -> bool:
        """Nothing is under way."""
        return True

    def has_ended(self) -> bool:
        """Whether the peer's process has ended: mapped memory means that it is one of this host."""
        return self.pid != os.getpid() and has_ended(self.pid)
