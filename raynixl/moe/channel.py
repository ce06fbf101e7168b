"""Channels: how lines and rows reach one peer whose memory is mapped here."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np

from raynixl.agents.reply import Reply
from raynixl.errors import RaynixlError, TransferTimeout
from raynixl.host import has_ended
from raynixl.moe.board import cell_offset
from raynixl.moe.fields import RowFormat, SlotLayout
from raynixl.moe.lines import CELLS, Cell, Line, LineForm
from raynixl.region import RemoteRegion

if TYPE_CHECKING:
    from raynixl.agents import Agent
    from raynixl.agents.window import Window
    from raynixl.moe.hello import Hello
    from raynixl.native import Gate
    from raynixl.native.moe import Way


MOMENT: Final = 0.05
"""Seconds in which a peer can say where a slot is; who takes longer is asked for a place, beside all others."""

LEAST: Final = 0.005
MOST_KNOWN: Final = 256
"""Slots, by the form of their rows, whose layout is kept."""


def address_of(array: np.ndarray[Any, Any]) -> int:
    """Return where an array's items lie: what `array.ctypes.data` makes two objects for."""
    address: int = array.__array_interface__["data"][0]
    return address


@dataclass(frozen=True, slots=True)
class Source:
    """Where the rows of one field come from: row i at address + index[i] * stride, or i * stride without an index."""

    address: int
    stride: int
    nbytes: int
    index: np.ndarray[Any, Any] | None = None

    def entry(self) -> tuple[int, int, int, int]:
        """Return this for `put_fields`."""
        return self.address, self.stride, self.nbytes, 0 if self.index is None else address_of(self.index)

    def cut(self, first: int) -> Source:
        """Return this without the rows before one."""
        if self.index is None:
            return Source(self.address + first * self.stride, self.stride, self.nbytes)
        return Source(self.address, self.stride, self.nbytes, self.index[first:])


class Rows:
    """Rows that may be put, in one order: where each field comes from, and all of that as the core wants it."""

    __slots__ = ("sources", "table")

    def __init__(self, sources: list[Source]) -> None:
        self.sources = sources
        self.table = np.array([source.entry() for source in sources], np.uint64).reshape(-1, 4)

    def cut(self, first: int) -> list[Source]:
        """Return where the rows from one on come from."""
        return [source.cut(first) for source in self.sources]


@dataclass(frozen=True, slots=True)
class Place:
    """Where rows go: a slot of a peer's, by number, and the first row in it."""

    slot: int
    offset: int


class Directions(Protocol):
    """What a channel needs to know of a peer's slots beside those that it knows already."""

    def __call__(self, slot: int) -> RemoteRegion | Reply:
        """Return the descriptor of a slot, or the peer's answer that has it; raises RaynixlError."""


def share_of(deadline: float) -> float:
    """Return for how long a peer may be waited for alone, while others wait for us: half of the time that is left."""
    return max(LEAST, (deadline - time.monotonic()) / 2)


