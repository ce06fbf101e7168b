"""Sending: the lines of one phase on their way to all ranks, each behind the rows that go there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from raynixl.moe.channel import Place, Rows
from raynixl.moe.lines import NOWHERE, PHASES, TOLD_AT, Line
from raynixl.moe.session import OUT_OF_REACH, REFUSED, Session
from raynixl.native.moe import NO_ROWS, SENT

if TYPE_CHECKING:
    from raynixl.moe.landing import Landing
    from raynixl.native.moe import Way

_NO_FIELDS: Final = np.zeros((0, 4), np.uint64)


def post_to_all(session: Session, line: Line) -> None:
    """Write a phase's line, without rows, to all active ranks; who is gone is masked."""
    ranks, sends = [], []
    for rank in session.members.in_turn:
        way = session.channels[rank].way(None, 0)
        if way is None:
            session.post(rank, line)
        else:
            ranks.append(rank)
            sends.append((way, 0, 0, 0, 0))
    _carry(session, line, ranks, sends, _NO_FIELDS, 0)


def _carry(
    session: Session,
    line: Line,
    ranks: list[int],
    sends: list[tuple[Way, int, int, int, int]],
    fields: npt.NDArray[Any],
    total: int,
) -> None:
    """Have the core put rows and post lines, and lose the ranks that it cannot reach."""
    cell = PHASES[line.number & 1]
    codes = session.agent.native.send_rows(sends, total, fields, line.array, TOLD_AT)
    for rank, send, code in zip(ranks, sends, codes, strict=True):
        if code == SENT:
            session.channels[rank].note(cell, send[2])
        else:
            session.lose(rank, OUT_OF_REACH if code == NO_ROWS else REFUSED)


@dataclass(slots=True)
class Sending:
    """What one phase sends: to each rank `counts` of the rows from `begins` on, and a line."""

    landing: Landing
    line: Line
    rows: Rows
    begins: list[int]
    counts: list[int]
    deadline: float
    backs: list[int]
    """By rank, where what comes back from it begins, and at the end how much comes back in all."""

    def to_all(self, offsets: list[int], extent: list[int]) -> list[int]:
        """Send each rank its rows, at these offsets in the slot that it has announced, and the line behind them.

        Those whose offset is -1, or whose slot does not hold the rows that they get in all, are asked where rows go;
        they are returned.
        """
        session, landing = self.session, self.landing
        asked, alone, ranks, sends = [], [], [], []
        for rank in session.members.in_turn:
            channel, count, slot, offset = session.channels[rank], self.counts[rank], int(session.slots[rank]), 0
            way = channel.way(landing.form if count else None, slot)
            if count:
                offset = offsets[rank]
                if offset < 0 or (way.capacity if way else self._capacity(rank, slot)) < extent[rank]:
                    landing.ask(rank, count)
                    asked.append(rank)
                    continue
            if way is None:
                alone.append((rank, Place(slot, offset) if count else None))
            else:
                ranks.append(rank)
                sends.append((way, self.begins[rank], count, offset, self.backs[rank]))
        for rank, place in alone:  # first those to which bytes travel while the core copies for the others
            self.to_one(rank, place)
        _carry(session, self.line, ranks, sends, self.rows.table, self.backs[-1])
        return asked

    def to_one(self, rank: int, place: Place | None) -> None:
        """Send a rank its rows to a place, or none, and the line behind them."""
        session, line, count = self.session, self.line, self.counts[rank]
        if place is not None and not self.landing.put(rank, place, self.rows, self.begins[rank], count, self.deadline):
            return
        slot, offset = (NOWHERE, 0) if place is None else (place.slot, place.offset)
        line.rows(
            session.landing.number, place=slot, offset=offset, count=count, back=self.backs[rank], total=self.backs[-1]
        )
        session.post(rank, line)

    @property
    def session(self) -> Session:
        """The session in which it is sent."""
        return self.landing.session

    def _capacity(self, rank: int, slot: int) -> int:
        """Return how many rows a slot of a peer's holds that is perhaps not known yet."""
        return self.session.channels[rank].capacity(self.landing.form, slot, self.deadline)