class Channel(Protocol):
    """The way to one peer. A method that returns False has found the peer lost."""

    rank: int
    name: str
    incarnation: str
    puts: int

    @property
    def lines(self) -> int:
        """How many lines of phases were sent; each takes along the rows that were put before it."""

    @property
    def asides(self) -> int:
        """How many lines went to other cells: who is late or overflows, and who joins."""

    @property
    def is_direct(self) -> bool:
        """Whether the peer's memory is mapped here, so that rows are there when `put` returns."""

    def way(self, form: RowFormat | None, slot: int) -> Way | None:
        """Return how the core sends rows of a form into a slot, or lines alone, together with all other peers'.

        None where that must be found out first, or rows go otherwise: by `put` and `post`.
        """

    def note(self, cell: Cell, count: int) -> None:
        """Count a line that the core has posted, behind so many rows."""

    def post(self, cell: Cell, line: Line) -> bool:
        """Write a line onto the peer's board, behind all rows that were put before."""

    def put(self, form: RowFormat, place: Place, rows: Rows, first: int, count: int, deadline: float) -> bool:
        """Write rows from one on into a slot of the peer's; they are there once the next line is."""

    def is_ready(self, slot: int) -> bool:
        """Whether a put into a slot of the peer's goes on, or fails, at once; never waits for who does not answer."""

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
        self.puts = 0
        self._agent = agent
        self._directions = directions
        self._slots: dict[int, Window | None] = {}
        self._asked: dict[int, RemoteRegion | Reply] = {}  # by slot that is not known yet
        self._known: dict[tuple[int, tuple[int, ...]], tuple[Window, SlotLayout]] = {}  # by slot, and fields of rows
        self._sent = [0] * CELLS

    @property
    def lines(self) -> int:
        """Those of phases."""
        return sum(self._sent[: Cell.WANT])

    @property
    def asides(self) -> int:
        """All others."""
        return sum(self._sent[Cell.WANT :])

    def window(self, slot: int, deadline: float) -> Window | None:
        """Return a slot of the peer's, bound; None if it cannot be had any more, or not yet."""
        if slot not in self._slots:
            try:
                found = self._ask(slot)
                remote = RemoteRegion.from_bytes(found.wait(share_of(deadline))) if isinstance(found, Reply) else found
                window = self._agent.window(remote, timeout=share_of(deadline))
            except TransferTimeout:
                return None
            except RaynixlError:
                self._slots[slot] = None
            else:
                self._slots[slot] = window if window.is_mapped or not self.is_direct else None
            self._asked.pop(slot, None)
        return self._slots[slot]

    def is_ready(self, slot: int) -> bool:
        """Whether a slot is known, or known not to be had; it is asked for once."""
        if slot not in self._slots:
            try:
                found = self._ask(slot)
            except TransferTimeout:
                return False
            except RaynixlError:
                self._slots[slot] = None
                return True
            if not isinstance(found, Reply) or found.done:
                self.window(slot, time.monotonic() + 2 * MOMENT)
        return slot in self._slots

    def _ask(self, slot: int) -> RemoteRegion | Reply:
        """Return what is asked for already, unless nobody has answered in time, or ask."""
        found = self._asked.get(slot)
        if found is None or (isinstance(found, Reply) and found.is_overdue(time.monotonic())):
            found = self._asked[slot] = self._directions(slot)
        return found

    def capacity(self, form: RowFormat, slot: int, deadline: float) -> int:
        """Return how many rows of this form a slot holds."""
        found = self._known.get((slot, form.fields))
        if found is None:
            found = self._slot(form, slot, min(deadline, time.monotonic() + 2 * MOMENT))
        return 0 if found is None else found[1].capacity

    def room(self, form: RowFormat, place: Place, count: int, deadline: float) -> tuple[Window, SlotLayout] | None:
        """Return the slot of a place and how it is laid out; None if that many rows do not fit there."""
        found = self._slot(form, place.slot, deadline)
        return None if found is None or place.offset + count > found[1].capacity else found

    def _slot(self, form: RowFormat, slot: int, deadline: float) -> tuple[Window, SlotLayout] | None:
        """Return a slot and how it is laid out for rows of a form, worked out once."""
        found = self._known.get((slot, form.fields))
        if found is None and (window := self.window(slot, deadline)) is not None:
            if len(self._known) > MOST_KNOWN:
                self._known.clear()
            found = self._known[slot, form.fields] = (window, form.layout(window.remote.nbytes))
        return found

    def way(self, form: RowFormat | None, slot: int) -> Way | None:
        """Return nothing: rows go by `put`."""
        return None

    def note(self, cell: Cell, count: int) -> None:
        """Count a line, and the rows before it."""
        self._sent[cell] += 1
        if count:
            self.puts += 1


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
        self._ways: dict[tuple[int, tuple[int, ...]], Way] = {}
        self._of_lines = self._make_way(0, 0, 0, (), ())

    def post(self, cell: Cell, line: Line) -> bool:
        """Write a line onto the peer's board."""
        if self._native.post_line(self._cells[cell], line.payload, line.number, self._bell, self._gates):
            return False
        self._sent[cell] += 1
        return True

    def put(self, form: RowFormat, place: Place, rows: Rows, first: int, count: int, deadline: float) -> bool:
        """Copy rows straight into the peer's slot."""
        room = self.room(form, place, count, deadline)
        if room is None:
            return False
        window, layout = room
        self.puts += 1
        code = self._native.put_fields(
            rows.table, first, layout.table, window.address, place.offset, window.gates, count
        )  # fmt: skip
        return not code

    def way(self, form: RowFormat | None, slot: int) -> Way | None:
        """Return how the core sends rows into a slot that is known."""
        if form is None:
            return self._of_lines
        key = slot, form.fields
        found = self._ways.get(key)
        if found is None and (known := self._known.get(key)) is not None:
            window, layout = known
            if len(self._ways) > MOST_KNOWN:
                self._ways.clear()
            found = self._make_way(slot, window.address, layout.capacity, layout.starts, window.gates)
            self._ways[key] = found
        return found

    def _make_way(self, slot: int, base: int, capacity: int, starts: Sequence[int], gates: Sequence[Gate]) -> Way:
        cells = self._cells[Cell.EVEN], self._cells[Cell.ODD]
        return self._native.Way(cells, self._bell, self._gates, slot, base, capacity, starts, gates)

    def finish(self, deadline: float) -> bool:
        """Nothing is under way."""
        return True

    def has_ended(self) -> bool:
        """Whether the peer's process has ended: mapped memory means that it is one of this host."""
        return self.pid != os.getpid() and has_ended(self.pid)
